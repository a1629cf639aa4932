"""CoresetSampler: the picks of the textbook algorithm, whatever surrounds it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DTYPES, FEATURE_KINDS, make_features
from numpy_oracle import greedy
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from patchcore_ext import CoresetSampler, CoresetSelection, PatchCore, _random, ops, reference
from patchcore_ext.data import load_batches


def assert_same(found: CoresetSelection, expected: CoresetSelection) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)
    assert found.radius == expected.radius


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_select_equals_numpy_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    features = make_features(kind, 60, 19, dtype)
    selection = CoresetSampler(num_samples=25, projection_dim=None, start=7).select(features)
    picks, distances, radius = greedy(features.double().numpy(), 7, 25)
    assert selection.indices.tolist() == picks
    assert selection.distances.tolist() == distances
    assert selection.radius == radius
    assert selection.indices.dtype == torch.int64
    assert selection.distances.dtype == torch.float64


@pytest.mark.parametrize("projection", ["sparse", "gaussian"])
def test_select_on_projections_equals_the_reference(projection: str) -> None:
    features = make_features("random", 80, 100)
    selection = CoresetSampler(ratio=0.5, projection_dim=8, projection=projection, seed=11).select(features)
    make = {"sparse": _random.sparse_projection_matrix, "gaussian": _random.gaussian_projection_matrix}[projection]
    projected = reference.random_projection(features, torch.from_numpy(make(100, 8, 11)))
    start = _random.start_index(11, 80)
    assert selection.indices.tolist() == greedy(projected.double().numpy(), start, 40)[0]


def test_surroundings_change_nothing() -> None:
    features = make_features("random", 2500, 160)
    sampler = CoresetSampler(num_samples=40, projection_dim=64, seed=3)
    torch.set_num_threads(1)
    expected = sampler.select(features)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert_same(sampler.select(features), expected)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    assert_same(sampler.select(features), expected)
    torch.set_default_device("cpu")
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(sampler.select(features), expected)


PICKS = """
import torch
from patchcore_ext import CoresetSampler
features = torch.arange(3000.0 * 150, dtype=torch.float64).mul(0.618).frac().sub(0.5).float().reshape(3000, 150)
print(CoresetSampler(num_samples=30, projection_dim=32, projection="gaussian", seed=2).select(features).indices.tolist())
"""


def test_cpu_capabilities_change_nothing() -> None:
    found = set()
    for torch_level, our_level in (("default", "scalar"), ("avx2", "avx2"), ("avx512", "avx512"), ("avx512", "amx"), ("avx512", "scalar")):
        if our_level not in available_levels():
            continue
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": torch_level, "PATCHCORE_EXT_CPU_LEVEL": our_level}
        found.add(subprocess.run([sys.executable, "-c", PICKS], env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1


def available_levels() -> list[str]:
    from patchcore_ext import build_info

    levels: list[str] = build_info()["cpu_levels"]
    return levels


def test_sizes() -> None:
    features = make_features("random", 50, 4)
    assert len(CoresetSampler(ratio=0.1).select(features).indices) == 5
    assert len(CoresetSampler(ratio=0.001).select(features).indices) == 1
    assert len(CoresetSampler(ratio=0.999).select(features).indices) == 49
    one = CoresetSampler(num_samples=1, start=3).select(features)
    assert one.indices.tolist() == [3]
    assert one.radius == math.sqrt(reference.squared_distance(features, features[3]).max())


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_all_rows_picked_are_a_permutation(kind: str) -> None:
    features = make_features(kind, 30, 3)
    selection = CoresetSampler(num_samples=30).select(features)
    assert sorted(selection.indices.tolist()) == list(range(30))
    assert selection.radius == 0
    assert selection.distances[0] == float("inf")
    assert torch.equal(selection.distances, selection.distances.sort(descending=True).values)


def test_ratio_one_keeps_rows_in_order() -> None:
    features = make_features("random", 30, 3)
    selection = CoresetSampler(ratio=1).select(features)
    assert selection.indices.tolist() == list(range(30))
    assert selection.radius == 0
    assert torch.equal(CoresetSampler(ratio=1.0).sample(features), features)
    features[4, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in row 4 "):
        CoresetSampler(ratio=1).select(features)


@pytest.mark.parametrize("rows", [60, 3000])  # without and with the int8 copy
def test_initial_indices_go_on_where_a_selection_ended(rows: int) -> None:
    features = make_features("random", rows, 120)
    whole = CoresetSampler(num_samples=50, projection_dim=100).select(features)
    for kept in (1, 30, 50):
        initial = whole.indices[:kept]
        for same in (initial, initial.tolist(), initial.numpy()):
            extended = CoresetSampler(num_samples=50, projection_dim=100, seed=0).select(features, initial_indices=same)
            assert torch.equal(extended.indices, whole.indices)
            assert torch.equal(extended.distances[kept:], whole.distances[kept:])
            assert extended.distances[:kept].isnan().all()
            assert extended.radius == whole.radius


def test_wrong_initial_indices_are_named() -> None:
    features = make_features("random", 20, 5)
    sampler = CoresetSampler(num_samples=3)
    for wrong in ([0, 20], [-1], [4, 4]):
        with pytest.raises(ValueError, match="expected initial_indices to be different rows of features"):
            sampler.select(features, initial_indices=wrong)
    with pytest.raises(ValueError, match=r"expected initial_indices to be at most the rows to keep \(3\), got 4"):
        sampler.select(features, initial_indices=[0, 1, 2, 3])
    for wrong in ([], [[1]], [0.5]):
        with pytest.raises(ValueError, match="expected initial_indices to be a list of at least one row"):
            sampler.select(features, initial_indices=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [80, 3000])
def test_radius_stops_at_the_first_cover(rows: int) -> None:
    features = make_features("random", rows, 6)
    whole = CoresetSampler(num_samples=70, projection_dim=None).select(features)
    for count in (1, 7, 60):
        limit = float(whole.distances[count])  # the covering radius of the first `count` rows
        stopped = CoresetSampler(radius=limit, projection_dim=None).select(features)
        assert torch.equal(stopped.indices, whole.indices[:count])
        assert stopped.radius == limit
        smaller = CoresetSampler(radius=math.nextafter(limit, 0), projection_dim=None).select(features)
        assert len(smaller.indices) > count
        assert smaller.radius < limit
    assert len(CoresetSampler(radius=0.0, num_samples=9, projection_dim=None).select(features).indices) == 9
    assert sorted(CoresetSampler(radius=0.0).select(features).indices.tolist()) == list(range(rows))
    with pytest.raises(ValueError, match="expected radius to be a finite distance, not negative, got -1"):
        CoresetSampler(radius=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("dim", [4, 40, 130])
def test_codes_change_nothing(kind: str, dim: int, dtype: torch.dtype) -> None:
    features = make_features(kind, 2500, dim, dtype)
    codes = ops.coreset_codes(features)
    states = [torch.full((2500,), float("inf"), dtype=torch.float64) for _ in range(2)]
    expected = ops.greedy_coreset(features, states[0], 300)
    found = [ops.greedy_coreset(features, states[1], count, codes) for count in (1, 99, 200)]
    assert torch.equal(torch.cat([indices for indices, _ in found]), expected[0])
    assert torch.equal(torch.cat([values for _, values in found]), expected[1])
    assert torch.equal(states[1], states[0])
    state, lowered = torch.full((2500,), float("inf"), dtype=torch.float64), torch.full((2500,), -1, dtype=torch.int32)
    picks, values = torch.empty(0, dtype=torch.int64), []
    for count in (1, 99, 200):
        indices, squared = ops.greedy_coreset_lazily(features, state, lowered, picks, count, codes)
        picks, values = torch.cat([picks, indices]), [*values, squared]
    assert torch.equal(picks, expected[0])
    assert torch.equal(torch.cat(values), expected[1])
    assert state.max() == states[0].max()
    assert torch.equal(state[lowered == -1], states[0][lowered == -1])
    assert bool((state >= states[0]).all())


def test_what_was_left_behind_is_checked() -> None:
    features = make_features("random", 40, 9)
    codes = ops.coreset_codes(features)
    state, behind, none = torch.full((40,), float("inf"), dtype=torch.float64), torch.full((40,), -1, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for lowered, picks, sentence in (
        (behind[1:], none, "lowered to be a contiguous int32 CPU tensor of shape"),
        (behind.long(), none, "lowered to be"),
        (behind + 2, none, r"lowered to lie in \[-1, 0\], got 1 in row 0"),
        (behind, torch.tensor([[3]]), "picks to be of shape"),
        (behind, torch.tensor([40]), "picks to"),
        (behind, torch.arange(38), "picks to be at most 37 rows, got 38"),
    ):
        with pytest.raises(ValueError, match=f"^greedy_coreset_lazily: expected {sentence}"):
            ops.greedy_coreset_lazily(features, state, lowered, picks, 3, codes)


def test_codes_of_strided_transposed_and_offset_storage() -> None:
    wide = make_features("random", 5200, 150)
    for view in (wide[::2, 3:120], wide[:140, :2100].T.contiguous().T.T[:, 5:], wide[100:2300].T.contiguous().T[:, 1:]):
        expected = CoresetSampler(num_samples=60, projection_dim=None).select(view.contiguous())
        assert_same(CoresetSampler(num_samples=60, projection_dim=None).select(view), expected)


def test_flush_denormal_changes_no_pick() -> None:
    features = make_features("random", 2500, 9) * 1e-41
    expected = CoresetSampler(num_samples=60).select(features)
    assert expected.distances[30] > 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    found = CoresetSampler(num_samples=60).select(features)
    torch.set_flush_denormal(False)
    assert_same(found, expected)


def test_codes_of_other_features_are_refused() -> None:
    features = make_features("random", 100, 20)
    state = torch.full((100,), float("inf"), dtype=torch.float64)
    for wrong in (ops.coreset_codes(features[:50]), ops.coreset_codes(features[:, :16]), torch.zeros(10, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected codes to come from coreset_codes of the same features"):
            ops.greedy_coreset(features, state, 2, wrong)
    with pytest.raises(ValueError, match="coreset_codes: expected features to have at least one row"):
        ops.coreset_codes(features[:0])
    features[3, 3] = float("nan")
    with pytest.raises(ValueError, match="coreset_codes: expected features to be finite, got NaN or infinity in row 3"):
        ops.coreset_codes(features)


@pytest.mark.parametrize("bad", [float("nan"), -2.0, -float("inf")])
def test_states_that_are_no_squared_distances_are_refused(bad: float) -> None:
    features = make_features("random", 64, 20)
    for codes in (None, ops.coreset_codes(features)):
        state = torch.full((64,), float("inf"), dtype=torch.float64)
        state[5] = bad
        with pytest.raises(ValueError, match=r"expected min_distances to hold squared distances, or -1 for picks, got \S+ in row 5"):
            ops.greedy_coreset(features, state, 1, codes)


def test_a_prefix_that_is_no_contraction_is_refused() -> None:
    features, center = make_features("random", 64, 20), torch.zeros(20, dtype=torch.float64)
    good = torch.eye(20, 8, dtype=torch.float64)
    torch.ops.patchcore_ext.coreset_codes(features, center, good)
    for wrong in (1.01 * good, good + 0.1, torch.full_like(good, float("nan"))):
        with pytest.raises(RuntimeError, match="expected prefix to be a contraction"):
            torch.ops.patchcore_ext.coreset_codes(features, center, wrong)


def test_damaged_codes_are_refused() -> None:
    features = make_features("random", 64, 20)
    codes = ops.coreset_codes(features)
    state = torch.full((64,), float("inf"), dtype=torch.float64)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), codes])[1:]
    with pytest.raises(ValueError, match="expected codes to be aligned to 64 bytes"):
        ops.greedy_coreset(features, state, 1, shifted)
    damaged = codes.clone()
    damaged[-256:] = 255  # the residuals are the last: NaN
    with pytest.raises(ValueError, match="expected codes to come from coreset_codes"):
        ops.greedy_coreset(features, state, 1, damaged)


def test_a_huge_radius_keeps_one_row() -> None:
    assert len(CoresetSampler(radius=1e200).select(make_features("random", 10, 4)).indices) == 1


def test_memory_beside_the_features_is_at_most_three_quarters() -> None:
    for dim in (4, 16, 64, 128, 384):
        features = make_features("random", 3000, dim)
        assert ops.coreset_codes(features).nbytes <= 0.75 * features.nbytes + 512


def test_real_features_of_magnetic_tiles(magnetic_tiles: Path, resnet18_weights: Path) -> None:
    model = PatchCore("resnet18", weights=resnet18_weights, resize=(224, 224), device="cpu")
    paths = sorted(str(path) for path in (magnetic_tiles / "train" / "good").iterdir())[:8]
    with torch.inference_mode():
        rows = torch.cat([model.extractor(batch.images).features.flatten(0, 1) for batch in load_batches(paths, model.transform, 8, 0)])
    features = ops.random_projection(rows, torch.from_numpy(_random.sparse_projection_matrix(384, 128, 0)))
    states = [torch.full((len(rows),), float("inf"), dtype=torch.float64) for _ in range(2)]
    expected = ops.greedy_coreset(features, states[0], 627)
    found = ops.greedy_coreset(features, states[1], 627, ops.coreset_codes(features))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(states[0], states[1])


def test_distances_are_the_covering_radius_before_each_pick() -> None:
    features = make_features("random", 70, 6)
    selection = CoresetSampler(num_samples=20, projection_dim=None).select(features)
    for count in (1, 5, 19):
        smallest = reference.nearest_neighbors(features, features[selection.indices[:count]], 1)[0]
        assert float(selection.distances[count]) == math.sqrt(smallest.max())
    assert selection.radius < float(selection.distances[-1])


def test_covering_curve_tells_the_radius_of_every_beginning() -> None:
    features = make_features("random", 70, 6)
    sampler = CoresetSampler(num_samples=40, projection_dim=None)
    selection = sampler.select(features)
    curve = dict(selection.covering_curve(points=10))
    assert 1 in curve
    assert curve[40] == selection.radius
    for size, radius in curve.items():
        smallest = reference.nearest_neighbors(features, features[selection.indices[:size]], 1)[0]
        assert radius == math.sqrt(smallest.max())
    assert CoresetSampler(ratio=1).select(features).covering_curve() == [(70, 0.0)]  # all that is known
    assert CoresetSampler(num_samples=1).select(features).covering_curve() == [(1, CoresetSampler(num_samples=1).select(features).radius)]


def test_never_projects_up_and_auto_is_johnson_lindenstrauss(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    project = ops.random_projection

    def spy(features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        used.append(matrix.shape[0])
        return project(features, matrix)

    monkeypatch.setattr(ops, "random_projection", spy)
    features = make_features("random", 300, 200)
    CoresetSampler(num_samples=2, projection_dim=200).select(features)
    CoresetSampler(num_samples=2, projection_dim=None).select(features)
    CoresetSampler(num_samples=2, projection_dim="auto").select(features)
    assert johnson_lindenstrauss_min_dim(300, eps=0.9) < 200
    assert used == [johnson_lindenstrauss_min_dim(300, eps=0.9)]
    assert johnson_lindenstrauss_min_dim(156_800, eps=0.9) == 295


def test_sample_keeps_type_and_order() -> None:
    features = make_features("random", 40, 5, torch.bfloat16)
    sampler = CoresetSampler(num_samples=7)
    assert torch.equal(sampler.sample(features), features[sampler.select(features).indices])
    array = features.float().numpy()
    sampled = sampler.sample(array)
    assert isinstance(sampled, np.ndarray)
    assert np.array_equal(sampled, array[sampler.select(array).indices.numpy()])


def test_float64_is_rounded_with_a_warning() -> None:
    features = make_features("random", 40, 5)
    with pytest.warns(UserWarning, match="features is float64 and is rounded to float32"):
        found = CoresetSampler(num_samples=7).select(features.double())
    assert_same(found, CoresetSampler(num_samples=7).select(features))


def test_features_with_gradients_are_detached() -> None:
    features = make_features("random", 40, 200).requires_grad_()
    assert not CoresetSampler(num_samples=7).select(features).distances.requires_grad


def test_wrong_arguments_are_named() -> None:
    for ratio in (0, 2, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"CoresetSampler: expected ratio to lie in \(0, 1\], got {ratio}"):
            CoresetSampler(ratio=ratio)
    with pytest.raises(TypeError, match="expected ratio to be a number"):
        CoresetSampler(ratio="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected num_samples to be at least 1, got 0"):
        CoresetSampler(num_samples=0)
    with pytest.raises(ValueError, match="expected projection to be one of 'sparse', 'gaussian', got 'pca'"):
        CoresetSampler(projection="pca")
    with pytest.raises(ValueError, match="expected start to be one of 'random'"):
        CoresetSampler(start="first")
    with pytest.raises(ValueError, match="expected projection_dim to be one of 'auto'"):
        CoresetSampler(projection_dim="half")
    with pytest.raises(ValueError, match="expected seed to be between 0"):
        CoresetSampler(seed=-1)
    features = make_features("random", 10, 5)
    with pytest.raises(ValueError, match=r"expected num_samples to be at most the rows of features \(10\), got 11"):
        CoresetSampler(num_samples=11).select(features)
    with pytest.raises(ValueError, match=r"expected start to be between 0 and 9 \(a row of features\), got 10"):
        CoresetSampler(start=10).select(features)
    with pytest.raises(ValueError, match="expected features to have at least one row"):
        CoresetSampler().select(features[:0])
    features[6, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity in row 6 "):
        CoresetSampler(num_samples=3).select(features)
    wide = make_features("random", 10, 300)
    wide[8, 299] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in row 8 "):
        CoresetSampler(num_samples=3).select(wide)
    with pytest.raises(ValueError, match="got a value beyond the range of float32"):
        CoresetSampler(num_samples=3).select(torch.full((4, 300), 3e38))


def test_progress_counts_every_pick(capfd: pytest.CaptureFixture[str]) -> None:
    CoresetSampler(num_samples=33, progress=True).select(make_features("random", 100, 5))
    assert "32/32" in capfd.readouterr().err  # the start is given
    CoresetSampler(num_samples=33, progress=False).select(make_features("random", 100, 5))
    assert capfd.readouterr().err == ""


def test_ctrl_c_stops_the_selection_within_a_second() -> None:
    features = make_features("random", 100_000, 64)
    sent = []

    def interrupt() -> None:
        time.sleep(0.5)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        CoresetSampler(num_samples=100_000, progress=False).select(features)
    stopped = time.perf_counter()
    thread.join()
    assert stopped - sent[0] < 1.0


def test_repr_reads_like_the_call() -> None:
    assert repr(CoresetSampler(ratio=0.25, seed=4)).startswith("CoresetSampler(ratio=0.25, projection_dim=128, projection='sparse', start='random', seed=4")
