"""Our parts for patchcore-inspection: samplers and search with its constructors; its own tests run in test_peers_own_tests.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_oracle import nearest
from torch import Tensor

from patchcore_ext import ops, reference
from patchcore_ext.integrations.patchcore_inspection import (
    ApproximateGreedyCoresetSampler,
    FaissNN,
    GreedyCoresetSampler,
    IdentitySampler,
    RandomSampler,
)

CPU = torch.device("cpu")


def rows_of(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def numpy_state(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002  (the global state is what the original draws from)


# Samplers


def samplers(percentage: float) -> list[Any]:
    return [
        GreedyCoresetSampler(percentage, CPU, dimension_to_project_features_to=8),
        ApproximateGreedyCoresetSampler(percentage, CPU, dimension_to_project_features_to=8),
        RandomSampler(percentage),
    ]


@pytest.mark.parametrize("percentage", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_samplers_refuse_a_percentage_outside(percentage: float) -> None:
    for make in (RandomSampler, lambda share: GreedyCoresetSampler(share, CPU), lambda share: ApproximateGreedyCoresetSampler(share, CPU)):
        with pytest.raises(ValueError, match=r"Percentage value not in \(0, 1\)"):
            make(percentage)


@pytest.mark.parametrize("sampler", samplers(0.1), ids=lambda sampler: type(sampler).__name__)
def test_samplers_keep_type_and_rows(sampler: Any) -> None:
    rows = rows_of(500, 20)
    for features in (rows, rows.half(), rows.numpy(), rows.numpy().astype(np.float16)):
        kept = sampler.run(features)
        assert type(kept) is type(features)
        assert kept.shape == (50, 20)
        assert kept.dtype == features.dtype
        assert len(np.unique(np.asarray(kept), axis=0)) == 50
        assert {row.tobytes() for row in np.asarray(kept)} <= {row.tobytes() for row in np.asarray(features)}


def test_identity_sampler_gives_its_argument_back() -> None:
    rows = rows_of(5, 2)
    assert IdentitySampler().run(rows) is rows


def test_samplers_refuse_what_keeps_no_row_and_what_is_not_finite() -> None:
    for sampler in samplers(0.01):
        with pytest.raises(ValueError, match="at least one row"):
            sampler.run(rows_of(50, 20))
    rows = rows_of(500, 20)
    rows[7, 3] = torch.inf
    for sampler in samplers(0.1)[:2]:
        with pytest.raises(ValueError, match="row 7"):
            sampler.run(rows)


def test_greedy_sampler_starts_farthest_from_all_others_and_goes_on_greedily() -> None:
    rows = rows_of(400, 8)
    kept = GreedyCoresetSampler(0.1, CPU, dimension_to_project_features_to=8).run(rows)
    matrix = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")  # [N, N], as the original has it
    anchors, picks = torch.linalg.norm(matrix, dim=1), []
    for _ in range(40):
        picks.append(int(anchors.argmax()))
        anchors = torch.minimum(anchors, matrix[:, picks[-1]])
    assert torch.equal(kept, rows[picks])


@pytest.mark.parametrize(("count", "percentage"), [(400, 0.1), (3000, 0.03)])  # without and with the int8 copy
def test_approximate_sampler_counts_the_starting_points(count: int, percentage: float) -> None:
    rows = rows_of(count, 8) + torch.arange(count)[:, None] / count  # not centred: the starting points matter
    numpy_state(3)
    kept = ApproximateGreedyCoresetSampler(percentage, CPU, number_of_starting_points=5, dimension_to_project_features_to=8).run(rows)
    numpy_state(3)
    starting = np.random.choice(count, 5, replace=False)  # noqa: NPY002
    matrix = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    anchors, picks = matrix[:, starting].mean(1), []
    for _ in range(int(count * percentage)):
        picks.append(int(anchors.argmax()))
        anchors = torch.minimum(anchors, matrix[:, picks[-1]])
    assert torch.equal(kept, rows[picks])
    only_picks = torch.full((count,), torch.inf, dtype=torch.float64)
    ops.add_picks(rows, torch.tensor(picks[:1]), only_picks)
    assert picks[1:] != ops.greedy_coreset(rows, only_picks, len(picks) - 1)[0].tolist()  # the test would not see the difference otherwise


def test_projection_is_torchs_untrained_linear() -> None:
    rows = rows_of(300, 24)
    torch.manual_seed(5)
    kept = GreedyCoresetSampler(0.1, CPU, dimension_to_project_features_to=8).run(rows)
    torch.manual_seed(5)
    with torch.no_grad():
        projected = torch.nn.Linear(24, 8, bias=False)(rows)
    positions = [int((rows == row).all(1).nonzero()[0]) for row in kept]
    assert torch.equal(projected[positions], GreedyCoresetSampler(0.1, CPU, dimension_to_project_features_to=8).run(projected))


def test_random_sampler_draws_as_the_original() -> None:
    rows = rows_of(300, 2)
    numpy_state(1)
    kept = RandomSampler(0.1).run(rows)
    numpy_state(1)
    assert torch.equal(kept, rows[np.random.choice(300, 30, replace=False)])  # noqa: NPY002


# Search


@pytest.mark.parametrize("k", [1, 3])
def test_search_gives_squared_distances_as_numpy(k: int) -> None:
    bank, queries = rows_of(400, 24).numpy(), rows_of(30, 24, 1).numpy()
    search = FaissNN(False, 2)
    search.fit(bank)
    distances, indices = search.run(k, queries)
    expected, rows = reference.nearest_neighbors(torch.from_numpy(queries), torch.from_numpy(bank), k)
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    assert np.array_equal(indices, rows.numpy())
    assert np.array_equal(distances, expected.float().numpy())
    assert np.array_equal(indices, nearest(queries, bank, k)[1])
    other = search.run(k, queries, bank[:50])
    assert np.array_equal(other[1], reference.nearest_neighbors(torch.from_numpy(queries), torch.from_numpy(bank[:50]), k)[1].numpy())


def test_search_copies_what_it_is_fitted_on() -> None:
    bank, queries = rows_of(300, 16).numpy(), rows_of(5, 16, 1).numpy()
    search = FaissNN()
    search.fit(bank)
    before = search.run(1, queries)
    bank[:] = 0
    assert np.array_equal(search.run(1, queries)[0], before[0])


def test_search_without_rows_is_an_attribute_error() -> None:
    search = FaissNN()
    rows = rows_of(3, 6).numpy()
    with pytest.raises(AttributeError):
        search.run(2, rows)
    with pytest.raises(AttributeError):
        search.save("index.faiss")
    search.fit(rows)
    search.reset_index()
    assert search.search_index is None
    with pytest.raises(AttributeError):
        search.run(2, rows)
    with pytest.raises(ValueError, match="k"):
        search.run(4, rows, rows)


def test_search_leaves_the_number_of_threads_alone() -> None:
    torch.set_num_threads(2)
    search = FaissNN(num_workers=1)
    search.fit(rows_of(3, 6).numpy())
    with pytest.raises(ValueError, match="dimension"):
        search.run(1, rows_of(3, 5).numpy())
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="num_workers"):
        FaissNN(num_workers=0)


def test_on_gpu_without_kernels_warns_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = rows_of(30, 6).numpy()
    search = FaissNN(on_gpu=True)
    with pytest.warns(UserWarning, match="no kernels for a GPU"):
        search.fit(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search.run(1, rows)[1][:, 0].tolist() == list(range(30))


def test_saved_rows_come_back(tmp_path: Path) -> None:
    rows = rows_of(300, 16).numpy()
    search, other = FaissNN(), FaissNN()
    search.fit(rows)
    search.save(tmp_path / "index.faiss")
    other.load(str(tmp_path / "index.faiss"))
    assert (other.search_index.ntotal, other.search_index.d) == (300, 16)
    for mine, theirs in zip(search.run(2, rows), other.run(2, rows), strict=True):
        assert np.array_equal(mine, theirs)


def test_files_are_those_of_faiss(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: the exchange of index files with it did not run")
    rows = rows_of(300, 16).numpy()
    index = faiss.IndexFlatL2(16)
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "theirs.faiss"))
    search = FaissNN()
    search.load(tmp_path / "theirs.faiss")
    assert np.array_equal(search.search_index.rows.numpy(), rows)
    search.save(tmp_path / "ours.faiss")
    assert (tmp_path / "ours.faiss").read_bytes() == (tmp_path / "theirs.faiss").read_bytes()
    assert faiss.read_index(str(tmp_path / "ours.faiss")).ntotal == 300


def test_other_files_are_refused(tmp_path: Path) -> None:
    search, path = FaissNN(), tmp_path / "index.faiss"
    with pytest.raises(FileNotFoundError):
        search.load(path)
    search.fit(rows_of(30, 4).numpy())
    search.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"IxF2", whole[:-1], whole + b"x", b"IxPQ" + whole[4:], whole[:4] + b"\xff" * 4 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="IndexFlatL2"):
            search.load(path)
