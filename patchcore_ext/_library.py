"""Loads the native libraries, once, and tells what they can do.

Importing this module registers ``torch.ops.patchcore_ext``. A missing or foreign ``_C`` is an ImportError with the loader's words and the command that mends
it; a failing ``_C_cuda`` leaves the CPU kernels whole and is explained by :func:`build_info`.
"""

from __future__ import annotations

import importlib
import os
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
    try:
        _load("_C_cuda")
    except (ImportError, OSError) as error:
        return str(error)
    return None


_C = _load("_C")
if _C.version() != __version__:
    raise ImportError(f"patchcore_ext: the native library is of version {_C.version()}, the package of {__version__}; {_REBUILD}.")
_forced = os.environ.get("PATCHCORE_EXT_CPU_LEVEL")
if _forced is not None and _forced not in _C.available_cpu_levels():
    raise ImportError(
        f"patchcore_ext: expected PATCHCORE_EXT_CPU_LEVEL to be a level of this processor ({', '.join(_C.available_cpu_levels())}), got {_forced!r}."
    )
_cuda_problem = _load_cuda()


def kernel_problem(device: torch.device) -> str | None:
    """Why the ops cannot run on tensors of ``device``, with the remedy, or None when they can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are kernels for CPU tensors, none for {device.type}; move the tensor with .cpu()"
    return None if _cuda_problem is None else f"{_cuda_problem}; move the tensor with .cpu()"


def build_info() -> dict[str, Any]:
    """What was built, what is in use, and what is missing and why.

    Returns:
        A dict of plain values (JSON-ready): ``version``, ``torch``, ``compiler``, ``cpu_level`` (the instruction set in use), ``cpu_levels`` (those that this
        processor can run, slowest first), ``threads`` (torch's intra-op threads), ``cuda_kernels`` (bool: built and loaded), ``cuda_problem`` (why not, or
        None), ``cuda_available`` (bool: torch sees a CUDA device).

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
        "cuda_available": torch.cuda.is_available(),
    }
