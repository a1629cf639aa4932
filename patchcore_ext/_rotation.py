"""Prefixes of rotations by which the filters of the coreset and of the search look first (csrc/core/filter.h, sections 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import _library, _random

_SAMPLE_ROWS = 4096
_PREFIX = 47  # with the norm of the rest as one more coordinate: 48 codes, twelve words
_PREFIX_DIMS = range(96, 4097)  # below, a prefix saves nothing; above, the eigendecomposition costs more than it saves


def _median(sample: Tensor) -> Tensor:
    """The lower median of each column; on CUDA by sorting, as torch has no deterministic median there and may have been told to refuse it."""
    return sample.sort(0).values[(sample.shape[0] - 1) // 2] if sample.is_cuda else sample.median(0).values


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
    center = _median(sample)
    dim = rows.shape[1]
    if dim not in _PREFIX_DIMS or _library.runs_cuda_kernels(rows.device):  # there, all coordinates are compared at once
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


# Lengths of the prefixes, of which the first is taken that leaves at most such a share of the variance; with the norm of the rest as one more coordinate, and
# the short one's codes padded in the long one, they are whole cache lines of codes. Each output costs a query dim multiply-adds, which few rows do not earn
# back. The scan ends early for most rows (csrc/core/cpu/stages.h), so the rest of a longer prefix costs little; where AMX compares all codes at once, the
# lengths are those of whole tile registers.
#
# What the scan leaves is looked up by a long prefix, or by all coordinates, which need no projection and leave hardly a row, but are longer. Measured on
# ResNet18 features, with AVX2 and AVX-512: maps side by side at D = 384 to 1536 and neighbourhoods pooled to 656 and 1024, banks of 1,568 to 156,800 rows.
_SHORT, _SHORT_REST = (63, 95, 127, 159, 191), 0.11
_SHORT_ROWS, _FEW_ROWS_REST = 4096, 0.16  # fewer rows: such a share
_LONG, _LONG_REST = (126, 190, 254, 382, 510), 0.066
# All coordinates: up to so many dimensions anywhere, more where a look-up takes at most so long; up to so many rows, which lie in the caches for the most part.
_WHOLE_DIMS, _WHOLE_NANOSECONDS, _WHOLE_ROWS = 384, 21, 2**16
_CUDA_LENGTHS = (63, 191)  # csrc/core/cuda/kernels.h
_PREPARED_ROWS = 256  # below, not worth the preparation
_PREPARED_ROWS_CUDA = 1024
_PREPARED_SHARE = 0.75  # of the bank in float32: the most that its codes, a matrix among them, may take
_PREPARED_DIMS = range(192, 8193)
_POWER_STEPS = 5
_UNIT = 2**14
_MOST_ENTRY = 16255  # csrc/core/cuda/codes.cuh, kLargestPlaneValue
_AXES, _TILE = 16, 64  # of the order of the rows


def center_alone(bank: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
    """As :func:`center_and_prefixes`, without prefixes: for a bank that is used once."""
    step = max(1, bank.shape[0] // _SAMPLE_ROWS)
    center = _median(bank[::step][:_SAMPLE_ROWS].double())
    return center, center.new_zeros((0, bank.shape[1]), dtype=torch.int16), 0, torch.arange(bank.shape[0], dtype=torch.int32, device=bank.device)


def center_and_prefixes(bank: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
    """Where the rows of a memory bank are, and its one or two prefixes.

    The choice decides how much the search has to look at, never what it finds. They span leading principal directions of a sample, found by subspace
    iteration. They are turned at random within each stage of the short prefix (csrc/core/cpu/stages.h) and behind it; on CUDA, within each prefix.

    Args:
        bank: ``[M, D]`` float32, float16 or bfloat16, M >= 1.

    Returns:
        ``center`` float64 ``[D]``, a median; ``matrix`` int16 ``[outputs, D]``, of which the first ``short`` rows make the short prefix, and all the long one
        if there are more; ``short``; and an order of the rows, int32 ``[M]``. Divided by 2^14 the matrix has no singular value above 1. It is empty where a
        prefix would not pay. On CUDA the two prefixes lie one behind the other, and each has no singular value above 1.
    """
    without = center_alone(bank)
    center = without[0]
    dim = bank.shape[1]
    on_cuda = _library.runs_cuda_kernels(bank.device)
    if dim not in _PREPARED_DIMS or bank.shape[0] < (_PREPARED_ROWS_CUDA if on_cuda else _PREPARED_ROWS):
        return without
    most = 2 * dim // 3
    whole = bank.shape[0] <= _WHOLE_ROWS and (dim <= _WHOLE_DIMS or _library.look_up_nanoseconds(dim) <= _WHOLE_NANOSECONDS)
    shorts = [length for length in _SHORT if (length + 1) % _library.scan_step() == 0 and length < most]
    shorts = [length for length in shorts if (_fits(bank, length, length) if whole else _longs(bank, length, most))]
    if not on_cuda and not shorts:
        return without
    deviations = bank[:: max(1, bank.shape[0] // _SAMPLE_ROWS)][:_SAMPLE_ROWS].double() - center  # [S, D]
    scale = deviations.abs().max()
    if not (bool(scale > 0) and bool(scale.isfinite())):
        return without
    deviations = (deviations / scale).float()
    if on_cuda:
        short, long = _CUDA_LENGTHS
        directions, _ = _principal_directions(deviations, long)
        matrix = torch.cat([_integer_contraction([part]) for part in (directions[:, :short], directions)])
    else:
        directions, rest = _principal_directions(deviations, min(_SHORT[-1] if whole else _LONG[2], most))
        if not whole and rest[-1] > _LONG_REST and most > _LONG[2]:
            directions, rest = _principal_directions(deviations, min(_LONG[-1], most))
        stages = _library.stage_codes(bank.shape[0])
        short = _shortest(shorts, _short_rest(bank.shape[0], bool(stages)), rest)
        long = short if whole else _shortest(_longs(bank, short, most), _LONG_REST, rest)
        ends = [*(end for end in stages if end < short), short, *([] if whole else [long])]
        matrix = _integer_contraction([directions[:, begin:end] for begin, end in pairwise([0, *ends])])
    order = _neighborly_order(((bank.float() - center.float()) @ directions[:, :_AXES].float()).cpu()).to(bank.device)
    return center, matrix, short, order


def _longs(bank: Tensor, short: int, most: int) -> list[int]:
    """Lengths of a long prefix that a bank ``[M, D]`` may have beside a short one."""
    return [length for length in (min(length, most) for length in _LONG) if length > short and _fits(bank, short, length)]


def _short_rest(rows: int, staged: bool) -> float:
    """The share of the variance that the short prefix may leave: a larger one where rows are few, or where all of its codes are scanned and come from far."""
    return _FEW_ROWS_REST if rows < _SHORT_ROWS or (rows > _WHOLE_ROWS and not staged) else _SHORT_REST


def _fits(bank: Tensor, short: int, long: int) -> bool:
    """Whether the codes of a bank ``[M, D]`` with prefixes of these lengths stay within their share of memory (csrc/core/cpu/bank_layout.cpp).

    As long as the short one: there is no long one, all coordinates are looked up instead.
    """
    rows, dim = bank.shape
    codes = dim + 4 + short + 4 + (dim if long == short else long) + 4  # of a row in all its views
    about = 40  # starts, norms, residuals and places of a row
    return (long + 63) // 64 * 64 * 2 * (dim + 1) + -(-rows // _TILE) * _TILE * (codes + about) + 8 * dim + 4096 <= _PREPARED_SHARE * 4 * rows * dim


def _shortest(lengths: Sequence[int], share: float, rest: Tensor) -> int:
    """The first length behind which at most such a share of the variance is left, or the last that there are directions for."""
    return next((length for length in lengths if length <= len(rest) and rest[length - 1] <= share), min(lengths[-1], len(rest)))


def _neighborly_order(points: Tensor) -> Tensor:
    """A permutation, int32 ``[M]``, of points ``[M, axes]`` that puts neighbours together: halved along their principal direction, again and again."""
    points = points.double().nan_to_num(0, 0, 0)  # what overflowed lies anywhere, and squares of 1e30 are in range
    order, finished = [torch.arange(points.shape[0])], []
    while order:
        part = order.pop()
        tiles = -(-part.numel() // _TILE)
        if tiles == 1:
            finished.append(part)
            continue
        inside = points[part]  # [m, axes]
        inside = inside - inside.mean(0)
        direction = torch.linalg.eigh(inside.T @ inside).eigenvectors[:, -1]
        ranked = part[(inside @ direction).argsort(stable=True)]
        middle = tiles // 2 * _TILE  # whole tiles, all but the last
        order += [ranked[middle:], ranked[:middle]]
    return torch.cat(finished).to(torch.int32)


def _principal_directions(deviations: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors ``[D, count]`` of deviations^T deviations, largest first, and the share of the variance ``[count]`` that is left behind each.

    To the few digits that are of use here.
    """
    dim = deviations.shape[1]
    with torch.autocast(deviations.device.type, enabled=False):
        covariance = deviations.T @ deviations  # [D, D]
        start = torch.from_numpy(_random.gaussian_projection_matrix(dim, min(count + 16, dim), seed=2)).T.float().to(deviations.device)
        basis = torch.linalg.qr(start).Q  # [D, count + 16]
        for _ in range(_POWER_STEPS):
            basis = torch.linalg.qr(covariance @ basis).Q
        values, vectors = torch.linalg.eigh((basis.T @ covariance @ basis).double())
    directions = (basis.double() @ vectors).flip(1)[:, :count]
    return directions, 1 - values.cpu().flip(0)[:count].cumsum(0) / covariance.double().trace().cpu()


def _integer_contraction(parts: Sequence[Tensor]) -> Tensor:
    """int16 ``[outputs, D]``: each part's directions turned among themselves, times 2^14 and a little less: each row of |A A^T| sums to at most 2^28."""
    turned = []
    for seed, directions in enumerate(parts):
        outputs = directions.shape[1]
        mixing = torch.from_numpy(_random.gaussian_projection_matrix(outputs, outputs, seed=seed)).to(directions.device)
        turned.append((directions @ torch.linalg.qr(mixing).Q).T)
    rows = torch.cat(turned)  # [outputs, D]
    factor = 1.0
    while True:
        matrix: Tensor = (rows * (_UNIT * factor)).round()
        bound = max(float((matrix @ matrix.T).abs().sum(1).max()) / _UNIT**2, float(matrix.abs().max()) / _MOST_ENTRY)
        if bound <= 1:
            return matrix.to(torch.int16)
        factor *= 0.9999 / bound**0.5
