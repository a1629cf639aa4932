"""patchcore_ext._random: the same numbers everywhere, and the distributions they should have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest
from sklearn.random_projection import SparseRandomProjection

from patchcore_ext import _random


def test_numbers_are_pinned() -> None:
    """These digits are a promise: a change would change every user's picks."""
    assert [_random.start_index(seed, 1_000_000) for seed in (0, 1, 2)] == PINNED_STARTS
    assert np.flatnonzero(_random.sparse_projection_matrix(384, 128, 0))[:6].tolist() == PINNED_SPARSE
    assert [value.hex() for value in _random.gaussian_projection_matrix(3, 1, 5)[0]] == PINNED_GAUSSIAN
    assert _random.permutation(0, 6).tolist() == PINNED_PERMUTATION


PINNED_STARTS = [11546, 303568, 488915]
PINNED_SPARSE = [17, 31, 34, 101, 212, 243]
PINNED_GAUSSIAN = ["0x1.26e6cd28508f2p-1", "-0x1.c6c519d2ec1d2p-3", "0x1.6c908d7e6280bp-1"]
PINNED_PERMUTATION = [2, 1, 3, 5, 0, 4]


def test_start_index_is_uniform() -> None:
    starts = [_random.start_index(seed, 5) for seed in range(5000)]
    counts = np.bincount(starts, minlength=5)
    assert counts.sum() == 5000
    assert np.all(np.abs(counts - 1000) < 5 * math.sqrt(5000 * 0.2 * 0.8))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@pytest.mark.parametrize("dim", [1, 2, 100, 384])
def test_sparse_matrix_has_sklearns_density_and_values(dim: int) -> None:
    matrix = _random.sparse_projection_matrix(dim, 128, seed=0)
    theirs = SparseRandomProjection(n_components=128, random_state=0).fit(np.zeros((1, dim)))
    density = theirs.density_
    assert np.allclose(np.unique(np.abs(matrix[matrix != 0])), np.unique(np.abs(theirs.components_.data)), rtol=1e-14)
    deviation = math.sqrt(density * (1 - density) * matrix.size)
    assert abs(np.count_nonzero(matrix) - density * matrix.size) <= 5 * deviation
    assert abs(np.count_nonzero(matrix > 0) - np.count_nonzero(matrix < 0)) <= 5 * math.sqrt(matrix.size)


def test_gaussian_matrix_is_normal() -> None:
    matrix = _random.gaussian_projection_matrix(500, 64, seed=1)
    assert kstest(matrix.ravel() * 8.0, "norm").pvalue > 1e-3
    assert abs(matrix.std() * 8.0 - 1) < 0.02


def test_inverse_normal_cdf_agrees_with_scipy() -> None:
    p = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 100_001), 10.0 ** -np.arange(1.0, 300.0)])
    p = p[p != 0.5]
    assert np.max(np.abs(_random.inverse_normal_cdf(p) / ndtri(p) - 1)) < 3e-15
    assert _random.inverse_normal_cdf(np.array([0.5]))[0] == 0


def test_torch_settings_change_nothing() -> None:
    expected = _random.gaussian_projection_matrix(10, 4, 0)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    np.random.seed(3)  # noqa: NPY002 - the global state is the very thing that must not matter
    assert np.array_equal(_random.gaussian_projection_matrix(10, 4, 0), expected)


def test_seeds_and_streams_differ() -> None:
    assert not np.array_equal(_random.sparse_projection_matrix(64, 8, 0), _random.sparse_projection_matrix(64, 8, 1))
    assert sorted(_random.permutation(7, 100)) == list(range(100))
    assert _random.permutation(7, 100).tolist() != _random.permutation(8, 100).tolist()
