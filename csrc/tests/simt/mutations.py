"""Are the tests of the CUDA kernels worth their time? Breaks the kernels on purpose, one place at a time, and expects a test to fail.

    python csrc/tests/simt/mutations.py [--only PATTERN] [--list] [--jobs 2]      (make mutations)

Deleted are every barrier, fence and wait of csrc/core/cuda, found by scanning, so that a new one cannot be forgotten; and TABLE says what else is broken: the
terms of the bounds, the rules for ties, what memory is set to before it is used. An entry is the file, a text that occurs in it once, and what takes its
place. Where no test can show the difference the entry says why, and it is expected to survive. Errors: one that survives without a reason, a reason for
what a test does show, a text that is not found once.

The kernels are a shared library here, whose inline functions are its own: the tests, and the CPU kernels that they compare with, keep the headers as they are.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations_table import BARRIERS_THAT_DO_NOT_SHOW, TABLE

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "mutations"
CORE, SIMT = ROOT / "csrc" / "core", ROOT / "csrc" / "tests" / "simt"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DPATCHCORE_SIMT", "-fPIC", "-fvisibility-inlines-hidden"]
BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|__threadfence\(\);|cp_async_wait<[^>;]*>\(\);")
MOST_SECONDS = 120  # of CPU for a test; what hangs has failed
UNITS = sorted(path.stem for path in (CORE / "cuda").glob("*.cu"))
# Which tests a file's mutations run, those that show them soonest first.
TESTS_OF_FILE = {
    "filter.h": ["test_filter", "test_filter_float", "test_cuda_codes", "test_cuda_coreset", "test_cuda_knn"],
    "cuda/codes.cu": ["test_cuda_codes", "test_cuda_knn"],
    "cuda/codes.cuh": ["test_cuda_codes", "test_cuda_knn"],
    "cuda/scales.cu": ["test_cuda_codes", "test_cuda_knn"],
    "cuda/views.cuh": ["test_cuda_codes", "test_cuda_knn"],
    "cuda/candidates.cu": ["test_cuda_coreset"],
    "cuda/chain.cuh": ["test_cuda_coreset"],
    "cuda/coreset.cu": ["test_cuda_coreset"],
    "cuda/update.cu": ["test_cuda_coreset"],
    "cuda/all_pairs.cu": ["test_cuda_knn"],
    "cuda/image_score.cu": ["test_cuda_knn"],
    "cuda/nearest.cu": ["test_cuda_knn"],
    "cuda/seeds.cu": ["test_cuda_knn"],
    "cuda/sorted_list.cuh": ["test_cuda_knn"],
    "cuda/projection.cu": ["test_cuda_projection"],
}
OF_THE_HEADER = {"test_filter", "test_filter_float"}  # alone: they are compiled anew
ALL_TESTS = ["test_cuda_knn", "test_cuda_coreset"]


@dataclass(frozen=True)
class Mutation:
    """One place that is broken: `file` (below csrc/core) with `length` characters at `begin` replaced."""

    file: str
    begin: int
    length: int
    replacement: str
    equivalent: str | None

    def text(self) -> str:
        """Where it is and what it does, in a line."""
        source = (CORE / self.file).read_text()
        line = source.count("\n", 0, self.begin) + 1
        old = source[self.begin : self.begin + self.length]
        return f"{self.file}:{line}: {' '.join(old.split())} -> {' '.join(self.replacement.split()) or 'nothing'}"


def fail(message: str) -> None:
    """Stops with a message."""
    sys.exit(f"mutations.py: {message}")


def place_of(file: str, text: str) -> int:
    """Where a text begins that occurs once."""
    source = (CORE / file).read_text()
    if source.count(text) != 1:
        fail(f"expected {text!r} once in {file}, found it {source.count(text)} times: the table has to follow the sources.")
    return source.index(text)


def all_mutations() -> list[Mutation]:
    """All barriers, then the table."""
    reasons = {(file, place_of(file, text)): reason for file, text, reason in BARRIERS_THAT_DO_NOT_SHOW}
    mutations = []
    for path in sorted((CORE / "cuda").iterdir()):
        file = f"cuda/{path.name}"
        if path.name == "mma.cuh":  # the instructions themselves, which have twins under test
            continue
        for match in BARRIER.finditer(path.read_text()):
            reason = reasons.pop((file, match.start()), None)
            mutations.append(Mutation(file, match.start(), len(match.group()), ";", reason))
    if reasons:
        fail(f"no barrier begins at {sorted(reasons)}: the table has to follow the sources.")
    for file, text, replacement, *reason in TABLE:
        mutations.append(Mutation(file, place_of(file, text), len(text), replacement, reason[0] if reason else None))
    return mutations


def call(command: list[str | Path]) -> None:
    """Runs a compiler, quietly unless it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")


def compile_unit(source: Path, to: Path, core: Path, level: str) -> None:
    """One object file, with the headers of `core`."""
    includes = [f"-I{SIMT}", f"-I{core}", f"-I{SIMT.parent}"]
    call([os.environ.get("CXX", "g++"), level, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", to])


def link_kernels(units: list[Path], to: Path) -> None:
    """The kernels and their runner as a shared library."""
    call([os.environ.get("CXX", "g++"), "-shared", "-Wl,-soname,libkernels.so", "-o", to, BUILD / "simt.o", *units])


def included_in(core: Path, unit: str) -> set[str]:
    """The files of csrc/core that a unit is made of, itself included."""
    command = [os.environ.get("CXX", "g++"), "-MM", *FLAGS, f"-I{SIMT}", f"-I{core}", "-x", "c++", core / "cuda" / f"{unit}.cu"]
    made_of = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").split()[1:]
    paths = [Path(name).resolve() for name in made_of]
    return {str(path.relative_to(core)) for path in paths if path.is_relative_to(core)}


def build_once(jobs: int) -> dict[str, set[str]]:
    """The kernels as they are, and the tests against them. Returns the files that each unit is made of."""
    BUILD.mkdir(parents=True, exist_ok=True)
    tests = sorted(SIMT.glob("test_cuda_*.cpp"))
    call(["cmake", "-S", ROOT, "-B", ROOT / "build" / "core", "-G", "Ninja"])
    call(["cmake", "--build", ROOT / "build" / "core", "-j", str(jobs), "--target", "patchcore_core"])
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(compile_unit, SIMT / "simt.cpp", BUILD / "simt.o", CORE, "-O2")]
        work += [pool.submit(compile_unit, CORE / "cuda" / f"{unit}.cu", BUILD / f"{unit}.o", CORE, "-O1") for unit in UNITS]
        work += [pool.submit(compile_unit, test, BUILD / f"{test.stem}.o", CORE, "-O1") for test in tests]
        for one in work:
            one.result()
    link_kernels([BUILD / f"{unit}.o" for unit in UNITS], BUILD / "libkernels.so")
    core_library = ROOT / "build" / "core" / "libpatchcore_core.a"
    for test in tests:
        call([os.environ.get("CXX", "g++"), "-o", BUILD / test.stem, BUILD / f"{test.stem}.o", BUILD / "libkernels.so", core_library, "-pthread"])
    return {unit: included_in(CORE, unit) for unit in UNITS}


def limit() -> None:
    """In the process of a test, before it starts."""
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 10))  # SIGXCPU, which no one else sends; at the second limit SIGKILL
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def first_failure(test: Path, libraries: Path) -> str | None:
    """What fails first, or None."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([test, "--first"], capture_output=True, text=True, errors="replace", env=environment, preexec_fn=limit)
    if done.returncode in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT):  # somebody else's doing, and no evidence
        raise RuntimeError(f"{test.name} was ended from outside by signal {-done.returncode}")
    if done.returncode == 0:
        return None
    failed = re.findall(r"^FAIL (\w+)", done.stdout, re.MULTILINE)
    how = failed[0] if failed else f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["?"])[-1][:120]
    return f"{test.name}: {how}"


def try_mutation(mutation: Mutation, folder: Path, made_of: dict[str, set[str]]) -> str | None:
    """Builds and runs what is concerned in a folder of one's own; returns what showed the mutation, or None."""
    core = folder / "core"
    if not core.exists():
        shutil.copytree(CORE, core)
    path = core / mutation.file
    source = path.read_text()
    path.write_text(source[: mutation.begin] + mutation.replacement + source[mutation.begin + mutation.length :])
    try:
        units = []
        for unit in UNITS:
            changed = mutation.file in made_of[unit]
            if changed:
                compile_unit(core / "cuda" / f"{unit}.cu", folder / f"{unit}.o", core, "-O1")
            units.append((folder if changed else BUILD) / f"{unit}.o")
        link_kernels(units, folder / "libkernels.so")
        for name in TESTS_OF_FILE.get(mutation.file, ALL_TESTS):
            test = BUILD / name
            if name in OF_THE_HEADER:
                test = folder / name
                call([os.environ.get("CXX", "g++"), "-O1", *FLAGS, f"-I{core}", f"-I{SIMT.parent}", "-o", test, SIMT.parent / f"{name}.cpp", "-pthread"])
            failure = first_failure(test, folder)
            if failure is not None:
                return failure
        return None
    finally:
        path.write_text(source)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutations whose line of --list contains this regular expression")
    parser.add_argument("--list", action="store_true", help="name the mutations and stop")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutations = [mutation for mutation in all_mutations() if re.search(options.only, mutation.text())]
    if options.list:
        print("\n".join(mutation.text() for mutation in mutations))
        return
    began = time.monotonic()
    made_of = build_once(options.jobs)
    for test in sorted({name for names in [*TESTS_OF_FILE.values(), ALL_TESTS] for name in names} - OF_THE_HEADER):
        if (failure := first_failure(BUILD / test, BUILD)) is not None:
            fail(f"the kernels fail as they are, {failure}")
    folders: queue.Queue[Path] = queue.Queue()
    for job in range(options.jobs):
        shutil.rmtree(BUILD / f"job{job}", ignore_errors=True)
        (BUILD / f"job{job}").mkdir()
        folders.put(BUILD / f"job{job}")
    counts = {"shown": 0, "equivalent": 0, "SURVIVES": 0, "SHOWN AFTER ALL": 0, "DOES NOT RUN": 0}

    def one(mutation: Mutation) -> None:
        folder, start = folders.get(), time.monotonic()
        try:
            failure = try_mutation(mutation, folder, made_of)
            result = "equivalent" if failure is None and mutation.equivalent else "SURVIVES" if failure is None else "shown"
            if failure is not None and mutation.equivalent:
                result = "SHOWN AFTER ALL"
        except RuntimeError as error:
            failure, result = str(error), "DOES NOT RUN"
        finally:
            folders.put(folder)
        counts[result] += 1
        print(f"{result:>15} {time.monotonic() - start:5.0f} s  {mutation.text()}  [{failure or mutation.equivalent or 'no test fails'}]", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, mutations))
    print(f"{len(mutations)} mutations in {time.monotonic() - began:.0f} s: " + ", ".join(f"{count} {result}" for result, count in counts.items() if count))
    if counts["SURVIVES"] or counts["SHOWN AFTER ALL"] or counts["DOES NOT RUN"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
