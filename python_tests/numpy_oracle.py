"""The canonical kernels once more in plain NumPy, written from the contract alone, to hold both the kernels and ``reference.py`` to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def squared_distance(a: Array, b: Array) -> float:
    squares = (a - b) * (a - b)
    lanes = [0.0] * 16
    for j, square in enumerate(squares):
        lanes[j % 16] += square
    for width in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + width] for i in range(width)]
    return float(lanes[0])


def distances_to(query: Array, rows: Array) -> Array:
    return np.array([squared_distance(query, row) for row in rows])


def greedy(rows: Array, first: int, count: int) -> tuple[list[int], list[float], float]:
    picks, values = [first], [np.inf]
    smallest = distances_to(rows[first], rows)
    for _ in range(count - 1):
        smallest[picks] = -1.0
        picks.append(int(np.argmax(smallest)))  # the first of equals
        values.append(float(smallest[picks[-1]]))
        smallest = np.minimum(smallest, distances_to(rows[picks[-1]], rows))
    smallest[picks] = 0.0
    return picks, np.sqrt(values).tolist(), float(np.sqrt(smallest.max()))


def nearest(queries: Array, bank: Array, k: int) -> tuple[Array, npt.NDArray[np.int64]]:
    distances = np.stack([distances_to(query, bank) for query in queries])
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def image_score(patches: Array, bank: Array, num_neighbors: int) -> float:
    squared, rows = nearest(patches, bank, 1)
    patch = int(np.argmax(squared[:, 0]))
    largest, center = np.sqrt(squared[patch, 0]), int(rows[patch, 0])
    if min(num_neighbors, len(bank)) == 1:
        return float(largest)
    order = np.argsort(distances_to(bank[center], bank), kind="stable")
    neighborhood = [center, *order[order != center][: num_neighbors - 1]]
    distances = np.sqrt(distances_to(patches[patch], bank[neighborhood]))
    weights = np.exp(distances - distances.max())
    return float((1 - weights[0] / weights.sum()) * largest)
