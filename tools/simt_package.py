"""Builds a copy of the package for tests, whose ops run the CUDA kernels' own sources on the CPU.

    python tools/simt_package.py build/simt-package && PYTHONPATH=build/simt-package python -m pytest python_tests/test_ops.py

``patchcore_ext._C`` of the copy is made of csrc/bindings/cuda.cpp and csrc/core/cuda, compiled for the SIMT runner (csrc/tests/simt), instead of the CPU's
kernels; the Python code is the same. So the bindings, and what Python does differently for CUDA tensors, are tested without a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def compile_flags() -> list[str]:
    """Flags for every source: includes, definitions, options."""
    import pybind11
    from torch.utils.cpp_extension import include_paths

    includes = [ROOT / "csrc" / "tests" / "simt", ROOT / "csrc" / "core", *include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
    version = (ROOT / "patchcore_ext" / "_version.py").read_text(encoding="utf-8").split('"')[-2]
    defines = ["PATCHCORE_SIMT", "TORCH_TARGET_VERSION=0x020b000000000000", f'PATCHCORE_EXT_VERSION="{version}"']
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    return [*options, *(f"-D{name}" for name in defines), *(f"-I{path}" for path in includes)]


def build(folder: Path) -> None:
    """Builds the copy in ``folder``; what is newer than its sources stays."""
    import torch

    core = [*(ROOT / "csrc" / "core").glob("cuda/*.cu"), *(ROOT / "csrc" / "core").glob("cpu/*.cpp"), ROOT / "csrc" / "tests" / "simt" / "simt.cpp"]
    sources = sorted([*core, *((ROOT / "csrc" / "bindings" / f"{name}.cpp") for name in ("schemas", "cuda", "module"))])
    newest_header = max(path.stat().st_mtime for pattern in ("*.h", "*.cuh", "*.inc") for path in (ROOT / "csrc").rglob(pattern))
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    flags = compile_flags()

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.parent.name}_{source.name}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
    package = folder / "patchcore_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "patchcore_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    libraries = Path(torch.__file__).parent / "lib"
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(["g++", "-shared", *map(str, compiled), *link, "-o", str(target)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
