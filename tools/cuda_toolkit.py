"""Finds nvcc and what belongs to it, and decides for which GPUs to compile. Standard library only; used by setup.py, the tests and gpu_test.py.

Looked for in this order: CUDA_HOME or CUDA_PATH (which, when set, decide alone), nvcc on PATH, /usr/local/cuda, and the packages of PyPI (NVCC_PACKAGES).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

NVCC_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")

# Machine code for GPUs since Turing, and PTX for those to come. Ada (8.9) runs 8.6's, as it does torch's: the kernels use nothing that it has and Ampere lacks.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
OLDEST_ARCH = (7, 5)  # the first with int8 tensor products (csrc/core/cuda/mma.cuh)

PARTS = ("bin/nvcc", "bin/ptxas", "nvvm/bin/cicc", "include/cuda_runtime.h", "include/crt/host_config.h")


class ToolkitError(Exception):
    """Why there is no CUDA compiler to work with, as a sentence with the remedy."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler: home holds bin/nvcc and include/."""

    home: Path
    version: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        """The compiler itself, not a wrapper."""
        return self.home / "bin" / "nvcc"

    @property
    def runtime(self) -> Path:
        """The runtime library, named so that one link line serves installations with and without a development symlink."""
        name = f"libcudart.so.{self.version[0]}"
        folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        for folder in folders:
            if (self.home / folder / name).exists():
                return self.home / folder / name
        raise ToolkitError(f"{name} is in none of {', '.join(folders)} of {self.home}; install the CUDA runtime of this version.")

    def archs(self) -> list[str]:
        """The compute capabilities that this nvcc can compile for, such as "9.0"."""
        listing = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return [f"{name[:-1]}.{name[-1]}" for name in re.findall(r"^compute_(\d+)$", listing, flags=re.MULTILINE)]


def how_to_get(major: int | str = 13) -> str:
    """The command that fetches a compiler."""
    return "set CUDA_HOME to a CUDA toolkit, or `pip install " + " ".join(f'"{package}=={major}.*"' for package in NVCC_PACKAGES) + "`"


def find_toolkit(environment: Mapping[str, str] = os.environ, cuda_of_torch: str | None = None) -> Toolkit:
    """The CUDA compiler to build with.

    Args:
        environment: Where CUDA_HOME, CUDA_PATH and PATH are looked up.
        cuda_of_torch: ``torch.version.cuda``; a compiler of another major version is refused. None: any will do.

    Raises:
        ToolkitError: There is none, or it is incomplete, or of another major version than torch's.
    """
    wanted = cuda_of_torch.split(".")[0] if cuda_of_torch else "13"
    home = _find_home(environment)
    if home is None:
        raise ToolkitError(f"nvcc was not found; {how_to_get(wanted)}.")
    missing = [part for part in PARTS if not (home / part).exists()]
    if missing:
        raise ToolkitError(f"the CUDA toolkit in {home} lacks {', '.join(missing)}; {how_to_get(wanted)}.")
    toolkit = Toolkit(home, _version(home / "bin" / "nvcc"))
    if cuda_of_torch and str(toolkit.version[0]) != wanted:
        raise ToolkitError(
            f"torch was built for CUDA {cuda_of_torch}, the nvcc in {home} is of CUDA {toolkit.version[0]}.{toolkit.version[1]}: "
            f"their major versions have to be the same; {how_to_get(wanted)}."
        )
    return toolkit


def _find_home(environment: Mapping[str, str]) -> Path | None:
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if named:
        return Path(named) if (Path(named) / "bin" / "nvcc").exists() else None
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    if on_path is not None:
        return _home_of(Path(on_path))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return Path("/usr/local/cuda").resolve()
    spec = importlib.util.find_spec("nvidia")
    folders = sorted(folder for root in (spec.submodule_search_locations or [] if spec else []) for folder in Path(root).glob("cu[0-9]*"))
    return next((folder for folder in reversed(folders) if (folder / "bin" / "nvcc").exists()), None)


def _home_of(nvcc: Path) -> Path:
    """The toolkit of an nvcc, which may be a wrapper script in a folder without headers: a dry run tells where the real one lives."""
    told = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, flags=re.MULTILINE)
    return Path(os.path.normpath(top.group(1).strip())) if top else nvcc.resolve().parents[1]


def _version(nvcc: Path) -> tuple[int, int]:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", told.stdout)
    if release is None:
        raise ToolkitError(f"`{nvcc} --version` names no release: {(told.stdout + told.stderr).strip()[:200] or 'it prints nothing'}.")
    return int(release.group(1)), int(release.group(2))


def choose_archs(wish: str | None, known: Iterable[str], visible: Iterable[str] = ()) -> list[str]:
    """The compute capabilities to compile for, such as ["9.0", "12.0+PTX"].

    Args:
        wish: TORCH_CUDA_ARCH_LIST: numbers separated by semicolons or spaces, "native" for the visible GPUs; None or empty: DEFAULT_ARCHS.
        known: What the compiler can compile for.
        visible: Capabilities of the GPUs of this machine.

    Raises:
        ToolkitError: A capability that is none, or none is left.
    """
    known = set(known)
    if not wish:
        archs = [arch for arch in DEFAULT_ARCHS if _number(arch) in known]
        if not archs:
            raise ToolkitError(f"this nvcc compiles for none of {', '.join(DEFAULT_ARCHS)}; it knows {', '.join(sorted(known, key=_order)) or 'nothing'}.")
        return archs if archs[-1].endswith("+PTX") else [*archs[:-1], archs[-1] + "+PTX"]
    names = sorted(set(visible), key=_order) if wish.strip().lower() == "native" else re.split(r"[;,\s]+", wish.strip(" ;,"))
    if not names:
        raise ToolkitError("TORCH_CUDA_ARCH_LIST is native, but no GPU is visible; name compute capabilities, such as 8.0;9.0+PTX.")
    archs = []
    for name in dict.fromkeys(names):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ToolkitError(f"expected TORCH_CUDA_ARCH_LIST to be compute capabilities such as 8.0;9.0+PTX, got {name!r}.")
        if _order(name) < OLDEST_ARCH:
            continue  # lists made for many packages name GPUs that have no int8 tensor cores
        if re.sub("[af]$", "", _number(name)) not in known:
            raise ToolkitError(f"this nvcc cannot compile for compute capability {name}; it knows {', '.join(sorted(known, key=_order))}.")
        archs.append(name)
    if not archs:
        raise ToolkitError(f"the kernels need compute capability 7.5 or newer; TORCH_CUDA_ARCH_LIST is {wish!r}.")
    return archs


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """The flags of nvcc for capabilities as choose_archs gives them."""
    flags = []
    for arch in archs:
        number = _number(arch).replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _number(arch: str) -> str:
    return arch.removesuffix("+PTX")


def _order(arch: str) -> tuple[int, int]:
    major, minor = re.sub("[af]$", "", _number(arch)).split(".")
    return int(major), int(minor)
