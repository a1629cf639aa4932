"""``accelerate`` and ``restore``: our sampler and our search in the places where anomalib has bound its own."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from .sampler import KCenterGreedy
from .search import accelerated, accelerated_squared

_MODELS = "anomalib.models"
_SAMPLER = "anomalib.models.components.sampling.k_center_greedy"
_PATCHCORE = "anomalib.models.image.patchcore.torch_model"
_MH_PATCHCORE = "anomalib.models.image.mh_patchcore.torch_model"  # from 2.7 on


class _Seam(NamedTuple):
    """One name of a module or class, what anomalib has there and what we put there."""

    owner: Any
    name: str
    stock: Any
    ours: Any


_seams: list[_Seam] = []  # not empty: accelerated
_lock = threading.Lock()


class Acceleration:
    """What :func:`accelerate` returns. As a context manager it ends, when its block ends, what its own call has begun, and no more."""

    def __init__(self, began: bool) -> None:
        self._began = began

    def __enter__(self) -> Acceleration:
        """Nothing is left to do."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Restores anomalib if it was this call that changed it."""
        if self._began:
            restore()


def accelerate() -> Acceleration:
    """Lets anomalib's models use our coreset sampler and our search, from now on or for a ``with`` block.

    Changed are ``KCenterGreedy`` wherever an anomalib module has bound it (Patchcore and AnomalyDINO use it), ``PatchcoreModel.nearest_neighbors``, and the
    search of MH-PatchCore, whose coreset of float64 rows stays anomalib's, as does SuperADD's search. Models that exist already are accelerated, too, also
    loaded ones; checkpoints, exports and pickles stay anomalib's own, since classes and attributes do. Exports (ONNX, OpenVINO, ``torch.export``),
    ``torch.compile``, searches that need gradients and devices without kernels use anomalib's code as before.

    A second call changes nothing and returns an object that restores nothing: whoever began it ends it.

    Raises:
        ImportError: anomalib is not installed.
        RuntimeError: This anomalib has no such places; the message names what is missing.

    Example:
        with accelerate():
            Engine().fit(model, datamodule=datamodule)
    """
    with _lock:
        if _seams:
            return Acceleration(began=False)
        found = _find_seams()
        try:
            for seam in found:
                setattr(seam.owner, seam.name, seam.ours)
                _seams.append(seam)
        except BaseException:
            _put_back()
            raise
        return Acceleration(began=True)


def restore() -> None:
    """Gives anomalib its own sampler and search back. Without :func:`accelerate` before it does nothing."""
    with _lock:
        _put_back()


def _find_seams() -> list[_Seam]:
    importlib.import_module(_MODELS)  # with it every model of anomalib, so that no module binds the stock class later
    stock = _attribute(importlib.import_module(_SAMPLER), "KCenterGreedy")
    patchcore = importlib.import_module(_PATCHCORE)
    model = _attribute(patchcore, "PatchcoreModel")
    search = _attribute(model, "nearest_neighbors")
    if vars(patchcore).get("KCenterGreedy") is not stock:
        raise RuntimeError(f"accelerate: expected {_PATCHCORE} to use KCenterGreedy of {_SAMPLER}, and it does not: {_advice()}")
    modules = [module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] == "anomalib" and module is not None]
    bound = [_Seam(module, name, stock, KCenterGreedy) for module in modules for name, value in vars(module).items() if value is stock]
    found = [*bound, _Seam(model, "nearest_neighbors", search, accelerated(search))]
    mh_patchcore = sys.modules.get(_MH_PATCHCORE)
    if mh_patchcore is not None and "_nearest_neighbors" in vars(mh_patchcore):
        stock_search = vars(mh_patchcore)["_nearest_neighbors"]
        found.append(_Seam(mh_patchcore, "_nearest_neighbors", stock_search, accelerated_squared(stock_search)))
    return found


def _attribute(owner: Any, name: str) -> Any:
    if name not in vars(owner):
        raise RuntimeError(f"accelerate: expected {owner.__name__} to have {name}, and it has not: {_advice()}")
    return vars(owner)[name]


def _advice() -> str:
    version = getattr(sys.modules.get("anomalib"), "__version__", "this version")
    return f"anomalib {version} is built otherwise; use one that patchcore_ext knows (2.7)."


def _put_back() -> None:
    while _seams:
        seam = _seams.pop()
        if vars(seam.owner).get(seam.name) is seam.ours:
            setattr(seam.owner, seam.name, seam.stock)
        else:
            warnings.warn(f"restore: {seam.owner.__name__}.{seam.name} has been changed by others since accelerate() and stays as it is.", stacklevel=3)
