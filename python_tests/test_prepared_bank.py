"""The prepared bank: the same neighbours and scores as with every distance computed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, FEATURE_KINDS, make_features
from torch import Tensor

from patchcore_ext import PatchScorer, _library, _rotation, build_info, ops


def features_like_real_ones(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Rows along a few directions and a little noise, so that the short prefix tells them apart."""
    weights = make_features("random", rows, 12, seed=seed)
    return weights @ make_features("random", 12, dim, seed=77) + 0.1 * make_features("random", rows, dim, seed=seed + 1)


def prepared(bank: Tensor) -> list[Tensor]:
    """As ops.prepare_bank, without its choice: a prefix also for a bank that is too small for one to pay."""
    if bank.shape[1] < 32:
        return ops.prepare_bank(bank)
    center, _, _, order = _rotation.center_alone(bank)
    matrix = _rotation._integer_contraction([make_features("random", bank.shape[1], count).double() * 0.1 for count in (7, 15)])
    return [torch.ops.patchcore_ext.prepare_bank(bank, center, matrix, 7, order.flip(0))]


def assert_equal_to_every_distance(queries: Tensor, bank: Tensor, codes: list[Tensor], k: int) -> None:
    found, expected = ops.nearest_neighbors(queries, bank, k, codes), torch.ops.patchcore_ext.nearest_neighbors(queries, bank, k)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("dim", [8, 33, 130])
def test_neighbors_are_the_same(kind: str, dim: int, dtype: torch.dtype) -> None:
    bank = make_features(kind, 400, dim, dtype)
    queries = torch.cat([make_features(kind, 60, dim, dtype, seed=1), bank[::20]])
    codes = prepared(bank)
    for k in (1, 2, 9, 100, 400):
        assert_equal_to_every_distance(queries, bank, codes, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("rows", [3000, 5000], ids=["scanned at once", "in stages"])  # with AVX-512; others do one or the other
def test_neighbors_are_the_same_where_a_prefix_pays(rows: int, offset: float, dtype: torch.dtype) -> None:
    bank = (features_like_real_ones(rows, 200) + offset).to(dtype)
    queries = (features_like_real_ones(200, 200, seed=5) + offset).to(dtype)
    codes = ops.prepare_bank(bank)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for k in (1, 9, 100):
            assert_equal_to_every_distance(queries, bank, codes, k)
    assert sum(code.nbytes for code in codes) <= 0.75 * bank.numel() * 4


@pytest.mark.parametrize("whole_rows", [0, 2**16], ids=["long prefix", "all coordinates"])
@pytest.mark.parametrize("dim", [192, 385, 1024])
def test_either_kind_of_row_codes_finds_the_same(monkeypatch: pytest.MonkeyPatch, dim: int, whole_rows: int) -> None:
    monkeypatch.setattr(_rotation, "_WHOLE_ROWS", whole_rows)
    monkeypatch.setattr(_rotation, "_WHOLE_NANOSECONDS", float("inf"))
    bank, queries = features_like_real_ones(2100, dim), features_like_real_ones(150, dim, seed=5)
    matrix, short = _rotation.center_and_prefixes(bank)[1:3]
    assert (matrix.shape[0] > short > 0) if whole_rows == 0 else (matrix.shape[0] == short > 0)
    codes = ops.prepare_bank(bank)
    assert sum(code.nbytes for code in codes) <= 0.75 * bank.numel() * 4
    for k in (1, 9, 100):
        assert_equal_to_every_distance(queries, bank, codes, k)


@pytest.mark.parametrize("dim", [192, 384, 1024])
def test_copies_of_small_banks_stay_within_their_share_of_memory(dim: int) -> None:
    """A prefix pays from a few hundred rows on, but its matrix is as large for few rows as for many."""
    shares = {}
    for rows in (64, 130, 256, 300, 400, 655, 1300):
        bank = features_like_real_ones(rows, dim)
        codes = ops.prepare_bank(bank)
        shares[rows] = sum(code.nbytes for code in codes) / (4 * bank.numel())
        assert 0 < shares[rows] <= 0.75
        assert_equal_to_every_distance(features_like_real_ones(100, dim, seed=5), bank, codes, 2)
    assert shares[1300] > 0.33  # with prefixes, which all but the shortest have
    assert shares[655] > 0.33 or dim == 192


def test_rows_of_the_bank_find_the_first_of_their_duplicates() -> None:
    bank = features_like_real_ones(1200, 200).repeat(2, 1)
    squared, indices = ops.nearest_neighbors(bank[1200:1500], bank, 2, ops.prepare_bank(bank))
    assert torch.equal(squared, torch.zeros_like(squared))
    assert torch.equal(indices, torch.stack([torch.arange(300), torch.arange(300) + 1200], 1))


def test_one_query_alone_gets_the_bits_of_the_batch() -> None:
    bank, queries = features_like_real_ones(2500, 200), features_like_real_ones(150, 200, seed=9)
    codes = ops.prepare_bank(bank)
    batch = ops.nearest_neighbors(queries, bank, 3, codes)
    for q in range(0, 150, 7):
        alone = ops.nearest_neighbors(queries[q : q + 1], bank, 3, codes)
        assert torch.equal(alone[0][0], batch[0][q])
        assert torch.equal(alone[1][0], batch[1][q])


def test_many_queries_of_an_unprepared_bank_are_filtered_too() -> None:
    bank, queries = make_features("random", 700, 40), make_features("random", 200, 40, seed=3)
    assert_equal_to_every_distance(queries, bank, [], 4)
    bad = bank.clone()
    bad[650, 3] = float("nan")
    with pytest.raises(ValueError, match="^nearest_neighbors: expected bank to be finite, got NaN or infinity in row 650 "):
        ops.nearest_neighbors(queries, bad, 1)


def test_threads_prepare_the_same_bytes() -> None:
    bank = features_like_real_ones(2100, 200)
    arguments = (bank, *_rotation.center_and_prefixes(bank))
    torch.set_num_threads(1)
    first = torch.ops.patchcore_ext.prepare_bank(*arguments)
    torch.set_num_threads(3)
    assert torch.equal(first, torch.ops.patchcore_ext.prepare_bank(*arguments))


def test_little_or_strange_banks_are_searched_without() -> None:
    assert ops.prepare_bank(make_features("random", 63, 20)) == []
    assert ops.prepare_bank(make_features("random", 300, 7)) == []
    with pytest.raises(ValueError, match="prepare_bank: expected bank to have at least one row, got none"):
        ops.prepare_bank(torch.zeros(0, 9))
    with pytest.raises(ValueError, match="prepare_bank: expected bank to be finite, got NaN or infinity in row 3 "):
        ops.prepare_bank(torch.where(torch.arange(300)[:, None] == 3, torch.inf, torch.zeros(300, 9)))
    for factor in (0.0, 1e30, 1e-41):
        bank = make_features("random", 2100, 192) * factor
        assert_equal_to_every_distance(bank[:70], bank, ops.prepare_bank(bank), 2)


def test_codes_at_an_odd_address_serve_as_well() -> None:
    """Packages of AOTInductor keep constants at any address; these codes were refused there."""
    bank = make_features("random", 300, 20)
    codes = ops.prepare_bank(bank)[0]
    odd = torch.empty(len(codes) + 1, dtype=torch.uint8)[1:].copy_(codes)
    assert odd.data_ptr() % 64 != 0
    assert_equal_to_every_distance(bank[:70], bank, [odd], 2)


def test_other_codes_are_refused() -> None:
    bank = make_features("random", 300, 20)
    codes = ops.prepare_bank(bank)
    squared, indices = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    for other in (ops.prepare_bank(bank[:290]), [codes[0][64:]], [codes[0][:64].clone()], [torch.zeros_like(codes[0])]):
        with pytest.raises(ValueError, match="^nearest_neighbors: expected prepared to come from prepare_bank of the same bank"):
            ops.nearest_neighbors(bank, bank, 1, other)
        with pytest.raises(ValueError, match="^image_scores: expected prepared to come from prepare_bank of the same bank"):
            ops.image_scores(squared, indices, bank[:1], bank, 1, other)
        with pytest.raises(ValueError, match="^score_patches: expected prepared to come from prepare_bank of the same bank"):
            ops.score_patches(bank, bank, 300, 1, other)
    with pytest.raises(ValueError, match="expected prepared to be a contiguous uint8 CPU tensor"):
        ops.nearest_neighbors(bank, bank, 1, [codes[0].float()])
    with pytest.raises(ValueError, match="expected prepared to be what prepare_bank gave, got 2 tensors"):
        ops.nearest_neighbors(bank, bank, 1, codes * 2)
    spoiled = codes[0].clone()
    spoiled[-3000:] = 255  # not the header: whatever it says, no memory outside may be read
    ops.nearest_neighbors(bank[:10], bank, 1, [spoiled])


def test_a_matrix_that_enlarges_distances_is_refused() -> None:
    bank = make_features("random", 300, 20)
    center = torch.zeros(20, dtype=torch.float64)
    matrix, order = torch.full((4, 20), 16384, dtype=torch.int16), torch.arange(300, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected matrix / 2\\^14 to be a contraction"):
        torch.ops.patchcore_ext.prepare_bank(bank, center, matrix, 2, order)
    for wrong in (order.clamp(max=298), order - 1, order.clamp(min=1)):
        with pytest.raises(RuntimeError, match="expected order to be a permutation of the rows"):
            torch.ops.patchcore_ext.prepare_bank(bank, center, matrix[:0], 0, wrong)
    for short in (-1, 0, 5):
        with pytest.raises(RuntimeError, match="expected short_outputs to lie in"):
            torch.ops.patchcore_ext.prepare_bank(bank, center, matrix, short, order)


@pytest.mark.parametrize("score", ["paper", "max", "anomalib", "amazon"])
def test_scores_are_those_of_every_distance(score: str) -> None:
    bank, patches = features_like_real_ones(2200, 200), features_like_real_ones(96, 200, seed=4).view(2, 48, 200)
    scorer = PatchScorer(bank, score=score)
    assert scorer.describe()["prepared_bytes"] > 0
    found = scorer(patches)
    scorer._prepared = None
    expected = scorer(patches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_duplicates_of_the_nearest_row_count_by_their_index() -> None:
    """More duplicates of m* than neighbours, before and behind it: N_b holds m* itself and the first of the others."""
    bank = features_like_real_ones(600, 16)
    bank[100:120] = bank[300]
    patches = bank[None, 300:301] + 0.5
    scorer = PatchScorer(bank)
    found = scorer(patches)
    scorer._prepared = None
    assert torch.equal(found.image_scores, scorer(patches).image_scores)


def test_a_changed_bank_is_prepared_anew() -> None:
    bank, patches = make_features("random", 400, 24), make_features("random", 30, 24, seed=1)
    scorer = PatchScorer(bank.clone())
    assert list(scorer.state_dict()) == ["bank"]
    same = copy.deepcopy(scorer)
    assert torch.equal(same(patches).image_scores, scorer(patches).image_scores)
    before = scorer._prepared
    scorer.to("cpu").float()
    assert scorer._prepared is before

    scorer.half()
    expected = PatchScorer(bank.half())(patches)
    assert torch.equal(scorer(patches).patch_distances, expected.patch_distances)

    other = make_features("random", 400, 24, seed=8)
    same.load_state_dict({"bank": other})
    assert torch.equal(same(patches).patch_distances, PatchScorer(other)(patches).patch_distances)


def test_describe_tells_what_preparing_took() -> None:
    about = PatchScorer(make_features("random", 500, 64).half()).describe()
    assert (about["rows"], about["dim"], about["dtype"], about["bank_bytes"]) == (500, 64, "float16", 64_000)
    assert 0 < about["prepared_bytes"] <= 0.75 * 500 * 64 * 4
    assert about["prepare_seconds"] > 0


def search_at_level(level: str, folder: Path, bank: Tensor, queries: Tensor) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Searches in another process with the copies made here, and makes its own: a file with both."""
    torch.save((bank, queries, ops.prepare_bank(bank)), folder / "here.pt")
    code = (
        f"import torch; from patchcore_ext import ops; bank, queries, copies = torch.load({str(folder / 'here.pt')!r});"
        f"torch.save((ops.nearest_neighbors(queries, bank, 3, copies), ops.prepare_bank(bank)), {str(folder / 'there.pt')!r})"
    )
    environment = {**os.environ, "PATCHCORE_EXT_CPU_LEVEL": level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False), folder / "there.pt"


def test_levels_whose_codes_are_as_large_run_each_others_banks(tmp_path: Path) -> None:
    """Packages and pickles of a scorer go to other machines; the scalar level scans 3,000 rows in stages, AVX-512 and AMX at once."""
    here = build_info()["cpu_level"]
    if here in ("scalar", "avx2") or _library.runs_cuda_kernels(torch.device("cpu")):
        pytest.skip("the level in use shares its codes with no other of this processor")
    bank, queries = features_like_real_ones(3000, 200), features_like_real_ones(60, 200, seed=5)
    result, file = search_at_level("scalar", tmp_path, bank, queries)
    assert result.returncode == 0, result.stderr
    found, copies = torch.load(file)
    expected = torch.ops.patchcore_ext.nearest_neighbors(queries, bank, 3)
    for neighbors in (found, ops.nearest_neighbors(queries, bank, 3, copies)):
        assert all(torch.equal(a, b) for a, b in zip(neighbors, expected, strict=True))


def test_avx2_refuses_banks_of_other_levels(tmp_path: Path) -> None:
    levels = build_info()["cpu_levels"]
    if build_info()["cpu_level"] == "avx2" or "avx2" not in levels or _library.runs_cuda_kernels(torch.device("cpu")):
        pytest.skip("AVX2 is the level in use, or this processor lacks it")
    bank = features_like_real_ones(300, 200)
    result, _ = search_at_level("avx2", tmp_path, bank, bank)
    assert "ValueError: nearest_neighbors: expected prepared to come from prepare_bank of the same bank on such a processor" in result.stderr
