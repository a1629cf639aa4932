"""Everything that a machine with an NVIDIA GPU can tell about this package, in one command and under nine minutes: `make gpu-test`.

    python tools/gpu_test.py [--output FOLDER] [--minutes 9] [--only STEP ...]

Needs Python, torch, numpy, pytest, a C++ compiler and nvcc; no network, no CMake, no installation. A step that fails or takes too long is told, and the next
one is run. The folder (default: build/gpu-test/<date>) gets summary.json (versions, steps), log.txt (what all steps printed) and what the steps write. Exit
status: 0 when every step passed, 1 when some did not, 3 when there is no GPU and what needs none passed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_toolkit import Toolkit, ToolkitError, find_toolkit

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "build" / "gpu-programs"
# Tests of what runs on a GPU; the others follow at the end, as time permits.
DEVICE_TESTS = ("test_cuda", "test_ops", "test_library", "test_prepared_bank", "test_coreset", "test_scoring", "test_memory_bank", "test_reference")
# Small ones, because a sanitizer slows a kernel down ten to a hundred times; every kernel is in one of them.
SANITIZED = {
    "test_cuda_projection": ("a_projection_beyond", "roots_are"),
    "test_cuda_coreset": ("many_picks", "rows_too_long", "rows_that_are_not_finite"),
    "test_cuda_knn": ("codes_spare", "a_bank_smaller", "rows_too_long", "images_with_bad"),
}
PROBE = """
import json, torch
devices = [{"name": torch.cuda.get_device_name(i), "capability": "%d.%d" % torch.cuda.get_device_capability(i),
            "memory_mib": torch.cuda.get_device_properties(i).total_memory >> 20}
           for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
print(json.dumps({"torch": torch.__version__, "torch_cuda": torch.version.cuda, "devices": devices}))
"""


@dataclass
class Result:
    """How a step ended: ok, failed, timed out or not run."""

    step: str
    status: str = "not run"
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Session:
    """One run: where results go, when it has to end, what came of the steps so far."""

    folder: Path
    deadline: float
    versions: dict[str, object]
    toolkit: Toolkit | None
    results: list[Result] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def capability(self) -> str | None:
        """The compute capability of the first device, or None without one."""
        devices = self.versions["devices"]
        return str(devices[0]["capability"]) if isinstance(devices, list) and devices else None

    def command(self, step: str, command: list[object], limit: float, **environment: str) -> bool:
        """Runs a command as (part of) a step, at most ``limit`` seconds and not beyond the deadline; its output goes to the log."""
        result = Result(step)
        self.results.append(result)
        limit = min(limit, self.deadline - time.monotonic())
        if limit < 3:
            result.detail = "no time was left"
            return False
        print(f"{step} ...", flush=True)
        began = time.monotonic()
        text = [str(part) for part in command]
        process = subprocess.Popen(
            text, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
            result.status = "ok" if process.returncode == 0 else "failed"
            result.detail = "" if process.returncode == 0 else f"exit status {process.returncode}: {last_line(output)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            result.status, result.detail = "timed out", f"after {limit:.0f} s: {last_line(output)}"
        result.seconds = round(time.monotonic() - began, 1)
        with self.lock:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"==== {step}: {' '.join(text)}\n{output}\n==== {step}: {result.status} after {result.seconds} s\n\n")
            print(f"    {step}: {result.status} after {result.seconds} s {result.detail}", flush=True)
            self.save()
        return result.status == "ok"

    def together(self, *steps: Callable[[], object]) -> None:
        """Runs steps that nobody times side by side, as the cores permit."""
        with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            for future in [pool.submit(step) for step in steps]:
                future.result()

    def missing(self, step: str, why: str) -> None:
        """Notes a step that cannot be run."""
        self.results.append(Result(step, detail=why))
        print(f"{step}: not run: {why}", flush=True)

    def save(self) -> None:
        """Writes summary.json."""
        summary = {"versions": self.versions, "steps": [asdict(result) for result in self.results]}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def last_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def find_program(name: str, toolkit: Toolkit | None) -> str | None:
    """A program of the CUDA toolkit, or of another installation at hand."""
    folders = [] if toolkit is None else [toolkit.home / "bin", toolkit.home / "compute-sanitizer"]
    folders += [*Path("/usr/local").glob("cuda*/bin"), *Path("/opt/nvidia").glob("*/*"), *Path("/opt/nvidia").glob("*")]
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), None) or shutil.which(name)


# The steps, in this order: what tells most comes first.


def build_library(session: Session) -> None:
    """The package itself, in place, for the device; without one for all archs."""
    archs = {} if session.capability is None else {"TORCH_CUDA_ARCH_LIST": session.capability}
    session.command("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 300, PATCHCORE_EXT_CUDA="1", **archs)


def build_cpp_tests(session: Session) -> None:
    """The C++ tests of the kernels for a GPU; without one for the SIMT runner too."""
    build = [sys.executable, "tools/gpu_programs.py"]
    session.command("compile C++ tests for a GPU", [*build, "gpu", PROGRAMS / "gpu", session.capability or "9.0"], 150)
    if session.capability is None:
        session.command("compile C++ tests for the SIMT runner", [*build, "simt", PROGRAMS / "simt"], 150)


def build_all(session: Session) -> None:
    """Everything that is compiled."""
    session.together(lambda: build_library(session), lambda: build_cpp_tests(session))


def cpp_tests(session: Session) -> None:
    """The C++ tests of the kernels on the GPU; without one by the SIMT runner."""
    kind, where, limit = ("simt", "by the SIMT runner", 200) if session.capability is None else ("gpu", "on the GPU", 60)
    programs = sorted(path for path in (PROGRAMS / kind).glob("test_*") if path.suffix == "")
    if not programs:
        session.missing(f"C++ tests {where}", "they were not compiled")
    for program in programs:
        session.command(f"C++ {program.name} {where}", [program], limit)


def sass_report(session: Session) -> None:
    """Registers, spills and instructions."""
    archs = [session.capability] if session.capability else ["8.0", "9.0"]
    session.command("machine code", [sys.executable, "tools/sass.py", "--archs", *archs], 60)


def workers() -> list[str]:
    """The option for several processes, where pytest-xdist is installed."""
    found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    return ["-n", str(max(1, 3 * (os.cpu_count() or 1) // 4))] if found else []


def device_tests(session: Session) -> None:
    """The Python tests of what runs on a GPU."""
    files = [f"python_tests/{name}.py" for name in DEVICE_TESTS if (ROOT / "python_tests" / f"{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers(), *files]
    session.command("pytest on the GPU", command, 120, PATCHCORE_EXT_TEST_DEVICE="cuda", OMP_NUM_THREADS="2")


def checks(session: Session) -> None:
    """What needs no quiet machine."""
    on_device = [] if session.capability is None else [lambda: device_tests(session)]
    session.together(lambda: cpp_tests(session), lambda: sass_report(session), *on_device)


def benchmarks(session: Session) -> None:
    """Times against other libraries and against the machine's limits."""
    session.command("benchmark", [sys.executable, "-m", "benchmarks.bench_gpu", "--output", session.folder / "bench_gpu.json"], 150)


def sanitizers(session: Session) -> None:
    """compute-sanitizer over the C++ tests on the GPU."""
    program = find_program("compute-sanitizer", session.toolkit)
    if program is None:
        session.missing("sanitizers", "compute-sanitizer was not found; it comes with the CUDA toolkit")
        return
    steps: list[Callable[[], object]] = []
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        unwritten = {"PATCHCORE_GPU_UNWRITTEN": "1"} if tool == "initcheck" else {}
        for test, names in SANITIZED.items():
            command: list[object] = [program, "--tool", tool, "--error-exitcode", "9", PROGRAMS / "gpu" / test, *names]
            steps.append(functools.partial(session.command, f"sanitizer {tool} {test}", command, 90, **unwritten))
    session.together(*steps)


def other_tests(session: Session) -> None:
    """The rest of the Python tests."""
    files = sorted(f"python_tests/{path.name}" for path in (ROOT / "python_tests").glob("test_*.py") if path.stem not in DEVICE_TESTS)
    session.command("pytest, the rest", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers(), *files], 150, OMP_NUM_THREADS="2")


WITHOUT_GPU: dict[str, Callable[[Session], None]] = {"build": build_all, "checks": checks}
STEPS: dict[str, Callable[[Session], None]] = {
    **WITHOUT_GPU,
    "bench": benchmarks,
    "sanitizers": sanitizers,
    "rest": other_tests,
}


def versions(toolkit: Toolkit | None) -> dict[str, object]:
    """What the results depend on."""
    probed = json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    driver = None
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    nvcc = None if toolkit is None else {"home": str(toolkit.home), "version": "{}.{}".format(*toolkit.version)}
    here = {"python": platform.python_version(), "processor_cores": os.cpu_count(), "commit": commit, "driver": driver, "nvcc": nvcc}
    return {"date": datetime.datetime.now().isoformat(timespec="seconds"), **here, **probed}


def main() -> int:
    """Runs the steps and tells how they ended."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole ends by then (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    arguments = parser.parse_args()
    folder = (arguments.output or ROOT / "build" / "gpu-test" / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        toolkit: Toolkit | None = find_toolkit()
    except ToolkitError as error:
        print(f"gpu_test.py: {error}")
        toolkit = None
    session = Session(folder, began + 60 * arguments.minutes - 15, versions(toolkit), toolkit)
    print(json.dumps(session.versions))
    for name in arguments.only:
        if session.capability is None and name not in WITHOUT_GPU:
            print(f"No CUDA device is visible to torch: the steps from '{name}' on need one and were not run.")
            break
        STEPS[name](session)
    session.save()
    print(f"\n{'step':<45} {'status':<10} seconds")
    for result in session.results:
        print(f"{result.step:<45} {result.status:<10} {result.seconds:7.1f} {result.detail}")
    print(f"results: {folder}")
    if any(result.status != "ok" for result in session.results):
        return 1
    return 3 if session.capability is None else 0


if __name__ == "__main__":
    sys.exit(main())
