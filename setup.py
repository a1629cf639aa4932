"""Builds the native libraries of patchcore_ext; everything else about the package is in pyproject.toml.

``patchcore_ext._C`` holds the schemas and the CPU kernels, and ``patchcore_ext._C_cuda`` the CUDA kernels, so that a CPU-only torch loads the first and never
misses the second. Both use the LibTorch stable ABI: built once, they run on every torch >= 2.11.

Environment:
    PATCHCORE_EXT_CUDA: auto (default: CUDA kernels when there are any and nvcc is found), 0 (never), 1 (an error when they cannot be built).
    MAX_JOBS: compilers to run at a time.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

HERE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(HERE / "patchcore_ext" / "_version.py"))["__version__"]
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that loads these libraries

DEFINES = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("PATCHCORE_EXT_VERSION", f'"{VERSION}"')]
# -ffp-contract=off: the exactness contract forbids fused multiply-adds (csrc/core/platform.h).
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", f"-ffile-prefix-map={HERE}/=", "-g0"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xfatbin=-compress-all"]


def sources(*patterns: str) -> list[str]:
    """Source files relative to this folder, in a fixed order."""
    return sorted(str(path.relative_to(HERE)) for pattern in patterns for path in HERE.glob(pattern))


def headers() -> list[str]:
    """Everything that a changed header should rebuild."""
    return sources("csrc/core/**/*.h", "csrc/core/**/*.inc", "csrc/core/**/*.cuh", "csrc/bindings/*.h")


def cpu_extension() -> Extension:
    """``patchcore_ext._C``: schemas, CPU kernels, the Python module."""
    import pybind11

    bindings = ["csrc/bindings/schemas.cpp", "csrc/bindings/cpu.cpp", "csrc/bindings/module.cpp"]
    return CppExtension(
        name="patchcore_ext._C",
        sources=[*sources("csrc/core/cpu/*.cpp"), *bindings],
        depends=headers(),
        include_dirs=[str(HERE / "csrc" / "core"), pybind11.get_include()],
        define_macros=DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS},
    )


def cuda_extensions() -> list[Extension]:
    """``patchcore_ext._C_cuda``, or nothing, as PATCHCORE_EXT_CUDA says."""
    wish = os.environ.get("PATCHCORE_EXT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: expected PATCHCORE_EXT_CUDA to be auto, 0 or 1, got {wish!r}.")
    kernels = sources("csrc/core/cuda/*.cu")
    missing = "this version has no CUDA kernels yet" if not kernels else "nvcc was not found (set CUDA_HOME)" if CUDA_HOME is None else None
    if wish == "0" or (wish == "auto" and missing):
        return []
    if missing:
        raise SystemExit(f"setup.py: PATCHCORE_EXT_CUDA=1, but {missing}.")
    return [
        CUDAExtension(
            name="patchcore_ext._C_cuda",
            sources=[*kernels, "csrc/bindings/cuda.cpp"],
            depends=headers(),
            include_dirs=[str(HERE / "csrc" / "core")],
            define_macros=[*DEFINES, ("USE_CUDA", None)],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        )
    ]


setup(ext_modules=[cpu_extension(), *cuda_extensions()], cmdclass={"build_ext": BuildExtension})
