"""Approximate search: faiss's inverted file with product quantisation, what the paper calls PatchCore-100% + IVFPQ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, from_numpy

BYTES = 64  # of a row's code, or as many as divide its dimensions
PROBED = 8  # lists
_TRAINING_ROWS = 100_000
_OVER_QUERIES = 3  # faiss's parallel_mode: a query is one thread's work


def code_bytes(dim: int, most: int = BYTES) -> int:
    """The largest number of bytes, at most ``most``, that divides the dimensions."""
    return next(count for count in range(min(most, dim), 0, -1) if dim % count == 0)


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """For faiss's matrix products, whose last bits depend on the number; behind it faiss has as many threads as torch."""
    threads = torch.get_num_threads()  # asked now: torch may share its OpenMP with faiss
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        faiss.omp_set_num_threads(threads)


def build_index(rows: Tensor, bits: int = 8) -> Any:
    """An IndexIVFPQ of rows [M, D] with about sqrt(M) lists. Its k-means starts from a fixed seed and runs on one thread, so it is the same each time.

    A row's code depends on no other row: once the rows have their lists, all threads make codes.

    Raises:
        ModuleNotFoundError: faiss is not installed.
    """
    import faiss

    count, dim = rows.shape
    values = rows.numpy()
    with _one_thread(faiss):
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, max(1, round(count**0.5)), code_bytes(dim), bits)
        step = max(1, count // _TRAINING_ROWS)
        index.train(values[::step].copy())
    for start in range(0, count, _TRAINING_ROWS):
        block = values[start : start + _TRAINING_ROWS]
        with _one_thread(faiss):
            _, lists = index.quantizer.search(block, 1)
        index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(lists))
    index.nprobe = PROBED
    index.parallel_mode = _OVER_QUERIES
    return index


def search(index: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances float32 [Q, k], as the index sees them, and rows int64 [Q, k]; the same bits on any number of threads."""
    import faiss

    asked = queries.contiguous().numpy()
    with _one_thread(faiss):
        middles, lists = index.quantizer.search(asked, index.nprobe)
    squared, nearest = index.search_preassigned(asked, k, lists, middles)
    return from_numpy(squared).clamp(min=0).sqrt(), from_numpy(nearest)
