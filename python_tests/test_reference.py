"""patchcore_ext.reference against NumPy, SciPy and the text of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FEATURE_KINDS, make_features
from numpy_oracle import squared_distance as numpy_squared_distance
from scipy.spatial.distance import cdist

from patchcore_ext import reference


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 40, 129])
@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_squared_distance_is_the_canonical_sum(kind: str, dim: int) -> None:
    a, b = make_features(kind, 6, dim), make_features(kind, 6, dim, seed=1)
    found = reference.squared_distance(a, b).numpy()
    assert found.tolist() == [numpy_squared_distance(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    assert np.allclose(found, np.diag(cdist(a.double().numpy(), b.double().numpy(), "sqeuclidean")), rtol=1e-12)


def test_exp_is_within_one_ulp_of_numpy_long_double() -> None:
    x = -torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 708
    truth = np.exp(x.numpy().astype(np.longdouble))
    error = np.abs(reference.exp_of_nonpositive(x).numpy() - truth) / np.spacing(truth.astype(np.float64))
    assert error.max() < 1
    assert reference.exp_of_nonpositive(torch.tensor([0.0, -800.0], dtype=torch.float64)).tolist() == [1.0, 0.0]


def test_reference_is_differentiable() -> None:
    queries = make_features("random", 4, 5).requires_grad_()
    squared, rows = reference.nearest_neighbors(queries, make_features("random", 9, 5, seed=1), 1)
    reference.image_scores(squared.view(2, 2), rows.view(2, 2), queries, make_features("random", 9, 5, seed=1), 3).sum().backward()
    assert queries.grad is not None
    assert bool((queries.grad != 0).any())
