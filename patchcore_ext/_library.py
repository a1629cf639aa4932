"""Loads the native libraries, once, and tells what they can do.

Importing this module registers ``torch.ops.patchcore_ext``. A missing or foreign ``_C`` is an ImportError with the loader's words and the command that mends
it; a failing ``_C_cuda`` leaves the CPU kernels whole and is explained by :func:`build_info`.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: it loads libc10, which the native libraries need

from ._version import __version__

_HERE = Path(__file__).resolve().parent
_REBUILD = "rebuild with `pip install --no-build-isolation -e .` in a checkout, or reinstall the package"


def _load(name: str) -> ModuleType:
    """The native module ``patchcore_ext.<name>``, from this very folder and of this very version."""
    full_name = f"{__package__}.{name}"
    if full_name not in sys.modules and name == "_C" and hasattr(torch.ops.patchcore_ext, "nearest_neighbors"):
        raise ImportError("patchcore_ext: another copy of this package is loaded in this process; keep one of them on sys.path.")
    try:
        module = importlib.import_module(full_name)
    except ImportError as error:
        raise ImportError(f"patchcore_ext: the native library {name} did not load ({error}); {_REBUILD}.") from error
    folder = Path(str(module.__file__)).resolve().parent
    if folder != _HERE:
        raise ImportError(f"patchcore_ext: {name} was loaded from {folder}, the package from {_HERE}: two installations are mixed; uninstall one.")
    return module


def _load_cuda() -> str | None:
    """Loads the CUDA kernels when they are there; returns why there are none, or None."""
    if not any(_HERE.glob("_C_cuda*.so")):
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        module = _load("_C_cuda")
    except (ImportError, OSError) as error:
        return str(error)
    if module.version() != __version__:
        return f"patchcore_ext: the CUDA kernels are of version {module.version()}, the package of {__version__}; {_REBUILD}"
    return None


_C = _load("_C")
if _C.version() != __version__:
    raise ImportError(f"patchcore_ext: the native library is of version {_C.version()}, the package of {__version__}; {_REBUILD}.")
_forced = os.environ.get("PATCHCORE_EXT_CPU_LEVEL")
if _forced is not None and _forced not in _C.available_cpu_levels():
    raise ImportError(
        f"patchcore_ext: expected PATCHCORE_EXT_CPU_LEVEL to be a level of this processor ({', '.join(_C.available_cpu_levels())}), got {_forced!r}."
    )
if _forced is not None and _C.cpu_level() != _forced:
    raise ImportError(f"patchcore_ext: the system does not lend this process what PATCHCORE_EXT_CPU_LEVEL={_forced} needs; take a lower level.")
_cuda_problem = _load_cuda()


def _covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these compute capabilities runs on a device: of its major version and not newer, or as PTX on all that are newer."""
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        assert match is not None, arch
        built = int(match[1]), int(match[2])
        if built == capability or (not match[3] and built <= capability and (match[4] or built[0] == capability[0])):
            return True
    return False


def _cuda_archs() -> list[str]:
    return [] if _cuda_problem is not None else str(sys.modules[f"{__package__}._C_cuda"].archs()).split(";")


@functools.lru_cache
def _device_problem(index: int) -> str | None:
    """Why the loaded CUDA kernels cannot run on a device, or None."""
    capability = torch.cuda.get_device_capability(index)
    archs = _cuda_archs()
    if _covers(archs, capability):
        return None
    major, minor = capability
    name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
    if capability < (7, 5):
        return f"the CUDA kernels need compute capability 7.5 or newer, {name} is older"
    return f'this build has CUDA kernels for {", ".join(archs)}, none for {name}; rebuild with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'


def _no_device() -> str | None:
    """Why torch sees no CUDA device, in the driver's or torch's words; None when it sees one."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"torch sees no CUDA device: {str(error).strip().splitlines()[0]}"
    return "torch sees no CUDA device"


# Asked once: torch.compile does not look into the extension, and would take the number of rows that it is asked with for a constant.
_IS_SIMT = bool(_C.is_simt())
_STAGE_CODES: list[int] = list(_C.stage_codes())
_FEWEST_STAGED_ROWS = int(_C.fewest_staged_rows())


def runs_cuda_kernels(device: torch.device) -> bool:
    """Whether tensors of ``device`` go to the CUDA kernels, whose int8 copies are laid out in their own way.

    On the CPU they do in the build for tests (tools/simt_package.py), where the CUDA sources run on it.
    """
    return device.type == "cuda" or _IS_SIMT


def stage_codes(rows: int) -> list[int]:
    """Codes of a prefix behind which the search in so many rows asks whether any is left (csrc/core/cpu/stages.h); none where it scans them all at once."""
    return _STAGE_CODES if rows >= _FEWEST_STAGED_ROWS else []


def scan_step() -> int:
    """Codes of a prefix that the search compares at once on this processor: a multiple is best."""
    return int(_C.scan_step())


def stage_bytes() -> int:
    """Bytes of a sum in such a scan on this processor."""
    return int(_C.stage_bytes())


def look_up_nanoseconds(dim: int) -> float:
    """About what this processor takes to compare the int8 codes of two rows ``[dim]``."""
    return float(_C.look_up_nanoseconds(dim))


def kernel_problem(device: torch.device) -> str | None:
    """Why the ops cannot run on tensors of ``device``, with the remedy, or None when they can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are kernels for CPU tensors, none for {device.type}; move the tensor with .cpu()"
    problem = _cuda_problem
    if problem is None and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        problem = _no_device()
    if problem is None:
        problem = _device_problem(torch.cuda.current_device() if device.index is None else device.index)
    return None if problem is None else f"{problem}; move the tensor with .cpu()"


def _cuda_devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        problem = _cuda_problem or _device_problem(index)
        devices.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}", "problem": problem})
    return devices


def build_info() -> dict[str, Any]:
    """What was built, what is in use, and what is missing and why.

    Returns:
        A dict of plain values (JSON-ready): ``version``, ``torch``, ``compiler``, ``cpu_level`` (the instruction set in use), ``cpu_levels`` (those that this
        processor can run, slowest first), ``threads`` (torch's intra-op threads), ``cuda_kernels`` (bool: built and loaded), ``cuda_problem`` (why not, or
        None), ``cuda_archs`` (compute capabilities that the kernels were compiled for, "+PTX": newer ones too), ``cuda_toolkit`` (the version that compiled
        them, or None), ``cuda_available`` (bool: torch sees a CUDA device), ``cuda_unavailable`` (why not, or None), ``cuda_devices`` (``name``,
        ``capability``, and ``problem``: why the kernels do not run on it, or None).

    Example:
        >>> import patchcore_ext
        >>> patchcore_ext.build_info()["version"] == patchcore_ext.__version__
        True
    """
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "compiler": _C.compiler(),
        "cpu_level": _C.cpu_level(),
        "cpu_levels": list(_C.available_cpu_levels()),
        "threads": torch.get_num_threads(),
        "cuda_kernels": _cuda_problem is None,
        "cuda_problem": _cuda_problem,
        "cuda_archs": _cuda_archs(),
        "cuda_toolkit": None if _cuda_problem is not None else sys.modules[f"{__package__}._C_cuda"].toolkit(),
        "cuda_available": torch.cuda.is_available(),
        "cuda_unavailable": _no_device(),
        "cuda_devices": _cuda_devices(),
    }
