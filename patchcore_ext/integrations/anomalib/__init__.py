"""PatchCore of anomalib (Akcay et al. 2022, arXiv:2202.08341; 2.7) with our coreset and our search.

Three ways in, from the shortest: :func:`accelerate` makes the code that is already there faster; :class:`Patchcore` is a model for anomalib's Engine and
command line (``class_path: patchcore_ext.integrations.anomalib.Patchcore``); :class:`KCenterGreedy` is the sampler alone.
:func:`memory_bank_from_checkpoint` reads what anomalib has saved.

anomalib itself is imported when one of them is used, never by importing this module. What is the same as in anomalib and what is not: docs/recipes/anomalib.md.
"""

from __future__ import annotations

from typing import Any

from .checkpoint import memory_bank_from_checkpoint
from .sampler import KCenterGreedy
from .seams import Acceleration, accelerate, restore

__all__ = ["Acceleration", "KCenterGreedy", "Patchcore", "PatchcoreModel", "accelerate", "memory_bank_from_checkpoint", "restore"]


def __getattr__(name: str) -> Any:
    """The model classes, whose base classes are anomalib's, when they are asked for."""
    if name in {"Patchcore", "PatchcoreModel"}:
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
