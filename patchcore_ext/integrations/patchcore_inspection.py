"""Samplers and search for amazon-science/patchcore-inspection, with the constructors and methods of its own.

They go in where its PatchCore takes them: ``PatchCore.load(..., featuresampler=ApproximateGreedyCoresetSampler(0.1, device), nn_method=FaissNN())``. With the
same states of NumPy's and torch's random generators they choose the same starting points and projections as the originals.
See docs/recipes/patchcore-inspection.md.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _checks, ops
from .._checks import ArrayLike
from ..coreset import ArrayT, CoresetSampler
from ..memory_bank import atomic_write
from ._rows import where_kernels_are

__all__ = ["ApproximateGreedyCoresetSampler", "BaseSampler", "FaissNN", "GreedyCoresetSampler", "IdentitySampler", "RandomSampler"]

_FLAT_L2 = b"IxF2"  # how faiss marks a file of an IndexFlatL2
_FLAT_HEADER = struct.Struct("<4siqqq?iQ")  # mark, d, ntotal, twice 2^20, is_trained, metric (1: L2), number of float32 values
_PLACEHOLDER = 1 << 20
_L2 = 1


class IdentitySampler:
    """Keeps all features."""

    def run(self, features: ArrayT) -> ArrayT:
        """``features``, the same object."""
        return features


class BaseSampler:
    """A sampler that keeps a share of the features.

    Args:
        percentage: The share, between 0 and 1; ``int(N * percentage)`` rows are kept.

    Raises:
        ValueError: ``percentage`` is not in (0, 1).
    """

    def __init__(self, percentage: float) -> None:
        if not 0 < percentage < 1:
            raise ValueError(f"Percentage value not in (0, 1): got {percentage}.")
        self.percentage = percentage

    def run(self, features: ArrayT) -> ArrayT:
        """The features that are kept, ``[int(N * percentage), D]``: tensor or NumPy array, dtype and device as given.

        Raises:
            ValueError: No row would be kept, or a row is not finite (names the first).
        """
        count = int(len(features) * self.percentage)
        if count < 1:
            raise ValueError(f"{type(self).__name__}: expected percentage to keep at least one row, got {self.percentage} of {len(features)} rows.")
        if isinstance(features, np.ndarray):
            rows: npt.NDArray[Any] = features[self._indices(torch.from_numpy(features), count).cpu().numpy()]
            return rows
        return features[self._indices(features, count).to(features.device)]

    def _indices(self, features: Tensor, count: int) -> Tensor:
        """The rows to keep, int64 ``[count]``."""
        raise NotImplementedError


class RandomSampler(BaseSampler):
    """Keeps random rows, drawn from NumPy's global generator as the original does."""

    def _indices(self, features: Tensor, count: int) -> Tensor:
        return torch.from_numpy(np.random.choice(len(features), count, replace=False))  # noqa: NPY002


class GreedyCoresetSampler(BaseSampler):
    """Keeps the greedy k-center coreset that starts from the row that is farthest from all others.

    The same selection as the original's, without its N x N matrix: the row with the largest root of the sum of squared distances to all rows is the one that is
    farthest from their mean, and every further pick is the row that is farthest from its nearest pick. Distances are exact, and no row is kept twice, where the
    original repeats rows once there are no different ones left.

    Args:
        percentage: Share of rows to keep, between 0 and 1.
        device: Where features are projected; the selection runs there if there are kernels, else on the CPU.
        dimension_to_project_features_to: Distances are measured after an untrained ``torch.nn.Linear`` to this dimension; features of just this dimension are
            taken as they are.

    Raises:
        ValueError: ``percentage`` is not in (0, 1).
    """

    def __init__(self, percentage: float, device: torch.device, dimension_to_project_features_to: int = 128) -> None:
        super().__init__(percentage)
        self.device = device
        self.dimension_to_project_features_to = dimension_to_project_features_to

    def _indices(self, features: Tensor, count: int) -> Tensor:
        rows = where_kernels_are(_checks.features(type(self).__name__, "features", self._reduce_features(features)))
        bad = ops.first_nonfinite_row(rows)
        if bad >= 0:
            raise ValueError(f"{type(self).__name__}: expected features to be finite, got NaN or infinity in row {bad} (the first such row).")
        return self._picks(rows, count)

    @torch.no_grad()
    def _reduce_features(self, features: Tensor) -> Tensor:
        if features.shape[1] == self.dimension_to_project_features_to:
            return features
        mapper = torch.nn.Linear(features.shape[1], self.dimension_to_project_features_to, bias=False).to(self.device)
        projected: Tensor = mapper(features.to(self.device, mapper.weight.dtype))
        return projected

    def _picks(self, rows: Tensor, count: int) -> Tensor:
        mean = rows.mean(0, dtype=torch.float64)  # [D]
        spread = torch.cat([(rows[start : start + 8192].double() - mean).square().sum(1) for start in range(0, len(rows), 8192)])  # [N]
        first = int((spread == spread.max()).nonzero()[0, 0])
        return CoresetSampler(num_samples=count, projection_dim=None, start=first).select(rows).indices


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """Keeps the greedy coreset as the original's approximation finds it: a row counts as covered by its mean distance to a few random rows, too.

    Args:
        percentage: Share of rows to keep, between 0 and 1.
        device: As of :class:`GreedyCoresetSampler`.
        number_of_starting_points: How many random rows, drawn from NumPy's global generator.
        dimension_to_project_features_to: As of :class:`GreedyCoresetSampler`.

    Raises:
        ValueError: ``percentage`` is not in (0, 1).
    """

    def __init__(self, percentage: float, device: torch.device, number_of_starting_points: int = 10, dimension_to_project_features_to: int = 128) -> None:
        super().__init__(percentage, device, dimension_to_project_features_to)
        self.number_of_starting_points = number_of_starting_points

    def _picks(self, rows: Tensor, count: int) -> Tensor:
        starting = np.random.choice(len(rows), min(self.number_of_starting_points, len(rows)), replace=False)  # noqa: NPY002
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for point in starting.tolist():
            squared = torch.full_like(total, torch.inf)
            total += ops.square_root(ops.update_min_distances(rows, rows[point][None], squared))
        state = (total / len(starting)).square()  # [N], what greedy_coreset keeps lowering by the picks
        sampler = CoresetSampler(num_samples=count)
        return torch.cat([picks for picks, _ in sampler._slices(rows, state, sampler._codes(rows, count), count)])


class _FlatIndex:
    """Rows that are searched, and what of faiss' IndexFlatL2 is used here."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.prepared = ops.prepare_bank(rows) if rows.device.type == "cpu" else []

    @property
    def d(self) -> int:
        return self.rows.shape[1]

    @property
    def ntotal(self) -> int:
        return self.rows.shape[0]

    def search(self, queries: ArrayLike, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Squared distances and rows of the k nearest, ``[Q, k]``."""
        return _search(queries, self.rows, k, self.prepared)


class FaissNN:
    """Takes the place of the original's ``FaissNN``: the nearest features and their *squared* distances, exactly, and without faiss.

    Index files are those of faiss' IndexFlatL2, so that either class reads what the other has saved.

    Args:
        on_gpu: Search on the GPU, if there are kernels for it; else a warning is given and the CPU finds the same.
        num_workers: Threads of a search.

    Attributes:
        search_index: What ``fit`` or ``load`` has made, or None.
    """

    def __init__(self, on_gpu: bool = False, num_workers: int = 4) -> None:
        self.on_gpu = on_gpu
        self.num_workers = _checks.integer("FaissNN", "num_workers", num_workers, 1)
        self.search_index: Any = None

    def fit(self, features: ArrayLike) -> None:
        """Takes the rows to search in, and copies them.

        Args:
            features: ``[N, D]`` float32, N >= 1.

        Raises:
            ValueError: There are no rows, or one is not finite (names the first).
        """
        with _threads(self.num_workers):
            self.search_index = _FlatIndex(self._placed(_checks.features("FaissNN.fit", "features", features).detach().clone()))

    def run(
        self, n_nearest_neighbours: int, query_features: ArrayLike, index_features: ArrayLike | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The nearest rows.

        Args:
            n_nearest_neighbours: k, at most the number of rows.
            query_features: ``[Q, D]``.
            index_features: Rows to search in, instead of those that were fitted: ``[M, D]``.

        Returns:
            Squared distances, float32 ``[Q, k]``, ascending, and rows, int64 ``[Q, k]``; equal distances in the order of the rows.

        Raises:
            AttributeError: Nothing was fitted, and there are no ``index_features``.
            ValueError: k is larger than the number of rows (faiss fills up with 3.4e38 and row -1), dimensions differ, or a row is not finite.
        """
        with _threads(self.num_workers):
            if index_features is not None:
                rows = self._placed(_checks.features("FaissNN.run", "index_features", index_features).detach())
                return _search(query_features, rows, n_nearest_neighbours, [])
            found: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] = self.search_index.search(query_features, n_nearest_neighbours)
            return found

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Writes the rows as a faiss IndexFlatL2 file, whole or not at all.

        Raises:
            AttributeError: Nothing was fitted.
            OSError: The file cannot be written.
        """
        rows = self.search_index.rows.float().cpu().contiguous()
        header = _FLAT_HEADER.pack(_FLAT_L2, rows.shape[1], rows.shape[0], _PLACEHOLDER, _PLACEHOLDER, True, _L2, rows.numel())
        with atomic_write(filename) as temporary, temporary.open("wb") as file:
            file.write(header)
            rows.numpy().astype("<f4", copy=False).tofile(file)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Reads a file of ``save``, or of a faiss IndexFlatL2.

        Raises:
            OSError: There is no such file.
            ValueError: Another kind of index, or a damaged file.
        """
        with open(filename, "rb") as file:
            start = file.read(_FLAT_HEADER.size)
            mark, dim, count, _, _, _, metric, values = _FLAT_HEADER.unpack(start) if len(start) == _FLAT_HEADER.size else (b"", 0, 0, 0, 0, False, 0, 0)
            expected = _FLAT_HEADER.size + 4 * values
            if mark != _FLAT_L2 or metric != _L2 or min(dim, count) < 1 or values != dim * count or os.path.getsize(filename) != expected:
                raise ValueError(f"FaissNN.load: expected {os.fspath(filename)!r} to be a whole file of a faiss IndexFlatL2 with rows, got something else.")
            rows = torch.from_numpy(np.fromfile(file, dtype="<f4").astype(np.float32, copy=False).reshape(count, dim))
        with _threads(self.num_workers):
            self.search_index = _FlatIndex(self._placed(rows))

    def reset_index(self) -> None:
        """Forgets the rows."""
        self.search_index = None

    def _placed(self, rows: Tensor) -> Tensor:
        """The rows where the search is to run."""
        if not self.on_gpu:
            return rows.cpu()
        placed = where_kernels_are(rows.cuda()) if torch.cuda.is_available() else rows.cpu()
        if placed.device.type == "cpu":
            warnings.warn("FaissNN: on_gpu=True, but there are no kernels for a GPU here; the CPU searches, with the same result.", UserWarning, stacklevel=3)
        return placed


def _search(queries: ArrayLike, rows: Tensor, k: int, prepared: list[Tensor]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    asked = _checks.features("FaissNN.run", "query_features", queries).detach().to(rows.device)
    squared, indices = ops.nearest_neighbors(asked, rows, k, prepared)
    return squared.float().cpu().numpy(), indices.cpu().numpy()


_threads_lock = threading.RLock()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Runs the block with so many threads of torch: one block at a time, as their number is of the process."""
    with _threads_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
