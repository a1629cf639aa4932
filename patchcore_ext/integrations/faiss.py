"""faiss: a memory bank from an ``IndexFlatL2`` and back, and an index of ours that stands in for it with exact answers.

faiss itself is imported by the functions that need it (``pip install "patchcore-ext[faiss]"``); :class:`IndexFlatL2` does without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _checks, ops
from .._checks import ArrayLike
from ..memory_bank import MemoryBank

__all__ = ["METRIC_L2", "IndexFlatL2", "memory_bank_from_index", "to_index"]

METRIC_L2 = 1
"""faiss.METRIC_L2."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class IndexFlatL2:
    """What ``faiss.IndexFlatL2`` answers, exactly: squared L2 distances to the nearest rows, smallest first.

    Where faiss searches many queries at once it expands |a - b|^2 into norms and a product, which loses the digits of features with an offset, and can give
    another row for a query in a batch than alone. Here every decision is made on float64 distances of differences (docs/exactness.md): each distance is the
    exact one rounded once to float32, never negative, and equal distances come in the order of the rows, for any batch and number of threads.

    Args:
        d: Dimension of the rows, at least 1.

    Attributes:
        d: Dimension.
        ntotal: Number of rows.
        is_trained: True, there is nothing to train.
        metric_type: METRIC_L2.
        code_size: Bytes of a row, 4 * d.

    Note:
        Unlike faiss, NaN and infinity are refused (the first such row is named), and wrong shapes raise ValueError, not AssertionError. Rows are float32; what
        is wider is rounded to it, as faiss' Python layer does. Several threads may search at once; nobody may add meanwhile.

    Example:
        >>> import numpy as np
        >>> index = IndexFlatL2(2)
        >>> index.add(np.float32([[0, 0], [3, 4]]))
        >>> distances, indices = index.search(np.float32([[3, 0]]), 2)
        >>> distances.tolist(), indices.tolist()
        ([[9.0, 16.0]], [[0, 1]])
    """

    is_trained = True
    metric_type = METRIC_L2

    def __init__(self, d: int) -> None:
        self.d = _checks.integer("IndexFlatL2", "d", d, 1)
        self.reset()

    def __repr__(self) -> str:
        return f"IndexFlatL2(d={self.d}, ntotal={self.ntotal})"

    @property
    def code_size(self) -> int:
        """Bytes of a row."""
        return 4 * self.d

    def train(self, x: ArrayLike) -> None:
        """Does nothing: a flat index needs no training."""

    def reset(self) -> None:
        """Forgets all rows."""
        self.ntotal = 0
        self._parts: list[Tensor] = []
        self._prepared: list[Tensor] | None = None

    def add(self, x: ArrayLike) -> None:
        """Adds rows, which get the numbers ``ntotal``, ``ntotal + 1``, ...

        Args:
            x: ``[n, d]``, copied.

        Raises:
            ValueError: Another dimension, or a row with NaN or infinity (the first one is named).
        """
        rows = self._rows("add", x).clone()
        bad = ops.first_nonfinite_row(rows)
        if bad >= 0:
            raise ValueError(f"IndexFlatL2.add: expected x to be finite, got NaN or infinity in row {bad} (the first such row).")
        self._parts.append(rows)
        self.ntotal += len(rows)
        self._prepared = None

    def search(
        self,
        x: ArrayLike,
        k: int,
        *,
        params: None = None,
        D: Floats | None = None,  # noqa: N803
        I: Ints | None = None,  # noqa: E741, N803
    ) -> tuple[Floats, Ints]:
        """The k nearest rows of each query.

        The first search after ``add`` makes int8 copies of the rows, with which most distances need not be computed.

        Args:
            x: Queries ``[n, d]``.
            k: At least 1.
            params: None; search parameters of faiss are not known here.
            D: Where to put the distances, float32 ``[n, k]``; None: a new array.
            I: Where to put the indices, int64 ``[n, k]``; None: a new array.

        Returns:
            *Squared* distances float32 ``[n, k]``, ascending, and indices int64 ``[n, k]``; where there are fewer than k rows, the largest float32 and -1.

        Raises:
            ValueError: Another dimension, k below 1, params, or a query with NaN or infinity (the first one is named).
        """
        if params is not None:
            raise ValueError("IndexFlatL2.search: expected params to be None, got search parameters; select the rows before adding them.")
        queries, k = self._rows("search", x), _checks.integer("IndexFlatL2.search", "k", k, 1)
        shape = (len(queries), k)
        distances = np.full(shape, np.finfo(np.float32).max, np.float32) if D is None else D
        indices = np.full(shape, -1, np.int64) if I is None else I
        for name, array, dtype in (("D", distances, np.float32), ("I", indices, np.int64)):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"IndexFlatL2.search: expected {name} to be {np.dtype(dtype).name} {list(shape)}, got {_checks.describe(array)}.")
        found = min(k, self.ntotal)
        distances[:, found:], indices[:, found:] = np.finfo(np.float32).max, -1
        if found > 0:
            bank = self._bank()
            if self._prepared is None:
                self._prepared = ops.prepare_bank(bank)
            squared, nearest = ops.nearest_neighbors(queries, bank, found, self._prepared)
            distances[:, :found], indices[:, :found] = squared.float().numpy(), nearest.numpy()
        return distances, indices

    def assign(self, x: ArrayLike, k: int = 1) -> Ints:
        """The indices of ``search``; without the second dimension for k = 1, as faiss has it."""
        indices = self.search(x, k)[1]
        return indices[:, 0] if k == 1 else indices

    def reconstruct(self, key: int) -> Floats:
        """Row ``key``, float32 ``[d]``."""
        row: Floats = self.reconstruct_n(key, 1)[0]
        return row

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> Floats:
        """Rows ``n0`` to ``n0 + ni``, float32 ``[ni, d]``; all from ``n0`` on with ni = -1."""
        op = "IndexFlatL2.reconstruct"
        first = _checks.integer(op, "n0", n0, 0, self.ntotal, " (the rows there are)")
        count = self.ntotal - first if ni == -1 else _checks.integer(op, "ni", ni, 0, self.ntotal - first, " (the rows there are from n0 on)")
        rows: Floats = self._bank()[first : first + count].numpy().copy()
        return rows

    def _rows(self, op: str, x: ArrayLike) -> Tensor:
        """``[n, d]`` float32 on the CPU."""
        array = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if array.ndim != 2 or array.shape[1] != self.d or array.dtype.kind not in "buif":
            raise ValueError(f"IndexFlatL2.{op}: expected x to be numbers [n, {self.d}], got {_checks.describe(array)}.")
        with np.errstate(over="ignore"):  # becomes infinity, which is told
            return _checks.features(f"IndexFlatL2.{op}", "x", array.astype(np.float32, copy=False))

    def _bank(self) -> Tensor:
        if len(self._parts) != 1:
            self._parts = [torch.cat(self._parts) if self._parts else torch.empty(0, self.d, dtype=torch.float32, device="cpu")]
        return self._parts[0]


def memory_bank_from_index(
    index: Any,
    *,
    image_indices: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    image_names: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> MemoryBank:
    """A memory bank with the rows of a flat L2 index, for example the ``nnscorer_search_index.faiss`` that patchcore-inspection saves.

    Args:
        index: A ``faiss.IndexFlatL2`` (on a GPU, too), an index of ours, or the path of a file written by ``faiss.write_index``.
        image_indices: As for ``MemoryBank``: an index holds rows alone.
        positions: Likewise.
        image_names: Likewise.
        metadata: Likewise.

    Returns:
        The bank, its rows copied, in the order of the index.

    Raises:
        ImportError: faiss is not installed.
        ValueError: The index is of another kind (a compressed one holds no rows, only approximations), has another metric or no rows, or the file cannot be
            read.
    """
    op = "memory_bank_from_index"
    if isinstance(index, IndexFlatL2):
        flat: Any = index
    else:
        faiss = _import_faiss(op)
        owner = _read(faiss, index) if isinstance(index, str | os.PathLike) else index
        if type(owner).__name__.startswith("GpuIndex"):
            owner = faiss.index_gpu_to_cpu(owner)
        flat = faiss.downcast_index(owner) if isinstance(owner, faiss.Index) else owner  # a view: `owner` keeps its memory alive
        if not isinstance(flat, faiss.IndexFlat):
            raise ValueError(f"{op}: expected index to be a faiss.IndexFlatL2 or its file, got {type(flat).__name__}; build one from the rows themselves.")
        if flat.metric_type != faiss.METRIC_L2:
            raise ValueError(f"{op}: expected index to have METRIC_L2, got metric_type {flat.metric_type}; PatchCore measures L2 distances.")
    if flat.ntotal == 0:
        raise ValueError(f"{op}: expected index to hold at least one row, got an empty one.")
    rows = torch.from_numpy(np.array(flat.reconstruct_n(0, flat.ntotal), dtype=np.float32))
    return MemoryBank(rows, image_indices=image_indices, positions=positions, image_names=image_names, metadata=metadata)


def to_index(bank: MemoryBank | ArrayLike) -> Any:
    """A ``faiss.IndexFlatL2`` with the rows of a bank, in their order; provenance stays behind.

    Args:
        bank: A MemoryBank, or rows ``[M, D]`` float32, float16 or bfloat16 (widened to float32, which loses nothing).

    Returns:
        The index; ``faiss.write_index`` saves it.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = _import_faiss("to_index")
    rows = _checks.features("to_index", "bank", bank.features if isinstance(bank, MemoryBank) else bank)
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(np.ascontiguousarray(rows.detach().cpu().float().numpy()))
    return index


def _import_faiss(op: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{op}: needs faiss, which cannot be imported ({error}); run: pip install faiss-cpu") from error
    return faiss


def _read(faiss: Any, path: str | os.PathLike[str]) -> Any:
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"memory_bank_from_index: expected index to be an index or an existing file, got {name!r}, which does not exist.")
    try:
        return faiss.read_index(name)
    except RuntimeError as error:
        raise ValueError(f"memory_bank_from_index: expected index to be a file of faiss.write_index, got {name!r}: {error}") from error
