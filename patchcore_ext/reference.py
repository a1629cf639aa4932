"""The ops in plain float64 torch: the oracle that every kernel must equal bit for bit, and a text to read.

Sums run in the order of the exactness contract (16 lanes, then a tree), so results are the same numbers, not close ones. Memory and time are what they are:
use it on small inputs. Everything here is differentiable where the mathematics is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LANES = 16
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Canonical squared distance along the last dimension, with broadcasting.

    Lane l sums the squares of j = l, l + 16, l + 32, ...; the 16 lanes are added pairwise: +8, +4, +2, +1.

    Args:
        a: ``[..., D]`` of any floating dtype.
        b: ``[..., D]``.

    Returns:
        ``[...]`` float64.
    """
    difference = a.double() - b.double()
    squares = torch.nn.functional.pad(difference * difference, (0, -difference.shape[-1] % _LANES))
    squares = squares.reshape(*squares.shape[:-1], -1, _LANES)  # [..., D / 16, 16]
    lanes: Tensor = squares[..., 0, :]
    for chunk in range(1, squares.shape[-2]):
        lanes = lanes + squares[..., chunk, :]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded square roots of float64 ``[...]``: torch.sqrt's gradient with the value of math.sqrt (torch.sqrt errs in the last bit)."""
    root = values.sqrt()
    exact = torch.tensor([math.sqrt(value) for value in values.detach().flatten().tolist()], dtype=torch.float64, device=values.device).view_as(values)
    return torch.where(root == exact, root, root + (exact - root).detach())


def random_projection(features: Tensor, matrix: Tensor) -> Tensor:
    """``float32(sum_k features[:, k] * matrix[:, k])``, k ascending, in float64.

    Args:
        features: ``[N, D]``.
        matrix: ``[projection_dim, D]`` float64.

    Returns:
        ``[N, projection_dim]`` float32.
    """
    rows = features.double()
    total = rows.new_zeros(rows.shape[0], matrix.shape[0])
    for k in range(rows.shape[1]):
        total = total + rows[:, k, None] * matrix[None, :, k]
    return total.float()


def update_min_distances(features: Tensor, centers: Tensor, min_distances: Tensor) -> Tensor:
    """The smaller of ``min_distances`` (squared, float64 ``[N]``) and the squared distance to the nearest of ``centers`` ``[m, D]``, as a new tensor."""
    for center in centers:
        min_distances = torch.minimum(min_distances, squared_distance(features, center))
    return min_distances


def greedy_coreset(features: Tensor, min_distances: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy k-center picks: Eq. (5) and Algorithm 1, Roth et al. 2022, arXiv:2106.08265.

    Args:
        features: ``[N, D]``.
        min_distances: ``[N]`` float64, squared distances to the picks so far; -1 marks a pick.
        count: Number of further picks.

    Returns:
        ``indices`` int64 ``[count]``, ``squared_distances`` float64 ``[count]`` and the new ``min_distances``.
    """
    values = min_distances.clone()
    indices, squared_distances = [], []
    for _ in range(count):
        index = int(values.eq(values.max()).nonzero()[0])  # the lowest index among equals
        indices.append(index)
        squared_distances.append(float(values[index]))
        values[index] = -1.0
        values = update_min_distances(features, features[index, None], values)
    device = features.device
    return (
        torch.tensor(indices, dtype=torch.int64, device=device),
        torch.tensor(squared_distances, dtype=torch.float64, device=device),
        values,
    )


def nearest_neighbors(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows by canonical squared distance, ties to the lowest index.

    Args:
        queries: ``[Q, D]``.
        bank: ``[M, D]``.
        k: 1 <= k <= M.

    Returns:
        ``squared_distances`` float64 ``[Q, k]`` ascending and ``indices`` int64 ``[Q, k]``.
    """
    found = [squared_distance(query, bank).sort(stable=True) for query in queries]
    if not found:
        empty = queries.new_empty((0, k), dtype=torch.float64)
        return empty, empty.long()
    return torch.stack([values[:k] for values, _ in found]), torch.stack([indices[:k] for _, indices in found])


def exp_of_nonpositive(x: Tensor) -> Tensor:
    """exp(x) for x <= 0 in float64, below 1 ulp from the truth: range reduction by ln 2 and the Taylor polynomial, 0 below -708 (csrc/core/exp.h)."""
    k = (x * 1.4426950408889634 - 0.5).trunc()
    high, low = x - k * _LN2_HIGH, k * _LN2_LOW
    r = high - low
    c = (high - r) - low
    q = torch.full_like(r, 1.0 / math.factorial(13))
    for n in range(12, 1, -1):
        q = q * r + 1.0 / math.factorial(n)
    value = torch.ldexp(1.0 + (r + (r * r * q + c)), k.clamp(min=-1022.0))
    return torch.where(x < -708.0, torch.zeros_like(value), value)


def image_scores(squared_distances: Tensor, nearest_indices: Tensor, queries: Tensor, bank: Tensor, num_neighbors: int = 9) -> Tensor:
    """Eq. (6) and Eq. (7), Roth et al. 2022, arXiv:2106.08265.

    Args:
        squared_distances: ``[B, P]`` float64, each patch's squared distance to its nearest bank row.
        nearest_indices: ``[B, P]`` int64, that row.
        queries: ``[B * P, D]``.
        bank: ``[M, D]``.
        num_neighbors: b, reduced to M when larger.

    Returns:
        ``[B]`` float32.
    """
    num_neighbors = min(num_neighbors, bank.shape[0])
    patches = queries.reshape(*squared_distances.shape, -1)  # [B, P, D]
    scores = []
    for values, nearest, features in zip(squared_distances, nearest_indices, patches, strict=True):
        patch = int(values.eq(values.max()).nonzero()[0])  # Eq. (6): the lowest patch among equals
        largest = square_root(values[patch])
        if num_neighbors == 1:
            scores.append(largest)
            continue
        center = int(nearest[patch])
        others = squared_distance(bank[center], bank).sort(stable=True).indices
        others = others[others != center][: num_neighbors - 1]
        neighborhood = torch.cat([nearest[patch, None], others])  # [b], m* first
        distances = square_root(squared_distance(features[patch], bank[neighborhood]))
        weights = exp_of_nonpositive(distances - distances.max())
        total = torch.zeros_like(weights[0])
        for weight in weights:  # slot order
            total = total + weight
        scores.append((1.0 - weights[0] / total) * largest)  # Eq. (7)
    return torch.stack(scores).float() if scores else squared_distances.new_empty(0, dtype=torch.float32)


def score_patches(queries: Tensor, bank: Tensor, num_patches: int, num_neighbors: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Image scores float32 ``[B]``, patch distances float32 ``[B, P]`` and nearest bank rows int64 ``[B, P]`` of patches ``[B * P, D]``, P = num_patches."""
    squared, nearest = (found.view(-1, num_patches) for found in nearest_neighbors(queries, bank, 1))
    return image_scores(squared, nearest, queries, bank, num_neighbors), square_root(squared).float(), nearest
