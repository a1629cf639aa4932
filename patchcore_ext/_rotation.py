"""The short prefix of a rotation by which the coreset's filter looks first (csrc/core/filter.h, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _random

_SAMPLE_ROWS = 4096
_PREFIX = 47  # with the norm of the rest as one more coordinate: 48 codes, twelve words
_PREFIX_DIMS = range(96, 4097)  # below, a prefix saves nothing; above, the eigendecomposition costs more than it saves


def center_and_prefix(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows are, and the directions in which they differ most.

    The choice decides how much the filter discards, never what is picked. Principal directions of a sample (torch.linalg.eigh), turned at random among
    themselves, so that no coordinate needs more of the codes' range than another; scaled so that the matrix is certainly a contraction.

    Args:
        rows: ``[N, D]`` float32, float16 or bfloat16, N >= 1.

    Returns:
        ``center`` float64 ``[D]``, a median, and ``matrix`` float64 ``[D, outputs]`` with no singular value above 1; outputs is 0 where D is small or huge.
    """
    step = max(1, rows.shape[0] // _SAMPLE_ROWS)
    sample = rows[::step][:_SAMPLE_ROWS].double()  # [S, D]
    center = sample.median(0).values
    dim = rows.shape[1]
    if dim not in _PREFIX_DIMS:
        return center, center.new_zeros(dim, 0)
    deviations = sample - center
    scale = deviations.abs().max()
    if not (bool(scale > 0) and bool(scale.isfinite())):  # all rows alike, or not finite: the caller's complaint comes later
        return center, center.new_zeros(dim, 0)
    deviations = deviations / scale  # the squares of 1e30 stay in range
    directions = torch.linalg.eigh(deviations.T @ deviations).eigenvectors.flip(1)[:, :_PREFIX]  # [D, outputs]
    mixing = torch.from_numpy(_random.gaussian_projection_matrix(_PREFIX, _PREFIX, seed=0)).to(rows.device)
    matrix = directions @ torch.linalg.qr(mixing).Q
    # Gershgorin: the largest singular value squared is at most the largest row sum of |A^T A|. Its own rounding is covered by 1e-9.
    bound = (matrix.T @ matrix).abs().sum(1).max()
    return center, matrix / (bound.sqrt() * (1 + 1e-9))
