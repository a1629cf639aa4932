"""Builds the native libraries of patchcore_ext; everything else about the package is in pyproject.toml.

``patchcore_ext._C`` holds the schemas and the CPU kernels, and ``patchcore_ext._C_cuda`` the CUDA kernels, so that a CPU-only torch loads the first and never
misses the second. Both use the LibTorch stable ABI: built once, they run on every torch >= 2.11.

Environment:
    PATCHCORE_EXT_CUDA: auto (default: CUDA kernels when torch has CUDA and nvcc is found), 0 (never), 1 (an error when they cannot be built).
    TORCH_CUDA_ARCH_LIST: compute capabilities to compile for, such as "9.0" or "native" (the GPUs of this machine: the quickest build); by default all.
    CUDA_HOME: a CUDA toolkit; by default tools/cuda_toolkit.py looks for one.
    MAX_JOBS: compilers to run at a time.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import torch
from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(HERE / "patchcore_ext" / "_version.py"))["__version__"]
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that loads these libraries

DEFINES = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("PATCHCORE_EXT_VERSION", f'"{VERSION}"')]
# -ffp-contract=off and --fmad=false: the exactness contract forbids fused multiply-adds (csrc/core/platform.h).
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", f"-ffile-prefix-map={HERE}/=", "-g0"]
# --threads 2: the last file does not compile for one arch after the other while the other cores wait.
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "--extended-lambda", "-Xfatbin=-compress-all", "--threads=2", "-Xcompiler=-fvisibility=hidden"]


def cuda_toolkit() -> ModuleType:
    """tools/cuda_toolkit.py; builders do not put this folder on sys.path."""
    spec = importlib.util.spec_from_file_location("cuda_toolkit", HERE / "tools" / "cuda_toolkit.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*patterns: str) -> list[str]:
    """Source files relative to this folder, in a fixed order."""
    return sorted(str(path.relative_to(HERE)) for pattern in patterns for path in HERE.glob(pattern))


def headers(*patterns: str) -> list[str]:
    """Everything that a changed header should rebuild."""
    return sources("csrc/core/*.h", "csrc/bindings/*.h", *patterns)


def include_dirs() -> list[str]:
    """The core, and pybind11; torch brings a copy of the latter, which serves where the package is not installed."""
    try:
        import pybind11
    except ModuleNotFoundError:
        return [str(HERE / "csrc" / "core")]
    return [str(HERE / "csrc" / "core"), pybind11.get_include()]


def cpu_extension() -> Extension:
    """``patchcore_ext._C``: schemas, CPU kernels, the Python module."""
    from torch.utils.cpp_extension import CppExtension

    bindings = ["csrc/bindings/schemas.cpp", "csrc/bindings/cpu.cpp", "csrc/bindings/module.cpp"]
    return CppExtension(
        name="patchcore_ext._C",
        sources=[*sources("csrc/core/cpu/*.cpp"), *bindings],
        depends=headers("csrc/core/cpu/*.h", "csrc/core/cpu/*.inc"),
        include_dirs=include_dirs(),
        define_macros=DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS},
    )


def cuda_extension(tools: ModuleType) -> Extension:
    """``patchcore_ext._C_cuda``. Raises tools.ToolkitError where it cannot be built."""
    if torch.version.cuda is None:
        raise tools.ToolkitError("this torch was built without CUDA; install one with CUDA first.")
    toolkit = tools.find_toolkit(cuda_of_torch=torch.version.cuda)
    visible = [f"{major}.{minor}" for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))]
    archs = tools.choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), toolkit.archs(), visible)
    os.environ["CUDA_HOME"] = str(toolkit.home)  # read when torch.utils.cpp_extension is imported
    from torch.utils.cpp_extension import CUDAExtension

    told = [("PATCHCORE_EXT_CUDA_ARCHS", f'"{";".join(archs)}"'), ("PATCHCORE_EXT_CUDA_TOOLKIT", '"{}.{}"'.format(*toolkit.version))]
    extension = CUDAExtension(
        name="patchcore_ext._C_cuda",
        sources=[*sources("csrc/core/cuda/*.cu"), "csrc/bindings/cuda.cpp", "csrc/bindings/module_cuda.cpp"],
        depends=headers("csrc/core/cuda/*.h", "csrc/core/cuda/*.cuh"),
        include_dirs=include_dirs(),
        define_macros=[*DEFINES, *told, ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *tools.gencode_flags(archs)]},
    )
    # By its full name: the packages of PyPI bring no libcudart.so. torch has loaded this very library when ours is.
    extension.libraries.remove("cudart")
    extension.library_dirs.append(str(toolkit.runtime.parent))
    extension.extra_link_args.append(f"-l:{toolkit.runtime.name}")
    print(f"setup.py: CUDA kernels by nvcc {toolkit.version[0]}.{toolkit.version[1]} in {toolkit.home} for {';'.join(archs)}")
    return extension


def extensions() -> list[Extension]:
    """What PATCHCORE_EXT_CUDA asks for."""
    wish = os.environ.get("PATCHCORE_EXT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: expected PATCHCORE_EXT_CUDA to be auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        return [cpu_extension()]
    tools = cuda_toolkit()
    try:
        cuda = cuda_extension(tools)  # first: it sets CUDA_HOME
    except tools.ToolkitError as error:
        if wish == "1":
            raise SystemExit(f"setup.py: PATCHCORE_EXT_CUDA=1, but {error}") from None
        print(f"setup.py: no CUDA kernels: {error}")
        return [cpu_extension()]
    return [cpu_extension(), cuda]


if __name__ == "__main__":
    EXTENSIONS = extensions()
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension})
