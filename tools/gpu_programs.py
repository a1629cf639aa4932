"""Compiles the C++ tests of the CUDA kernels (csrc/tests/simt/test_cuda_*.cpp) without CMake: for the GPU with nvcc, or for the CPU with the SIMT runner.

    python tools/gpu_programs.py gpu|simt FOLDER [ARCH]

Standard library only.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_toolkit import Toolkit, find_toolkit, gencode_flags

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SIMT = CSRC / "tests" / "simt"
CORE_FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC / 'core'}", f"-I{CSRC / 'tests'}"]
ONLY_SIMT = {"test_cuda_codes", "test_cuda_limits"}  # the one calls kernels and reads their memory from the host, the other asks for a device of the runner


@dataclass(frozen=True)
class Step:
    """One command, and the file that it writes."""

    command: list[str]
    output: Path


def gpu_steps(folder: Path, toolkit: Toolkit, archs: Sequence[str]) -> list[Step]:
    """Objects for a GPU: the core and the tests by the C++ compiler, the kernels by nvcc."""
    compiler = os.environ.get("CXX", "c++")
    flags = [*CORE_FLAGS, "-DPATCHCORE_GPU", f"-I{toolkit.home / 'include'}"]
    steps = [compile_step(compiler, flags, source, folder) for source in [*core_sources(), *test_sources(ONLY_SIMT)]]
    # -lineinfo: compute-sanitizer names lines.
    nvcc = [*(flag for flag in CORE_FLAGS if not flag.startswith("-ff")), "--fmad=false", "--extended-lambda", "-lineinfo", *gencode_flags(archs)]
    return [*(compile_step(str(toolkit.nvcc), nvcc, source, folder) for source in kernel_sources()), *steps]


def simt_steps(folder: Path) -> list[Step]:
    """Objects for the CPU: kernels and tests alike by the C++ compiler, with the runner's cuda_runtime.h first on the include path."""
    compiler = os.environ.get("CXX", "c++")
    flags = [f"-I{SIMT}", *CORE_FLAGS, "-DPATCHCORE_SIMT", "-Wno-unknown-pragmas"]
    steps = [compile_step(compiler, flags, source, folder) for source in [*core_sources(), SIMT / "simt.cpp", *test_sources(set())]]
    return [*(compile_step(compiler, [*flags, "-x", "c++"], source, folder) for source in kernel_sources()), *steps]


def core_sources() -> list[Path]:
    """The CPU kernels: what the others are compared with."""
    return sorted((CSRC / "core" / "cpu").glob("*.cpp"))


def kernel_sources() -> list[Path]:
    """The CUDA kernels, the longest first."""
    return sorted((CSRC / "core" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)


def test_sources(without: set[str]) -> list[Path]:
    """The tests of the kernels."""
    return sorted(path for path in SIMT.glob("test_cuda_*.cpp") if path.stem not in without)


def compile_step(compiler: str, flags: Sequence[str], source: Path, folder: Path) -> Step:
    """Compiles one file."""
    output = folder / f"{source.parent.name}-{source.stem}.o"
    return Step([compiler, *flags, "-c", str(source), "-o", str(output)], output)


def run_steps(steps: Sequence[Step]) -> None:
    """Runs all steps, as many at a time as there are cores. Raises CalledProcessError with what the compiler printed."""

    def run(step: Step) -> None:
        result = subprocess.run(step.command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise subprocess.CalledProcessError(result.returncode, step.command, result.stdout, result.stderr)

    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(run, step) for step in steps]:
            future.result()


def build(kind: str, folder: Path, archs: Sequence[str] = ()) -> list[Path]:
    """The test programs, compiled into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    toolkit = find_toolkit() if kind == "gpu" else None
    steps = simt_steps(folder) if toolkit is None else gpu_steps(folder, toolkit, archs or toolkit.archs()[-1:])
    run_steps(steps)
    objects = [step.output for step in steps]
    links = []
    for source in test_sources(ONLY_SIMT if kind == "gpu" else set()):
        others = [path for path in objects if not path.name.startswith("simt-test_")]
        runtime = [] if toolkit is None else [str(toolkit.runtime), f"-Wl,-rpath,{toolkit.runtime.parent}"]
        own = folder / f"simt-{source.stem}.o"
        program = folder / source.stem
        links.append(Step([os.environ.get("CXX", "c++"), *map(str, [own, *others]), *runtime, "-pthread", "-o", str(program)], program))
    run_steps(links)
    return [step.output for step in links]


def main() -> int:
    """Compiles and names the programs."""
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("gpu", "simt"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        programs = build(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    except subprocess.CalledProcessError as error:
        print(" ".join(map(str, error.cmd)), error.output, error.stderr, sep="\n", file=sys.stderr)
        return 1
    print(*programs, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
