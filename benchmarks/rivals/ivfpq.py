"""Approximate search: faiss's inverted file with product quantisation, what the paper calls PatchCore-100% + IVFPQ."""

from __future__ import annotations

from typing import Any

from threadpoolctl import threadpool_limits
from torch import Tensor, from_numpy

BYTES = 64  # of a row's code, or as many as divide its dimensions
PROBED = 8  # lists
_TRAINING_ROWS = 100_000


def code_bytes(dim: int, most: int = BYTES) -> int:
    """The largest number of bytes, at most ``most``, that divides the dimensions."""
    return next(count for count in range(min(most, dim), 0, -1) if dim % count == 0)


def build_index(rows: Tensor, bits: int = 8) -> Any:
    """An IndexIVFPQ of rows [M, D] with about sqrt(M) lists. Its k-means starts from a fixed seed and runs on one thread, so it is the same each time.

    Raises:
        ModuleNotFoundError: faiss is not installed.
    """
    import faiss

    count, dim = rows.shape
    values = rows.numpy()
    with threadpool_limits(1):
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, max(1, round(count**0.5)), code_bytes(dim), bits)
        step = max(1, count // _TRAINING_ROWS)
        index.train(values[::step].copy())
        for start in range(0, count, _TRAINING_ROWS):
            index.add(values[start : start + _TRAINING_ROWS])
    index.nprobe = PROBED
    return index


def search(index: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances float32 [Q, k], as the index sees them, and rows int64 [Q, k]."""
    with threadpool_limits(1):  # the last bits of its matrix products depend on the number
        squared, nearest = index.search(queries.contiguous().numpy(), k)
    return from_numpy(squared).clamp(min=0).sqrt(), from_numpy(nearest)
