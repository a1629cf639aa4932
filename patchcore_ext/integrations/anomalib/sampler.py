"""``KCenterGreedy``: anomalib's coreset sampler on our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...coreset import CoresetSampler
from .._rows import where_kernels_are


class KCenterGreedy:
    """anomalib's ``KCenterGreedy`` (2.7): the same arguments, attributes, methods and results, without a pass over all rows for each pick.

    Rows are projected by anomalib's own ``SparseRandomProjection`` and the first row is drawn by the same call of ``torch.randint``, so that
    after ``seed_everything`` the picks are those of anomalib, except where its float32 distances tie or are rounded to another order. Three things
    differ: rows are never picked twice, where anomalib repeats a row once no different ones are left; NaN and infinity are errors, where anomalib picks such a
    row; and more rows than there are is an error, where anomalib repeats some.

    Rows on a device without kernels are copied to the CPU for the selection.

    Args:
        embedding: ``[N, D]`` float32, float16 or bfloat16, to be projected; with more dimensions, ``[N, ...]``, rows are taken as they are.
        sampling_ratio: Share of rows to keep, at most 1; ``int(N * sampling_ratio)`` rows.

    Attributes:
        embedding: As given.
        coreset_size: Number of rows to keep.
        model: anomalib's ``SparseRandomProjection(eps=0.9)``.
        features: The projected rows ``[N, d]``, once there has been a selection.
        min_distances: ``[N, 1]``, the distance of each row to its nearest centre, or None.
        n_observations: N.

    Raises:
        ValueError: ``sampling_ratio`` keeps no row, or is above 1.
    """

    def __init__(self, embedding: Tensor, sampling_ratio: float) -> None:
        from anomalib.models.components.dimensionality_reduction import SparseRandomProjection

        self.embedding = embedding
        self.n_observations: int = embedding.shape[0]
        self.coreset_size = int(self.n_observations * sampling_ratio)
        if self.coreset_size <= 0:
            raise ValueError(
                f"coreset_size must be a positive integer, got {self.coreset_size}: sampling_ratio {sampling_ratio} of {self.n_observations} rows is no row."
            )
        if self.coreset_size > self.n_observations:
            raise ValueError(f"KCenterGreedy: expected sampling_ratio to be at most 1, got {sampling_ratio}: there are {self.n_observations} rows to keep.")
        self.model: Any = SparseRandomProjection(eps=0.9)
        self.features: Tensor
        self._min_distances: Tensor | None = None
        self._selected: Tensor | None = None

    @property
    def min_distances(self) -> Tensor | None:
        """Distance of each row to its nearest centre ``[N, 1]``; after a selection worked out when it is asked for."""
        if self._min_distances is None and self._selected is not None:
            rows = where_kernels_are(self.features)
            squared, _ = ops.nearest_neighbors(rows, rows[self._selected.to(rows.device)], 1)  # [N, 1]
            self._min_distances = ops.square_root(squared).to(self.features)
        return self._min_distances

    @min_distances.setter
    def min_distances(self, value: Tensor | None) -> None:
        self._min_distances, self._selected = value, None

    def reset_distances(self) -> None:
        """Forgets all centres."""
        self.min_distances = None

    def update_distances(self, cluster_center: int | Tensor | None) -> None:
        """Lowers ``min_distances`` by one more centre.

        Args:
            cluster_center: A row of ``features``, as a number or a tensor that holds one; None: nothing is done.
        """
        if cluster_center is None:
            return
        rows = where_kernels_are(self.features)
        squared = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
        ops.update_min_distances(rows, rows[int(cluster_center)][None], squared)
        distances = ops.square_root(squared)[:, None].to(self.features)  # [N, 1]
        known = self.min_distances
        self.min_distances = distances if known is None else torch.minimum(known, distances)

    def get_new_idx(self) -> Tensor:
        """The row that is farthest from its centre, the lowest among equals: int64 ``[]``.

        Raises:
            TypeError: There are no centres yet.
        """
        distances = self.min_distances
        if not isinstance(distances, Tensor):
            raise TypeError(f"self.min_distances must be of type Tensor. Got {type(distances)}")
        return (distances[:, 0] == distances.max()).nonzero()[0, 0]

    def select_coreset_idxs(self) -> list[int]:
        """The rows to keep, in greedy order: the random first one, then each time the one that is farthest from those before it."""
        if self.embedding.ndim == 2:
            self.model.fit(self.embedding)
            self.features = self.model.transform(self.embedding)  # [N, d]
        else:
            self.features = self.embedding.reshape(self.n_observations, -1)
        self.reset_distances()
        first = torch.randint(high=self.n_observations, size=(1,), device=self.features.device)
        sampler = CoresetSampler(num_samples=self.coreset_size, projection_dim=None, start=int(first))
        self._selected = sampler.select(where_kernels_are(self.features)).indices
        picks: list[int] = self._selected.tolist()
        return picks

    def sample_coreset(self) -> Tensor:
        """The rows of ``embedding`` to keep: ``[coreset_size, ...]``, same dtype and device."""
        return self.embedding[self.select_coreset_idxs()]
