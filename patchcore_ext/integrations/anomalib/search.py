"""Nearest neighbours for anomalib's models: our search, with the int8 copies of a memory bank kept from call to call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import _checks, _library, ops

Search = Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]

# Bank tensor -> (its version, the copies). Here, not on the module: modules are pickled (``to_torch``), copied and saved. Entries go when the bank goes.
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def prepared(bank: Tensor) -> list[Tensor]:
    """What :func:`patchcore_ext.ops.prepare_bank` gives for a bank, made once for each bank and again after each write into it.

    Writes are seen by the tensor's version, which writes through ``.data`` do not raise. Tensors made in inference mode have no version: for them nothing is
    kept (and the search makes its copies for each call).
    """
    if bank.is_inference() or bank.device.type != "cpu":
        return []
    version = bank._version
    with _lock:
        kept = _copies.get(bank)  # type: ignore[no-untyped-call]
    if kept is not None and kept[0] == version:
        copies: list[Tensor] = kept[1]
        return copies
    copies = ops.prepare_bank(bank)
    with _lock:
        _copies[bank] = (version, copies)
    return copies


def takes(embedding: Tensor, bank: Tensor) -> bool:
    """Whether a search is ours to do: plain tensors with kernels for them, no exporter or compiler at work, no gradients asked for."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch._C._is_tracing():
        return False
    for tensor in (embedding, bank):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype not in _checks.FEATURE_DTYPES:
            return False
        if tensor.device.type == "meta" or tensor.device != bank.device or _library.kernel_problem(tensor.device) is not None:
            return False
    return not (torch.is_grad_enabled() and (embedding.requires_grad or bank.requires_grad))


def nearest(embedding: Tensor, bank: Tensor, k: int, *, squared: bool = False) -> tuple[Tensor, Tensor]:
    """Distances, dtype of the bank, and int64 rows of the k nearest: ``[Q, k]``, or ``[Q]`` where k = 1, as anomalib gives them."""
    found, indices = ops.nearest_neighbors(embedding, bank, k, prepared(bank))
    distances = (found if squared else ops.square_root(found)).to(bank.dtype)
    return (distances[:, 0], indices[:, 0]) if k == 1 else (distances, indices)


def accelerated(stock: Search) -> Search:
    """``PatchcoreModel.nearest_neighbors`` in place of anomalib's own, ``stock``, which still does what is not ours to do, exports above all."""

    @functools.wraps(stock)
    def nearest_neighbors(self: Any, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        if not takes(embedding, self.memory_bank):
            return stock(self, embedding, n_neighbors)
        return nearest(embedding, self.memory_bank, n_neighbors)

    return nearest_neighbors


def accelerated_squared(stock: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The function ``_nearest_neighbors`` of MH-PatchCore, whose distances are squared, in place of anomalib's own, ``stock``."""

    @functools.wraps(stock)
    def _nearest_neighbors(queries: Tensor, references: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
        if not takes(queries, references):
            return stock(queries, references, num_neighbors)
        return nearest(queries, references, num_neighbors, squared=True)

    return _nearest_neighbors
