"""Greedy k-center coreset selection: Eq. (5) and Algorithm 1, Roth et al. 2022, arXiv:2106.08265."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from . import _checks, _library, _random, ops
from ._checks import ArrayLike

ArrayT = TypeVar("ArrayT", Tensor, npt.NDArray[Any])
_FEWEST_PICKS = 32  # for fewer, or with fewer rows, the int8 copy costs more than it saves
_FEWEST_ROWS = 2048
_CODED_DIMS = range(4, 32_769)  # below, codes take more memory than features
_FIRST_SLICE = 40_000_000  # rows times picks of the first call
_SLICE_SECONDS = 0.3  # how long the kernels run between two looks at the clock and at Ctrl-C


class CoresetSelection(NamedTuple):
    """The rows that a coreset keeps.

    Attributes:
        indices: int64 ``[num_samples]``, in greedy order.
        distances: float64 ``[num_samples]``, the distance of each row to the nearest earlier one when it was picked (the covering radius of the rows before
            it); the first is infinity. NaN where nothing was measured: for ``initial_indices``, and when ``ratio=1`` keeps all rows.
        radius: Covering radius: the largest distance of any row to its nearest kept one, in the space in which the rows were picked.
    """

    indices: Tensor
    distances: Tensor
    radius: float

    def covering_curve(self, points: int = 64) -> list[tuple[int, float]]:
        """How well coresets of growing size cover the rows: pairs (number of rows kept, covering radius), about evenly spaced on a logarithmic scale of sizes.

        The greedy order makes every beginning of a selection a coreset of its own, so one selection tells the radius of all smaller ones. Sizes whose radius
        was not measured are left out.
        """
        count = len(self.indices)
        sizes = sorted({round(count ** (i / max(1, points - 1))) for i in range(points)})
        radii = [*self.distances[1:].tolist(), self.radius]  # the radius of the first n rows is the distance of row n + 1 when it was picked
        return [(size, radii[size - 1]) for size in sizes if math.isfinite(radii[size - 1])]


class CoresetSampler:
    """Keeps the rows that cover the others best: greedy k-center selection on random projections.

    The picks are those of the sequential algorithm on canonical float64 distances, ties to the lowest index: the same for every device, thread count,
    instruction set and default dtype. A picked row is never picked again, so duplicates do no harm.

    Args:
        ratio: Share of rows to keep, in (0, 1]; ``num_samples = max(1, int(ratio * N))``. 1 keeps all rows in their order.
        num_samples: Number of rows to keep, instead of ``ratio``.
        radius: Stop as soon as every row lies within this distance of a kept one (in the space of the picks), instead of at a count; ``num_samples``, if given,
            still is the largest number.
        projection_dim: Dimension of the random projection on which distances are measured; None: no projection; "auto": the Johnson-Lindenstrauss size for
            eps = 0.9 (295 at 156,800 rows). Never projects up: features of at most this dimension are used as they are.
        projection: "sparse" (Li et al. 2006) or "gaussian", as defined by sklearn.random_projection; both canonical (see ``ops.random_projection``).
        start: "random" (seeded) or the index of the first row.
        seed: Seed of the projection and of the start, in [0, 2^64).
        progress: Show a progress bar; None: when stderr is a terminal.

    Raises:
        ValueError, TypeError: An argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> features = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
        >>> selection = CoresetSampler(ratio=0.1, seed=0).select(features)
        >>> selection.indices.shape
        torch.Size([100])
    """

    def __init__(
        self,
        ratio: float = 0.1,
        *,
        num_samples: int | None = None,
        radius: float | None = None,
        projection_dim: int | str | None = 128,
        projection: str = "sparse",
        start: str | int = "random",
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        op = "CoresetSampler"
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise TypeError(f"{op}: expected ratio to be a number in (0, 1], got {_checks.describe(ratio)}.")
        if not 0 < ratio <= 1:
            raise ValueError(f"{op}: expected ratio to lie in (0, 1], got {ratio}.")
        if isinstance(projection_dim, str):
            _checks.choice(op, "projection_dim", projection_dim, ("auto",))
        elif projection_dim is not None:
            _checks.integer(op, "projection_dim", projection_dim, 1)
        if isinstance(start, str):
            _checks.choice(op, "start", start, ("random",))
        else:
            _checks.integer(op, "start", start, 0)
        self.ratio = float(ratio)
        self.num_samples = None if num_samples is None else _checks.integer(op, "num_samples", num_samples, 1)
        if radius is not None and not (isinstance(radius, int | float) and 0 <= radius < math.inf):
            raise ValueError(f"{op}: expected radius to be a finite distance, not negative, got {radius!r}.")
        self.radius = None if radius is None else float(radius)
        self.projection_dim = projection_dim
        self.projection = _checks.choice(op, "projection", projection, ("sparse", "gaussian"))
        self.start = start
        self.seed = _checks.integer(op, "seed", seed, 0, 2**64 - 1)
        self.progress = progress

    def __repr__(self) -> str:
        """The constructor's call."""
        size = f"ratio={self.ratio}" if self.num_samples is None else f"num_samples={self.num_samples}"
        if self.radius is not None:
            size = f"radius={self.radius}" if self.num_samples is None else f"{size}, radius={self.radius}"
        return f"CoresetSampler({size}, projection_dim={self.projection_dim!r}, projection={self.projection!r}, start={self.start!r}, seed={self.seed})"

    def select(self, features: ArrayLike, *, initial_indices: Tensor | Sequence[int] | None = None) -> CoresetSelection:
        """Picks rows.

        Args:
            features: ``[N, D]`` float32, float16, bfloat16 or float64 (rounded to float32, with a warning), tensor or NumPy array.
            initial_indices: Rows that are in the coreset already, for example a finished selection of these features: they come first and count, ``start`` is
                not used, and the greedy order goes on from there.

        Returns:
            The selection, on the features' device.

        Raises:
            ValueError: No rows, ``num_samples`` larger than N, ``start`` or ``initial_indices`` not (different) rows, more of them than are to be kept, or a
                row with NaN or infinity (the message names the first).

        Cost: N * num_samples int8 products of 48 (rarely min(D, projection_dim)) terms, on the CPU about half of them. Memory beside the features: the
        projection (4 * projection_dim bytes a row) and at most three quarters of it again.
        """
        rows = _checks.features("CoresetSampler.select", "features", features).detach()
        num_rows = rows.shape[0]
        num_samples = self._num_samples(num_rows)
        initial = self._initial(num_rows, num_samples, initial_indices)
        if self.num_samples is None and self.radius is None and self.ratio == 1 and initial_indices is None:
            self._refuse_nonfinite(rows)
            distances = torch.full((num_rows,), math.nan, dtype=torch.float64, device=rows.device)
            distances[0] = math.inf
            return CoresetSelection(torch.arange(num_rows, device=rows.device), distances, 0.0)
        initial = initial.to(rows.device)
        rows = self._project(rows)
        codes = self._codes(rows, num_samples)
        state = torch.full((num_rows,), math.inf, dtype=torch.float64, device=rows.device)
        ops.add_picks(rows, initial, state, codes)
        measured = math.inf if initial_indices is None else math.nan
        picked = [initial]
        distances = torch.full((len(initial),), measured, dtype=torch.float64, device=rows.device)
        slices = self._slices(rows, state, codes, num_samples - len(initial))
        picked += [indices for indices, _ in slices]
        distances = torch.cat([distances, ops.square_root(torch.cat([distances.new_empty(0)] + [values for _, values in slices]))])
        return self._stop_at_radius(torch.cat(picked), distances, len(initial), math.sqrt(max(float(state.max()), 0.0)))

    def sample(self, features: ArrayT) -> ArrayT:
        """The selected rows, ``features[select(features).indices]``: ``[num_samples, D]``, dtype and device of ``features``."""
        indices = self.select(features).indices
        if isinstance(features, np.ndarray):
            rows: npt.NDArray[Any] = features[indices.cpu().numpy()]
            return rows
        return features[indices]

    def _num_samples(self, num_rows: int) -> int:
        if num_rows == 0:
            raise ValueError("CoresetSampler.select: expected features to have at least one row, got none.")
        if self.num_samples is None:
            return num_rows if self.radius is not None else max(1, int(self.ratio * num_rows))
        if self.num_samples > num_rows:
            raise ValueError(f"CoresetSampler.select: expected num_samples to be at most the rows of features ({num_rows}), got {self.num_samples}.")
        return self.num_samples

    def _initial(self, num_rows: int, num_samples: int, initial_indices: Tensor | Sequence[int] | None) -> Tensor:
        """The rows to begin with, int64 on the CPU."""
        op = "CoresetSampler.select"
        if initial_indices is None:
            if self.start == "random":
                first = _random.start_index(self.seed, num_rows)
            else:
                first = _checks.integer(op, "start", self.start, 0, num_rows - 1, " (a row of features)")
            return torch.tensor([first], dtype=torch.int64, device="cpu")
        rows = torch.as_tensor(initial_indices, device="cpu")
        if rows.ndim != 1 or rows.is_floating_point() or rows.numel() == 0:
            raise ValueError(f"{op}: expected initial_indices to be a list of at least one row, got {_checks.describe(rows)}.")
        rows = rows.to(torch.int64)
        if int(rows.min()) < 0 or int(rows.max()) >= num_rows or len(torch.unique(rows)) != len(rows):
            raise ValueError(f"{op}: expected initial_indices to be different rows of features (0 to {num_rows - 1}), got {rows.tolist()[:8]}.")
        if len(rows) > num_samples:
            raise ValueError(f"{op}: expected initial_indices to be at most the rows to keep ({num_samples}), got {len(rows)}.")
        return rows

    def _refuse_nonfinite(self, rows: Tensor) -> None:
        bad = ops.first_nonfinite_row(rows)
        if bad >= 0:
            raise ValueError(f"CoresetSampler.select: expected features to be finite, got NaN or infinity in row {bad} (the first such row).")

    def _project(self, rows: Tensor) -> Tensor:
        num_rows, dim = rows.shape
        target: int | str | None = self.projection_dim
        if target == "auto":
            from sklearn.random_projection import johnson_lindenstrauss_min_dim

            target = int(johnson_lindenstrauss_min_dim(num_rows, eps=0.9))
        if not isinstance(target, int) or dim <= target:
            return rows
        make = _random.sparse_projection_matrix if self.projection == "sparse" else _random.gaussian_projection_matrix
        return ops.random_projection(rows, torch.from_numpy(make(dim, target, self.seed)).to(rows.device))

    def _codes(self, rows: Tensor, num_samples: int) -> Tensor | None:
        """The int8 copy, where it saves more than it costs."""
        worthwhile = num_samples >= _FEWEST_PICKS and rows.shape[0] >= _FEWEST_ROWS and rows.shape[1] in _CODED_DIMS
        return ops.coreset_codes(rows) if worthwhile else None

    def _slices(self, rows: Tensor, state: Tensor, codes: Tensor | None, count: int) -> list[tuple[Tensor, Tensor]]:
        """At most ``count`` picks, in calls short enough for a live progress bar and a prompt Ctrl-C. How they are cut does not matter to the result."""
        show = sys.stderr.isatty() if self.progress is None else self.progress
        slices: list[tuple[Tensor, Tensor]] = []
        size, done = max(1, _FIRST_SLICE // rows.shape[0]), 0
        lowered = torch.full((rows.shape[0],), -1, dtype=torch.int32, device=rows.device)
        with tqdm(total=count, desc="coreset", unit="pick", disable=not show) as bar:
            while done < count:
                size = min(size, count - done)
                began = time.perf_counter()
                if codes is None or _library.runs_cuda_kernels(rows.device):
                    slices.append(ops.greedy_coreset(rows, state, size, codes))
                else:
                    picks = torch.cat([indices for indices, _ in slices]) if slices else lowered.new_empty(0, dtype=torch.int64)
                    slices.append(ops.greedy_coreset_lazily(rows, state, lowered, picks, size, codes))
                seconds = time.perf_counter() - began
                done += size
                bar.update(size)
                if self.radius is not None and float(slices[-1][1][-1]) <= self.radius * self.radius:
                    break  # surely reached; _stop_at_radius finds the place
                size = max(1, min(2 * size, int(size * _SLICE_SECONDS / max(seconds, 1e-6))))
        return slices

    def _stop_at_radius(self, indices: Tensor, distances: Tensor, num_initial: int, radius: float) -> CoresetSelection:
        """Drops the picks that were made although every row was within ``self.radius`` already: a pick's distance is the covering radius before it."""
        if self.radius is not None:
            needless = (distances[num_initial:] <= self.radius).nonzero()
            if len(needless):
                end = num_initial + int(needless[0])
                return CoresetSelection(indices[:end], distances[:end], float(distances[end]))
        return CoresetSelection(indices, distances, radius)
