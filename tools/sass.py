"""What nvcc makes of the kernels, looked at without a GPU: registers, spills, and the instructions that have to be there or must not be.

    python tools/sass.py [--archs 7.5 8.0 9.0]

compiles csrc/core/cuda/*.cu to machine code and prints a table; python_tests/test_sass.py holds it against what the sources promise. Standard library only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_toolkit import Toolkit, ToolkitError, find_toolkit

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "core" / "cuda"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "--extended-lambda", f"-I{ROOT / 'csrc' / 'core'}")

REGISTERS_OF_MULTIPROCESSOR = 65536
MOST_REGISTERS = 255  # of a thread
MOST_THREADS = 1024  # of a block, where a kernel names no bound


@dataclass
class Kernel:
    """One kernel, compiled for one arch."""

    source: str  # such as nearest.cu
    arch: str  # such as 8.0
    symbol: str
    registers: int = 0
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    static_shared: int = 0
    functions: dict[str, Counter[str]] = field(default_factory=dict)  # opcodes of it and of what it calls, by symbol; empty without a disassembler

    @property
    def name(self) -> str:
        """Its name in the source."""
        return _name_of(self.symbol)

    @property
    def label(self) -> str:
        """Its name with the integers among its template arguments."""
        arguments = re.match(r"I(.*?)EE?v", self.symbol.split(self.name, 1)[1])
        numbers = re.findall(r"L[bi](\d+)E", arguments.group(0)) if arguments else []
        return self.name + (f"<{', '.join(numbers)}>" if numbers else "")

    def count(self, opcode: str, function: str = "") -> int:
        """Instructions of this opcode, its suffixes aside, in it and all that it calls, or only in those with ``function`` in their names."""
        parts = [opcodes for symbol, opcodes in self.functions.items() if function in symbol.rsplit("$", 1)[-1]]
        return sum(number for opcodes in parts for name, number in opcodes.items() if not opcode or name.split(".")[0] == opcode)


def _name_of(symbol: str) -> str:
    match = re.search(r"[a-z_]+_kernel", symbol)
    return match.group(0) if match else symbol


def find_disassembler(toolkit: Toolkit) -> Path | None:
    """Nvdisasm, of the toolkit, on PATH, or the one that Triton brings."""
    found = [toolkit.home / "bin" / "nvdisasm"]
    on_path = shutil.which("nvdisasm")
    if on_path is not None:
        found.append(Path(on_path))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return next((path for path in found if path.exists()), None)


def compile_file(source: Path, arch: str, toolkit: Toolkit, disassembler: Path | None, folder: Path) -> list[Kernel]:
    """Compiles one file for one arch, and reads what the assembler tells and what the code is."""
    cubin = folder / f"{source.stem}-{arch}.cubin"
    command = [toolkit.nvcc, "-cubin", f"-arch=sm_{arch.replace('.', '')}", *FLAGS, "-Xptxas=-v", source, "-o", cubin]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ToolkitError(f"nvcc failed on {source.name} for {arch}:\n{result.stdout}{result.stderr}")
    kernels = parse_assembler(result.stderr, source.name, arch)
    if disassembler is not None:
        code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        functions = parse_code(code)
        for kernel in kernels:
            kernel.functions = functions[kernel.symbol]
    return kernels


def parse_assembler(log: str, source: str, arch: str) -> list[Kernel]:
    """The kernels of the output of ``ptxas -v``. Spills of the functions that a kernel calls count as its own."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'", line)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        used = re.search(r"Used (\d+) registers", line)
        if entry:
            kernels.append(Kernel(source, arch, entry.group(1)))
        elif spills and kernels:
            kernels[-1].spill_stores += int(spills.group(1))
            kernels[-1].spill_loads += int(spills.group(2))
        elif used and kernels:
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].registers = int(used.group(1))
            kernels[-1].static_shared = int(shared.group(1)) if shared else 0
    return kernels


def parse_code(code: str) -> dict[str, dict[str, Counter[str]]]:
    """The opcodes in a disassembly, by kernel and function: what a kernel calls lies in its section, behind a label that begins with $."""
    kernels: dict[str, dict[str, Counter[str]]] = {}
    functions: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in code.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        label = re.match(r"(\$[\w$]+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line)
        if section:
            functions = kernels.setdefault(section.group(1), {})
            current = functions.setdefault(section.group(1), Counter())
        elif label:
            current = functions.setdefault(label.group(1), Counter())
        elif instruction:
            current[instruction.group(1)] += 1
    return kernels


def compile_kernels(jobs: Iterable[tuple[str, str]], toolkit: Toolkit, workers: int = 2) -> list[Kernel]:
    """The kernels of all (file name, arch), compiled ``workers`` at a time."""
    disassembler = find_disassembler(toolkit)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_file, CUDA / name, arch, toolkit, disassembler, Path(folder)) for name, arch in jobs]
        return [kernel for future in futures for kernel in future.result()]


def text_for(path: Path, arch: str) -> str:
    """A source as the compiler sees it for an arch: of ``#if ... __CUDA_ARCH__ < 800`` and the like one branch is left, other conditions are not looked at."""
    number = int(arch.replace(".", "")) * 10
    kept: list[str] = []
    branches: list[bool | None] = []  # of the conditions around the line: whether it is in the branch taken; None: not looked at
    for line in path.read_text(encoding="utf-8").splitlines():
        condition = re.match(r"\s*#if.*__CUDA_ARCH__ (<|>=) (\d+)\s*$", line)
        if condition:
            branches.append((number < int(condition.group(2))) == (condition.group(1) == "<"))
        elif re.match(r"\s*#if", line):
            branches.append(None)
        elif re.match(r"\s*#else", line) and branches[-1] is not None:
            branches[-1] = not branches[-1]
        elif re.match(r"\s*#endif", line):
            branches.pop()
        elif False not in branches:
            kept.append(line)
    return "\n".join(kept)


def constants(name: str, arch: str) -> dict[str, int]:
    """The ``constexpr int`` constants that a file sees in this folder's headers and its own text, where they are plain arithmetic."""
    known: dict[str, int] = {}
    for path in [*sorted(CUDA.glob("*.cuh")), CUDA / name] * 2:  # twice: in whatever order they depend on each other
        for declaration in re.findall(r"^constexpr int ([^;{}]+);", text_for(path, arch), flags=re.MULTILINE):
            for part in declaration.split(", "):
                constant, _, expression = part.partition(" = ")
                value = evaluate(expression, known)
                if value is not None:
                    known[constant.strip()] = value
    return known


def evaluate(expression: str, known: dict[str, int]) -> int | None:
    """The value of an arithmetic expression of integers and known names, or None."""
    text = re.sub(r"\bk\w+", lambda match: str(known.get(match.group(0), "?")), expression)
    if not re.fullmatch(r"[\d\s+*/()<-]+", text):
        return None
    return int(eval(text.replace("/", "//"), {"__builtins__": {}}))


def most_registers(name: str, arch: str) -> dict[str, int]:
    """The registers that each kernel of a file may use for the launches that its launch bounds promise."""
    text = text_for(CUDA / name, arch)
    known, limits = constants(name, arch), {}
    for bounds, kernel in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\(([^)]*)\)\s+)?(\w+)\(", text):
        values = [evaluate(part, known) for part in bounds.split(",")] if bounds else [MOST_THREADS]
        if None in values:
            raise ToolkitError(f"the launch bounds of {kernel} in {name} are no plain arithmetic: {bounds}.")
        threads, blocks = int(values[0] or 0), int(values[1] or 0) if len(values) > 1 else 1
        limits[kernel] = min(MOST_REGISTERS, REGISTERS_OF_MULTIPROCESSOR // (threads * blocks) // 8 * 8)
    return limits


def table(kernels: Sequence[Kernel]) -> str:
    """A line for each kernel, as Markdown."""
    lines = ["| kernel | file | arch | registers | limit | spill bytes | IMMA | instructions |", "|---|---|---|---|---|---|---|---|"]
    for kernel in kernels:
        limit = most_registers(kernel.source, kernel.arch)[kernel.name]
        spills = kernel.spill_stores + kernel.spill_loads
        imma, instructions = (kernel.count("IMMA"), kernel.count("")) if kernel.functions else ("", "")
        lines.append(f"| {kernel.label} | {kernel.source} | {kernel.arch} | {kernel.registers} | {limit} | {spills} | {imma} | {instructions} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["7.5", "8.0", "9.0"], help="compute capabilities")
    arguments = parser.parse_args()
    try:
        toolkit = find_toolkit()
        print(table(compile_kernels([(path.name, arch) for path in sorted(CUDA.glob("*.cu")) for arch in arguments.archs], toolkit)))
    except ToolkitError as error:
        print(f"sass.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
