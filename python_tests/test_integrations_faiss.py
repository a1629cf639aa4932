"""integrations.faiss: faiss.IndexFlatL2's answers, and the exact ones where faiss loses digits."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import make_features
from numpy_oracle import nearest

from patchcore_ext import MemoryBank, PatchScorer
from patchcore_ext.integrations import faiss as integration
from patchcore_ext.integrations.faiss import IndexFlatL2, memory_bank_from_index, to_index

Rows = npt.NDArray[np.float32]


def rows_of(kind: str, count: int, dim: int, seed: int = 0) -> Rows:
    array: Rows = make_features(kind, count, dim, seed=seed).numpy()
    return array


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="faiss is not installed: what needs it did not run (pip install faiss-cpu)")


def test_docstring_examples_run() -> None:
    found = doctest.testmod(integration)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("num_queries", [1, 40, 700])  # faiss expands the square where queries times dimensions are 128,000 or more
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 5), (300, 24), (1500, 200)])
def test_search_answers_as_faiss_does(faiss: Any, rows: int, dim: int, num_queries: int) -> None:
    bank, queries = rows_of("random", rows, dim), rows_of("random", num_queries, dim, seed=1)
    theirs, ours = faiss.IndexFlatL2(dim), IndexFlatL2(dim)
    for index in (theirs, ours):
        index.train(bank)
        index.add(bank[: rows // 2])
        index.add(bank[rows // 2 :])
    for attribute in ("d", "ntotal", "is_trained", "metric_type", "code_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for k in (1, 4, rows + 2):
        expected, found = theirs.search(queries, k), ours.search(queries, k)
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=1e-5)
        # Rows may change places where float32 cannot tell their distances apart.
        same = found[1] == expected[1]
        assert same.mean() > 0.98
        wide, asked = bank.astype(np.float64), queries.astype(np.float64)
        exact = np.square(asked).sum(1)[:, None] - 2 * asked @ wide.T + np.square(wide).sum(1)  # float64 keeps the digits of these
        taken = min(k, rows)
        at_theirs = np.take_along_axis(exact, expected[1][:, :taken], 1)
        np.testing.assert_allclose(np.take_along_axis(exact, found[1][:, :taken], 1), at_theirs, rtol=2e-5, atol=1e-5)
        assert (found[1][:, taken:] == -1).all()
    assert np.array_equal(ours.assign(queries), theirs.assign(queries, 1).ravel())
    assert np.array_equal(ours.reconstruct(rows - 1), theirs.reconstruct(rows - 1))
    assert np.array_equal(ours.reconstruct_n(0, rows), theirs.reconstruct_n(0, rows))


@pytest.mark.parametrize("kind", ["random", "tied", "duplicate", "offset"])
@pytest.mark.parametrize("num_queries", [1, 64])
def test_search_is_exact(kind: str, num_queries: int) -> None:
    bank, queries = rows_of(kind, 400, 33), rows_of(kind, num_queries, 33, seed=1)
    index = IndexFlatL2(33)
    index.add(bank)
    distances, indices = index.search(queries, 5)
    squared, expected = nearest(queries.astype(np.float64), bank.astype(np.float64), 5)
    assert np.array_equal(indices, expected)
    assert np.array_equal(distances, squared.astype(np.float32))


def test_search_keeps_the_digits_that_the_expanded_square_loses() -> None:
    bank = rows_of("offset", 400, 64)
    expanded = np.square(bank).sum(1) - 2 * bank @ bank.T + np.square(bank).sum(1)[:, None]
    assert (expanded.argmin(1) != np.arange(400)).mean() > 0.5  # float32 norms and products: most rows do not find themselves
    index = IndexFlatL2(64)
    index.add(bank)
    distances, indices = index.search(bank, 1)
    assert (distances == 0).all()
    assert indices[:, 0].tolist() == list(range(400))


def test_an_index_grows_is_emptied_and_pickles() -> None:
    bank, queries = rows_of("random", 600, 20), rows_of("random", 70, 20, seed=1)
    index = IndexFlatL2(20)
    padded = index.search(queries[:2], 2)
    assert (padded[1] == -1).all()
    assert (padded[0] == np.finfo(np.float32).max).all()
    index.add(bank[:300])
    index.search(queries, 1)
    index.add(torch.from_numpy(bank[300:]))
    whole = IndexFlatL2(20)
    whole.add(bank.copy())
    for other in (index, pickle.loads(pickle.dumps(index))):
        for a, b in zip(other.search(queries, 3), whole.search(queries, 3), strict=True):
            assert np.array_equal(a, b)
    index.reset()
    assert (index.ntotal, index.search(queries, 1)[1].max()) == (0, -1)
    before = whole.search(queries, 1)[1]
    bank += 5  # add copied
    assert np.array_equal(whole.search(queries, 1)[1], before)


def test_results_go_where_the_caller_wants() -> None:
    index = IndexFlatL2(3)
    index.add(rows_of("random", 5, 3))
    queries = rows_of("random", 2, 3, seed=1)
    distances, indices = np.empty((2, 6), np.float32), np.empty((2, 6), np.int64)
    found = index.search(queries, 6, D=distances, I=indices)
    assert found[0] is distances
    assert found[1] is indices
    assert np.array_equal(indices, index.search(queries, 6)[1])
    with pytest.raises(ValueError, match=r"expected D to be float32 \[2, 6\], got float64 of shape \[2, 6\]"):
        index.search(queries, 6, D=distances.astype(np.float64))  # type: ignore[arg-type]


def test_wrong_arguments_are_named() -> None:
    index = IndexFlatL2(3)
    with pytest.raises(ValueError, match=r"IndexFlatL2.add: expected x to be numbers \[n, 3\], got float32 of shape \[2, 4\]"):
        index.add(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"IndexFlatL2.search: expected x to be numbers \[n, 3\], got float32 of shape \[3\]"):
        index.search(np.zeros(3, np.float32), 1)
    with pytest.raises(ValueError, match=r"IndexFlatL2.search: expected k to be at least 1, got 0"):
        index.search(np.zeros((1, 3), np.float32), 0)
    with pytest.raises(ValueError, match="IndexFlatL2: expected d to be at least 1, got 0"):
        IndexFlatL2(0)
    for bad in (np.nan, 1e39):  # beyond float32 as well
        with pytest.raises(ValueError, match="IndexFlatL2.add: expected x to be finite, got NaN or infinity in row 1 "):
            index.add(np.array([[0, 0, 0], [0, bad, 0]]))
    index.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="expected queries to be finite, got NaN or infinity in row 0 "):
        index.search(np.full((1, 3), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match=r"reconstruct: expected ni to be between 0 and 0 \(the rows there are from n0 on\), got 1"):
        index.reconstruct(2)


def test_a_bank_goes_to_faiss_and_comes_back(faiss: Any, tmp_path: Path) -> None:
    features = make_features("random", 300, 16, torch.bfloat16)
    bank = MemoryBank(features, image_names=["a.png"], image_indices=torch.zeros(300, dtype=torch.int64))
    index = to_index(bank)
    assert isinstance(index, faiss.IndexFlatL2)
    faiss.write_index(index, str(tmp_path / "bank.faiss"))
    ours = IndexFlatL2(16)
    ours.add(features)
    for source in (index, tmp_path / "bank.faiss", str(tmp_path / "bank.faiss"), ours):
        back = memory_bank_from_index(source, image_indices=bank.image_indices, image_names=bank.image_names, metadata={"from": "faiss"})
        assert torch.equal(back.features, features.float())
        assert back.image_names == ["a.png"]
        assert back.metadata == {"from": "faiss"}
    queries = make_features("random", 40, 16, seed=3)
    distances, indices = PatchScorer(memory_bank_from_index(index)).nearest(queries, 1)
    np.testing.assert_allclose(np.sqrt(index.search(queries.numpy(), 1)[0]), distances.numpy(), rtol=1e-5)
    index.reset()
    assert int(indices.max()) < 300  # the bank has its own rows


def test_other_indexes_are_refused(faiss: Any, tmp_path: Path) -> None:
    rows = rows_of("random", 40, 8)
    product = faiss.IndexFlatIP(8)
    product.add(rows)
    with pytest.raises(ValueError, match="expected index to have METRIC_L2, got metric_type 0"):
        memory_bank_from_index(product)
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(8), 8, 1)
    with pytest.raises(ValueError, match="expected index to be a faiss.IndexFlatL2 or its file, got IndexIVFFlat"):
        memory_bank_from_index(lists)
    with pytest.raises(ValueError, match="expected index to hold at least one row"):
        memory_bank_from_index(faiss.IndexFlatL2(8))
    (tmp_path / "broken").write_bytes(b"no index")
    with pytest.raises(ValueError, match="expected index to be a file of faiss.write_index, got '.*broken'"):
        memory_bank_from_index(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        memory_bank_from_index(tmp_path / "absent")


def test_faiss_is_imported_by_what_needs_it_alone() -> None:
    code = """
import sys
sys.modules["faiss"] = None
import numpy as np
from patchcore_ext.integrations.faiss import IndexFlatL2, memory_bank_from_index, to_index
index = IndexFlatL2(2)
index.add(np.eye(2))
assert len(memory_bank_from_index(index)) == 2
try:
    to_index(np.eye(2, dtype=np.float32))
except ImportError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "to_index: needs faiss, which cannot be imported" in process.stdout
    assert "pip install faiss-cpu" in process.stdout
