"""Scoring test patches against a memory bank: nearest neighbours, the image score of Eq. (7), anomaly maps (Roth et al. 2022, arXiv:2106.08265)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _library, ops
from ._checks import ArrayLike
from .memory_bank import MemoryBank

SCORES = ("paper", "max", "anomalib", "amazon")
MAP_STYLES = ("paper", "anomalib", "amazon")


class PatchScores(NamedTuple):
    """What :class:`PatchScorer` finds in a batch of images.

    Attributes:
        image_scores: float32 ``[B]``.
        patch_distances: float32 ``[B, P]``, each patch's distance to its nearest bank row (squared with ``score="amazon"``).
        nearest_indices: int64 ``[B, P]``, that row.
    """

    image_scores: Tensor
    patch_distances: Tensor
    nearest_indices: Tensor


class PatchScorer(torch.nn.Module):
    """Distances of test patches to the memory bank, and the image-level score.

    Exact: distances are canonical float64 values rounded once to float32, ties go to the lowest bank row, and an image gets the same bits alone or in a batch,
    on any number of threads. Inputs are detached: scoring is not differentiable.

    Int8 copies of the bank (:func:`patchcore_ext.ops.prepare_bank`) are made once, here, and again whenever ``load_state_dict``, ``to`` or ``half`` change the
    bank; they are no part of the state dict. Whoever writes into ``bank`` by other means calls :meth:`prepare` afterwards. Several threads may score at once.

    Args:
        bank: ``[M, D]`` float32, float16 or bfloat16 tensor or NumPy array, or a :class:`MemoryBank`. Kept as the buffer ``bank``.
        num_neighbors: b of Eq. (7), reduced to M when larger. 1 means the plain maximum.
        score: "paper": Eq. (7). "max": the largest patch distance, Eq. (6). "anomalib": Eq. (7) as anomalib 2.7 computes it, which takes the first of the b
            nearest rows to m* for m* itself (it differs where the bank holds duplicates). "amazon": as in amazon-science/patchcore-inspection, the largest
            *squared* patch distance, no reweighting; patch distances are squared, too.

    Raises:
        ValueError, TypeError: The bank is empty, not ``[M, D]`` or not finite (names the first bad row), or an option is unknown.

    Example:
        >>> import torch
        >>> scorer = PatchScorer(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), num_neighbors=1)
        >>> scorer(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])).image_scores
        tensor([3.])
    """

    bank: Tensor
    _prepared: Tensor | None

    def __init__(self, bank: ArrayLike | MemoryBank, num_neighbors: int = 9, score: str = "paper") -> None:
        super().__init__()
        op = "PatchScorer"
        rows = _checks.features(op, "bank", bank.features if isinstance(bank, MemoryBank) else bank).detach()
        if rows.shape[0] == 0:
            raise ValueError(f"{op}: expected bank to have at least one row, got {_checks.describe(rows)}.")
        bad = ops.first_nonfinite_row(rows)
        if bad >= 0:
            raise ValueError(f"{op}: expected bank to be finite, got NaN or infinity in row {bad} (the first such row).")
        self.num_neighbors = _checks.integer(op, "num_neighbors", num_neighbors, 1)
        self.score = _checks.choice(op, "score", score, SCORES)
        self.register_buffer("bank", rows)
        self.prepare()

    def prepare(self) -> None:
        """Makes the int8 copies of the bank anew."""
        started = time.perf_counter()
        prepared = ops.prepare_bank(self.bank) if _library.kernel_problem(self.bank.device) is None else []
        self.register_buffer("_prepared", prepared[0] if prepared else None, persistent=False)
        self._prepare_seconds = time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """What the scorer holds: rows, dim and dtype of the bank, its bytes, bytes of the int8 copies, and the seconds that making these took."""
        rows, dim = self.bank.shape
        return {
            "rows": rows,
            "dim": dim,
            "dtype": str(self.bank.dtype).removeprefix("torch."),
            "bank_bytes": self.bank.nbytes,
            "prepared_bytes": sum(copy.nbytes for copy in self._copies()),
            "prepare_seconds": self._prepare_seconds,
        }

    def _copies(self) -> list[Tensor]:
        return [] if self._prepared is None else [self._prepared]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PatchScorer:
        before = self.bank
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bank.dtype != before.dtype or self.bank.device != before.device:
            self.prepare()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.prepare()

    def extra_repr(self) -> str:
        """Bank size and options."""
        rows, dim = self.bank.shape
        return f"bank=[{rows}, {dim}] {self.bank.dtype}, num_neighbors={self.num_neighbors}, score={self.score!r}"

    def forward(self, patches: ArrayLike) -> PatchScores:
        """Scores images.

        Args:
            patches: ``[B, P, D]``, or ``[P, D]`` for one image (then B = 1), float32, float16 or bfloat16, P >= 1.

        Returns:
            Image scores ``[B]``, patch distances ``[B, P]`` and nearest bank rows ``[B, P]``.

        Raises:
            ValueError: Another dimension than the bank's, or a patch with NaN or infinity (names the first, counted over the batch).

        Cost: see :func:`patchcore_ext.ops.nearest_neighbors`; Eq. (7) adds one search an image.
        """
        op = "PatchScorer"
        ndim = 2 if getattr(patches, "ndim", 3) == 2 else 3
        features = _checks.features(op, "patches", patches, ndim=ndim).detach()
        _checks.same_dim(op, "patches", features, "bank", self.bank)
        num_patches = features.shape[-2]
        if num_patches == 0:
            raise ValueError(f"{op}: expected patches to have at least one patch an image, got {_checks.describe(patches)}.")
        try:
            return self._score(features if ndim == 2 else features.flatten(0, 1), num_patches)
        except ValueError as error:
            raise _checks.renamed(error, op, "queries", "patches") from None

    def _score(self, queries: Tensor, num_patches: int) -> PatchScores:
        """The scores of images with so many patches each, from all of them ``[B * P, D]``."""
        if self.score in ("paper", "max"):
            num_neighbors = self.num_neighbors if self.score == "paper" else 1
            return PatchScores(*ops.score_checked("PatchScorer", queries, self.bank, num_patches, num_neighbors, self._copies()))
        squared, nearest = ops.nearest_neighbors(queries, self.bank, 1, self._copies())
        squared, nearest = squared.view(-1, num_patches), nearest.view(-1, num_patches)
        if self.score == "amazon":
            return PatchScores(squared.amax(1).float(), squared.float(), nearest)
        return PatchScores(self._anomalib_scores(squared, nearest, queries.view(*nearest.shape, queries.shape[1])), ops.square_root(squared).float(), nearest)

    def nearest(self, queries: ArrayLike, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest bank rows of each query.

        Args:
            queries: ``[Q, D]``.
            k: 1 <= k <= M; a larger one is an error.

        Returns:
            ``distances`` float32 ``[Q, k]``, ascending, and ``indices`` int64 ``[Q, k]``; ties in the order of the bank.
        """
        op = "PatchScorer.nearest"
        rows = _checks.features(op, "queries", queries).detach()
        _checks.same_dim(op, "queries", rows, "bank", self.bank)
        _checks.integer(op, "k", k, 1, self.bank.shape[0], " (the rows of the bank)")
        squared, indices = ops.nearest_neighbors(rows, self.bank, k, self._copies())
        return ops.square_root(squared).float(), indices

    def _anomalib_scores(self, squared: Tensor, nearest: Tensor, features: Tensor) -> Tensor:
        """Anomalib's reading of Eq. (7): softmax over the distances to the b rows nearest to m*, the first of them taken for m*."""
        batch = torch.arange(features.shape[0], device=features.device)
        patch = squared.argmax(1)  # [B]
        largest = ops.square_root(squared[batch, patch])
        num_neighbors = min(self.num_neighbors, self.bank.shape[0])
        if num_neighbors == 1:
            return largest.float()
        _, support = ops.nearest_neighbors(self.bank[nearest[batch, patch]], self.bank, num_neighbors, self._copies())  # [B, b]
        difference = features[batch, patch].double()[:, None] - self.bank[support].double()  # [B, b, D]
        weights = ops.square_root(difference.square().sum(-1)).softmax(-1)  # [B, b]
        return ((1 - weights[:, 0]) * largest).float()


def anomaly_maps(patch_distances: Tensor, grid: tuple[int, int], size: tuple[int, int], sigma: float = 4.0, style: str = "paper") -> Tensor:
    """Anomaly maps: patch distances at their places, scaled up to the image's size, smoothed by a gaussian (Roth et al. 2022, section 3.3).

    Args:
        patch_distances: ``[B, P]`` floating, P = grid[0] * grid[1], row-major.
        grid: Rows and columns of patches.
        size: Height and width of the map, in pixels.
        sigma: Standard deviation of the gaussian in pixels of the map, truncated at 4 sigma; 0: no smoothing.
        style: "paper" and "amazon" (patchcore-inspection): bilinear with align_corners=False; the gaussian mirrors the map at its borders with the
            edge repeated, as scipy.ndimage.gaussian_filter does. "anomalib" (2.7): nearest; mirrored without the edge.

    Returns:
        ``[B, size[0], size[1]]`` float32.

    Cost: two matrix products a map, ``[H, rows] @ [rows, columns] @ [columns, W]``.
    """
    if patch_distances.ndim != 2 or patch_distances.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"anomaly_maps: expected patch_distances to be [batch, {grid[0]} * {grid[1]}] for a grid of {list(grid)}, got {_checks.describe(patch_distances)}."
        )
    _checks.choice("anomaly_maps", "style", style, MAP_STYLES)
    device = patch_distances.device
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return anomaly_maps(patch_distances, grid, size, sigma, style)
    vertical, horizontal = _axis_operators(tuple(grid), tuple(size), sigma, style == "anomalib", device)
    maps = patch_distances.detach().float().reshape(-1, *grid)  # [B, rows, columns]
    return torch.matmul(torch.matmul(vertical, maps), horizontal)  # [B, H, W]


@functools.lru_cache(maxsize=32)
def _axis_operators(grid: tuple[int, int], size: tuple[int, int], sigma: float, like_anomalib: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Interpolation and smoothing as two matrices ``[H, rows]`` and ``[columns, W]``: both are linear and separable, so a map is two small products."""
    vertical, horizontal = (_axis_operator(count, pixels, sigma, like_anomalib).to(device) for count, pixels in zip(grid, size, strict=True))
    return vertical, horizontal.T


def _axis_operator(count: int, size: int, sigma: float, like_anomalib: bool) -> Tensor:
    """Along one axis, ``[size, count]``."""
    cells = torch.eye(count, dtype=torch.float64, device="cpu")[:, None]  # [count, 1, count]
    if like_anomalib:
        columns = torch.nn.functional.interpolate(cells, size=size, mode="nearest")  # [count, 1, size]
    else:
        columns = torch.nn.functional.interpolate(cells, size=size, mode="linear", align_corners=False)  # [count, 1, size]
    if sigma > 0:
        radius = int(4.0 * sigma + 0.5)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        columns = torch.nn.functional.conv1d(columns[..., _mirrored(size, radius, like_anomalib)], (kernel / kernel.sum())[None, None])  # [count, 1, size]
    return columns[:, 0].T.float().contiguous()


def _mirrored(size: int, radius: int, without_edge: bool) -> Tensor:
    """Indices ``[size + 2 radius]`` of a line that is mirrored at both ends, the edge repeated or not."""
    period = max(1, 2 * (size - 1)) if without_edge else 2 * size
    positions = torch.arange(-radius, size + radius, device="cpu") % period
    return torch.where(positions < size, positions, period - (0 if without_edge else 1) - positions)
