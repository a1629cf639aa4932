"""The kernels as functions; each is also registered as ``torch.ops.patchcore_ext.<name>``.

All of them keep one contract (docs/exactness.md): every decision is made on the canonical squared distance
``d2(a, b) = sum_j (a_j - b_j)^2``, computed in float64 in one fixed order, ties going to the lowest index. Results are the same bits for every thread count,
instruction set, batch size and chunk size. float16 and bfloat16 rows are exact inputs; autocast changes nothing. :mod:`patchcore_ext.reference` computes the
same in plain torch.

Gradients: the functional ops raise NotImplementedError in backward; ``update_min_distances`` and ``greedy_coreset`` detach their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _fake, _library, _rotation  # noqa: F401  (_fake registers the fake kernels)
from ._checks import ArrayLike

__all__ = [
    "add_picks",
    "coreset_codes",
    "first_nonfinite_row",
    "greedy_coreset",
    "greedy_coreset_lazily",
    "image_scores",
    "nearest_neighbors",
    "prepare_bank",
    "random_projection",
    "score_patches",
    "square_root",
    "update_min_distances",
]

_ops = torch.ops.patchcore_ext

_FEWEST_ROWS, _FEWEST_DIMS, _MOST_DIMS = 64, 8, 32768  # csrc/core/knn.h: what a bank must have to be prepared
_FEWEST_VALUES = 2048  # so that tiles that are not full take no more than their share of memory
_FEWEST_ROWS_CUDA = 256  # there, fewer are compared at once in any case
_MANY_QUERIES = 64  # for so many, preparing a bank pays within one call


def first_nonfinite_row(features: ArrayLike) -> int:
    """The first row that holds a NaN or an infinity, or -1.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.

    Equivalent to:
        ``bad = (~torch.isfinite(features)).any(1).nonzero(); int(bad[0]) if len(bad) else -1``
    """
    rows = _checks.features("first_nonfinite_row", "features", features).detach()
    return int(_ops.first_nonfinite_row(rows))


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded square roots: distances from squared distances, with the same bits everywhere.

    torch.sqrt is not correctly rounded on the CPU (it differs in the last bit of 1% of float64 values), and not the same on all devices.

    Args:
        values: ``[...]`` float64, not negative.

    Returns:
        ``[...]`` float64, contiguous. ``.float()`` of it rounds once more: the distances that this package returns as float32.

    Equivalent to:
        ``torch.sqrt(values)``, up to the last bit.
    """
    if not isinstance(values, Tensor) or values.dtype != torch.float64:
        raise TypeError(f"square_root: expected values to be a float64 tensor, got {_checks.describe(values)}.")
    _checks.on_device("square_root", "values", values)
    result: Tensor = _ops.square_root(values)
    return result


def random_projection(features: ArrayLike, matrix: Tensor) -> Tensor:
    """Linear projection of feature rows with the same bits on every machine.

    ``y[i, j] = float32(sum_k x[i, k] * matrix[j, k])``: k ascending, float64, every product and sum rounded on its own, one rounding to float32.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.
        matrix: ``[projection_dim, D]`` float64; zero entries cost nothing. See ``CoresetSampler`` for the random ones.

    Returns:
        ``[N, projection_dim]`` float32.

    Raises:
        ValueError: Shapes do not fit, features hold NaN or infinity (names the first such row), or a result exceeds float32.

    Cost: one multiply-add for each row and nonzero entry of the matrix.

    Equivalent to:
        ``(features.double() @ matrix.T).float()``, up to the order of summation.
    """
    rows = _checks.features("random_projection", "features", features)
    if not isinstance(matrix, Tensor) or matrix.dtype != torch.float64 or matrix.ndim != 2:
        raise ValueError(f"random_projection: expected matrix to be a float64 tensor [projection_dim, dim], got {_checks.describe(matrix)}.")
    _checks.same_dim("random_projection", "matrix", matrix, "features", rows)
    with _checks.native_errors():
        result: Tensor = _ops.random_projection(rows, matrix.contiguous())
    return result


def _check_min_distances(op: str, min_distances: Tensor, num_rows: int) -> None:
    if (
        not isinstance(min_distances, Tensor)
        or min_distances.dtype != torch.float64
        or list(min_distances.shape) != [num_rows]
        or not min_distances.is_contiguous()
    ):
        raise ValueError(f"{op}: expected min_distances to be a contiguous float64 tensor of shape [{num_rows}], got {_checks.describe(min_distances)}.")


def update_min_distances(features: ArrayLike, centers: ArrayLike, min_distances: Tensor) -> Tensor:
    """Lowers each row's squared distance to its nearest centre by further centres, in place (the inner step of greedy k-center).

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.
        centers: ``[m, D]``, of any of these dtypes.
        min_distances: ``[N]`` float64, canonical *squared* distances so far; start with infinity. Rows marked -1 (already picked) stay as they are.

    Returns:
        ``min_distances``, the same tensor.

    Raises:
        ValueError: Shapes do not fit, or a row is not finite (names the first).

    Cost: N * m * D multiply-adds.

    Equivalent to:
        ``min_distances = torch.minimum(min_distances, torch.cdist(features.double(), centers.double()).square().amin(1))``
    """
    op = "update_min_distances"
    rows = _checks.features(op, "features", features).detach()
    added = _checks.features(op, "centers", centers).detach()
    _checks.same_dim(op, "centers", added, "features", rows)
    _check_min_distances(op, min_distances, rows.shape[0])
    with _checks.native_errors():
        _ops.update_min_distances(rows, added, min_distances)
    return min_distances


def coreset_codes(features: ArrayLike) -> Tensor:
    """An int8 copy of feature rows with which :func:`greedy_coreset` picks many rows a pass instead of one: the same picks, sooner.

    Codes of all coordinates, and of the leading principal directions where there are at least 96; bounds of csrc/core/filter.h decide with them which canonical
    distances need not be computed.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16, 1 <= N, D <= 32768.

    Returns:
        uint8, about D + 56 bytes a row (0.38 of float32 features at D = 128); opaque, and good for these features only.

    Raises:
        ValueError: Shapes do not fit, or a row is not finite (names the first).

    Cost: an eigendecomposition [D, D] of a sample, and N * 48 * D multiply-adds.
    """
    op = "coreset_codes"
    rows = _checks.features(op, "features", features).detach()
    if rows.shape[0] == 0:
        raise ValueError(f"{op}: expected features to have at least one row, got none.")
    with _checks.native_errors():
        codes: Tensor = _ops.coreset_codes(rows, *_rotation.center_and_prefix(rows))
    return codes


def add_picks(features: ArrayLike, picks: Tensor, min_distances: Tensor, codes: Tensor | None = None) -> Tensor:
    """Makes rows centres as if :func:`greedy_coreset` had picked them: lowers the squared distances of all rows by them, and marks them.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.
        picks: int64 ``[count]``, rows of ``features``.
        min_distances: ``[N]`` float64, as for :func:`greedy_coreset`. Updated in place.
        codes: What :func:`coreset_codes` gives for these features: pairs are filtered. None: every pair is evaluated. The result is the same.

    Returns:
        ``min_distances``, the same tensor.

    Raises:
        ValueError: Shapes do not fit, a pick is not a row, or a row is not finite (names the first).

    Equivalent to:
        ``update_min_distances(features, features[picks], min_distances); min_distances[picks] = -1``
    """
    op = "add_picks"
    rows = _checks.features(op, "features", features).detach()
    _check_min_distances(op, min_distances, rows.shape[0])
    if not isinstance(picks, Tensor) or picks.dtype != torch.int64 or picks.ndim != 1:
        raise ValueError(f"{op}: expected picks to be int64 [count], got {_checks.describe(picks)}.")
    outside = picks[(picks < 0) | (picks >= rows.shape[0])]
    if outside.numel():
        raise ValueError(f"{op}: expected picks to lie in [0, {rows.shape[0]}), the rows of features, got {int(outside[0])}.")
    if codes is None:
        update_min_distances(rows, rows[picks], min_distances)
        min_distances[picks] = -1.0
        return min_distances
    with _checks.native_errors():
        _ops.add_picks(rows, picks.contiguous(), min_distances, codes)
    return min_distances


def greedy_coreset(features: ArrayLike, min_distances: Tensor, count: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The next ``count`` picks of the greedy k-center coreset: Eq. (5) and Algorithm 1, Roth et al. 2022, arXiv:2106.08265.

    Each pick is the row with the largest squared distance to its nearest pick so far, the lowest index among equals. ``min_distances`` carries the state from
    one call to the next, so that a long selection can be cut into slices of picks; the slices change nothing.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.
        min_distances: ``[N]`` float64, canonical squared distances to the picks so far; -1 marks a pick. Updated in place.
        count: Number of picks, at most the number of rows not yet picked.
        codes: What :func:`coreset_codes` gives for these features: the batched algorithm. None: one pass over all rows a pick. The result is the same.

    Returns:
        ``indices`` int64 ``[count]`` in the order of picking, and ``squared_distances`` float64 ``[count]``, each row's value when it was picked.

    Raises:
        ValueError: Shapes do not fit, count is out of range, or a row is not finite (names the first).

    Cost: N * count * D multiply-adds; with codes, 48 (rarely D) int8 ones instead of D in float64.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> state = torch.full([4], torch.inf, dtype=torch.float64)
        >>> greedy_coreset(features, state, 3)[0].tolist()
        [0, 3, 1]
    """
    op = "greedy_coreset"
    rows = _checks.features(op, "features", features).detach()
    _check_min_distances(op, min_distances, rows.shape[0])
    _checks.integer(op, "count", count, 0, rows.shape[0], " (the rows of features)")
    with _checks.native_errors():
        indices, squared_distances = _ops.greedy_coreset(rows, min_distances, count, codes)
    return indices, squared_distances


def greedy_coreset_lazily(features: ArrayLike, min_distances: Tensor, lowered: Tensor, picks: Tensor, count: int, codes: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`greedy_coreset`, the same picks, for about half the work: rows that cannot be picked soon are left behind. CPU.

    What is left in ``min_distances`` is exact for rows whose ``lowered`` is -1; they have the largest values. For the others it is an upper bound.

    Args:
        features: ``[N, D]`` float32, float16 or bfloat16.
        min_distances: ``[N]`` float64, as for :func:`greedy_coreset`. Updated in place.
        lowered: ``[N]`` int32, all -1 before the first call. Updated in place.
        picks: int64, those of all earlier calls with these ``lowered``, in order.
        count: Number of picks, at most the number of rows not yet picked.
        codes: What :func:`coreset_codes` gives for these features.

    Returns:
        ``indices`` int64 ``[count]`` in the order of picking, and ``squared_distances`` float64 ``[count]``, each row's value when it was picked.

    Raises:
        ValueError: Shapes do not fit, count is out of range, ``lowered`` does not lie in [-1, len(picks)], or a row is not finite (names the first).
    """
    op = "greedy_coreset_lazily"
    rows = _checks.features(op, "features", features).detach()
    _check_min_distances(op, min_distances, rows.shape[0])
    _checks.integer(op, "count", count, 0, rows.shape[0], " (the rows of features)")
    with _checks.native_errors():
        indices, squared_distances = _ops.greedy_coreset_lazily(rows, min_distances, lowered, picks, count, codes)
    return indices, squared_distances


def prepare_bank(bank: ArrayLike) -> list[Tensor]:
    """Int8 copies of a memory bank with which :func:`nearest_neighbors` need not compute most distances: the same neighbours, sooner.

    Args:
        bank: ``[M, D]`` float32, float16 or bfloat16, M >= 1.

    Returns:
        uint8 tensors, opaque, good for this bank only, on this kind of processor (AVX2 has other codes than other instruction sets, and CUDA than the CPU); at
        most 0.75 of the bank in float32. None where it would not pay: fewer than 64 rows (256 on CUDA), 8 dimensions or 2048 values, or more than 32768
        dimensions.

    Raises:
        ValueError: The bank is empty, not ``[M, D]``, or not finite (names the first such row).

    Cost: an eigendecomposition of a sample, and 128 to 512 int16 multiply-adds a value; see ``PatchScorer.describe``.
    """
    op = "prepare_bank"
    rows = _checks.features(op, "bank", bank).detach()
    if rows.shape[0] == 0:
        raise ValueError(f"{op}: expected bank to have at least one row, got none.")
    if not _can_be_prepared(rows):
        return []
    with _checks.native_errors():
        return [_ops.prepare_bank(rows, *_rotation.center_and_prefixes(rows))]


def nearest_neighbors(queries: ArrayLike, bank: ArrayLike, k: int, prepared: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of each query, exactly.

    Args:
        queries: ``[Q, D]`` float32, float16 or bfloat16.
        bank: ``[M, D]``, of any of these dtypes.
        k: 1 <= k <= M.
        prepared: What :func:`prepare_bank` gave for this bank. Empty: where there is much to search, int8 copies are made for this call alone, which costs
            about as much as 64 queries; else, and in what torch.export makes, all distances are computed. The result is the same.

    Returns:
        ``squared_distances`` float64 ``[Q, k]``, ascending, canonical, and ``indices`` int64 ``[Q, k]``; equal distances in the order of their indices.

    Raises:
        ValueError: Shapes do not fit, k is out of range, or a row is not finite (names the first).

    Cost: at most Q * M * D multiply-adds, in int8 with a prepared bank, and a fraction where rows differ mostly along few directions, as features do. The
        [Q, M] matrix is never stored.

    Equivalent to:
        ``torch.cdist(queries.double(), bank.double()).square().topk(k, largest=False)``, with ties to the lowest index.

    Example:
        >>> import torch
        >>> squared_distances, indices = nearest_neighbors(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 1.0], [0.0, 0.0]]), k=1)
        >>> squared_distances.item(), indices.item()
        (1.0, 1)
    """
    op = "nearest_neighbors"
    asked = _checks.features(op, "queries", queries)
    known = _checks.features(op, "bank", bank)
    _checks.same_dim(op, "queries", asked, "bank", known)
    _checks.integer(op, "k", k, 1, known.shape[0], " (the rows of the bank)")
    with _checks.native_errors(op):
        squared_distances, indices = _ops.nearest_neighbors(asked, known, k, _codes_for(op, asked, known, prepared))
    return squared_distances, indices


def _codes_for(op: str, queries: Tensor, bank: Tensor, prepared: Sequence[Tensor]) -> Tensor | None:
    """Those of ``prepared``, or for this search alone where that pays."""
    codes = _codes_of(op, prepared)
    # Not while exporting: a program for any number of queries must not ask for it.
    if codes is None and _pays_at_once(bank) and not torch.compiler.is_exporting() and queries.shape[0] >= _MANY_QUERIES:
        codes = _ops.prepare_bank(bank.detach(), *_rotation.center_alone(bank.detach()))
    return codes


def _codes_of(op: str, prepared: Sequence[Tensor]) -> Tensor | None:
    if len(prepared) > 1:
        raise ValueError(f"{op}: expected prepared to be what prepare_bank gave, got {len(prepared)} tensors.")
    return prepared[0] if prepared else None


def _pays_at_once(bank: Tensor) -> bool:
    """Whether preparing a bank can pay within one call; the CUDA kernels make the codes of one themselves."""
    return _can_be_prepared(bank) and not _library.runs_cuda_kernels(bank.device)


def _can_be_prepared(bank: Tensor) -> bool:
    fewest = _FEWEST_ROWS_CUDA if bank.is_cuda else _FEWEST_ROWS
    return bank.shape[0] >= fewest and bank.numel() >= _FEWEST_VALUES and _FEWEST_DIMS <= bank.shape[1] <= _MOST_DIMS


def image_scores(
    squared_distances: Tensor, nearest_indices: Tensor, queries: ArrayLike, bank: ArrayLike, num_neighbors: int = 9, prepared: Sequence[Tensor] = ()
) -> Tensor:
    """The image-level anomaly score: Eq. (6) and Eq. (7), Roth et al. 2022, arXiv:2106.08265.

    The patch with the largest distance s* to its nearest bank row m* (the lowest patch among equals) gives
    ``s = (1 - exp(d(t, m*)) / sum_{m in N_b(m*)} exp(d(t, m))) * s*``, where N_b(m*) are the b bank rows nearest to m*, m* itself always the first.

    Args:
        squared_distances: ``[B, P]`` float64, as :func:`nearest_neighbors` gives them with k = 1.
        nearest_indices: ``[B, P]`` int64, likewise.
        queries: ``[B * P, D]``, the patches of all images.
        bank: ``[M, D]``.
        num_neighbors: b; a larger one than M is reduced to M. With 1 the score is s*.
        prepared: What :func:`prepare_bank` gave for this bank; the result is the same.

    Returns:
        ``[B]`` float32, in units of distance.

    Raises:
        ValueError: Shapes do not fit, an index is outside the bank, or a row met on the way is not finite.

    Cost: one search of the bank an image, for N_b(m*).

    Equivalent to:
        :func:`patchcore_ext.reference.image_scores`
    """
    op = "image_scores"
    asked = _checks.features(op, "queries", queries)
    known = _checks.features(op, "bank", bank)
    _checks.same_dim(op, "queries", asked, "bank", known)
    _checks.integer(op, "num_neighbors", num_neighbors, 1)
    for argument, value, dtype in (
        ("squared_distances", squared_distances, torch.float64),
        ("nearest_indices", nearest_indices, torch.int64),
    ):
        if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != 2 or value.shape[1] < 1:
            raise ValueError(f"{op}: expected {argument} to be {str(dtype).removeprefix('torch.')} [batch, patches >= 1], got {_checks.describe(value)}.")
    with _checks.native_errors():
        result: Tensor = _ops.image_scores(squared_distances.contiguous(), nearest_indices.contiguous(), asked, known, num_neighbors, _codes_of(op, prepared))
    return result


def score_patches(
    queries: ArrayLike, bank: ArrayLike, num_patches: int, num_neighbors: int = 9, prepared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Image scores, patch distances and nearest rows in one call: what ``PatchScorer`` gives.

    Args:
        queries: ``[B * P, D]`` float32, float16 or bfloat16, the patches of all images.
        bank: ``[M, D]``, M >= 1.
        num_patches: P of an image, at least 1.
        num_neighbors: b of Eq. (7), as for :func:`image_scores`.
        prepared: What :func:`prepare_bank` gave for this bank, as for :func:`nearest_neighbors`; the result is the same.

    Returns:
        ``image_scores`` float32 ``[B]``, ``patch_distances`` float32 ``[B, P]`` and ``nearest_indices`` int64 ``[B, P]``.

    Raises:
        ValueError: Shapes do not fit, or a row is not finite (names the first).

    Cost: that of :func:`nearest_neighbors` with k = 1, and one more search an image.

    Equivalent to:
        :func:`nearest_neighbors` with k = 1, :func:`square_root` of what it finds as float32, and :func:`image_scores`. On CUDA, and in what torch.export
        makes, these three are called.
    """
    op = "score_patches"
    asked = _checks.features(op, "queries", queries)
    known = _checks.features(op, "bank", bank)
    _checks.same_dim(op, "queries", asked, "bank", known)
    _checks.integer(op, "num_patches", num_patches, 1)
    _checks.integer(op, "num_neighbors", num_neighbors, 1)
    return score_checked(op, asked, known, num_patches, num_neighbors, prepared)


def score_checked(op: str, queries: Tensor, bank: Tensor, num_patches: int, num_neighbors: int, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`score_patches` of arguments that ``op`` has checked."""
    if _library.runs_cuda_kernels(queries.device) or _library.runs_cuda_kernels(bank.device) or torch.compiler.is_exporting():
        squared, nearest = (found.view(-1, num_patches) for found in nearest_neighbors(queries, bank, 1, prepared))
        return image_scores(squared, nearest, queries, bank, num_neighbors, prepared), square_root(squared).float(), nearest
    with _checks.native_errors(op):
        scores, distances, nearest = _ops.score_patches.default(queries, bank, num_patches, num_neighbors, _codes_for(op, queries, bank, prepared))
    return scores, distances, nearest
