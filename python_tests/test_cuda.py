"""The CUDA ops through Python: on a GPU where there is one, else their own sources on the CPU (test_simt_package.py runs this file in that build)."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES, FEATURE_KINDS, make_features
from torch import Tensor

from patchcore_ext import CoresetSampler, PatchScorer, _library, _rotation, ops, reference


def _device() -> torch.device | None:
    if _library.runs_cuda_kernels(torch.device("cpu")):
        return torch.device("cpu")
    gpu = torch.device("cuda", 0)
    return gpu if torch.cuda.is_available() and _library.kernel_problem(gpu) is None else None


DEVICE = _device()
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no GPU that the CUDA kernels run on: the CUDA ops were not tested here")
gpu_only = pytest.mark.skipif(DEVICE is None or DEVICE.type == "cpu", reason="no GPU: streams, graphs and devices were not tested")


def here(features: Tensor) -> Tensor:
    return features.to(DEVICE)


def infinite(count: int) -> Tensor:
    return torch.full((count,), float("inf"), dtype=torch.float64, device=DEVICE)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.cpu(), expected.cpu())


@pytest.mark.parametrize(("kind", "dtype"), [(kind, torch.float32) for kind in FEATURE_KINDS] + [("random", dtype) for dtype in DTYPES[1:]], ids=str)
def test_a_prepared_bank_changes_no_neighbor(kind: str, dtype: torch.dtype) -> None:
    bank = make_features(kind, 1100, 192, dtype)
    queries = torch.cat([make_features(kind, 9, 192, dtype, seed=1), bank[:3]])
    expected = reference.nearest_neighbors(queries, bank, 9)
    prepared = ops.prepare_bank(here(bank))
    assert len(prepared) == 1
    for copies in ((), prepared):
        found = ops.nearest_neighbors(here(queries), here(bank), 9, copies)
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])


def test_the_prefixes_are_contractions_that_fit() -> None:
    bank = here(make_features("random", 2000, 192))
    center, matrix, short, order = _rotation.center_and_prefixes(bank)
    assert (center.dtype, matrix.shape, short) == (torch.float64, (254, 192), 63)
    assert sorted(order.tolist()) == list(range(2000))
    torch.ops.patchcore_ext.prepare_bank(bank, center, matrix, short, order)  # checks both
    with pytest.raises(RuntimeError, match="contractions"):
        torch.ops.patchcore_ext.prepare_bank(bank, center, matrix * 2, short, order)
    with pytest.raises(RuntimeError, match="permutation"):
        torch.ops.patchcore_ext.prepare_bank(bank, center, matrix, short, torch.zeros_like(order))


@pytest.mark.parametrize("score", ["paper", "max", "anomalib", "amazon"])
def test_a_scorer_gives_the_scores_of_the_reference(score: str) -> None:
    bank, patches = make_features("random", 300, 40), make_features("random", 24, 40, seed=1).view(2, 12, 40)
    scores = PatchScorer(here(bank), num_neighbors=5, score=score)(here(patches))
    squared, nearest = (value.view(2, 12) for value in reference.nearest_neighbors(patches.flatten(0, 1), bank, 1))
    assert same(scores.nearest_indices, nearest)
    if score == "paper":
        assert same(scores.image_scores, reference.image_scores(squared, nearest, patches.flatten(0, 1), bank, 5))
    if score == "amazon":
        assert same(scores.image_scores, squared.amax(1).float())
    if score == "max":
        assert same(scores.image_scores, ops.square_root(squared.amax(1).to(DEVICE)).float())


def test_a_coreset_is_that_of_the_reference() -> None:
    features = make_features("random", 700, 40)
    selection = CoresetSampler(num_samples=90, projection_dim=None, seed=3).select(here(features))
    state = torch.full((700,), float("inf"), dtype=torch.float64)
    first = selection.indices[:1].cpu()
    state = reference.update_min_distances(features, features[first], state)
    state[first] = -1.0
    indices, values, _ = reference.greedy_coreset(features, state, 89)
    assert same(selection.indices[1:], indices)
    assert same(selection.distances[1:], ops.square_root(values.to(DEVICE)))


def test_bad_input_names_the_argument() -> None:
    bank, queries = here(make_features("random", 20, 8)), here(make_features("random", 5, 8, seed=1))
    broken = queries.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"queries to be finite, got NaN or infinity in row 3"):
        ops.nearest_neighbors(broken, bank, 1)
    with pytest.raises(ValueError, match=r"features to be finite, got NaN or infinity in row 3"):
        ops.coreset_codes(broken)
    with pytest.raises(ValueError, match=r"centers to be finite"):
        ops.update_min_distances(queries, broken, infinite(5))
    squared, rows = (value.view(1, 5) for value in ops.nearest_neighbors(queries, bank, 1))
    with pytest.raises(ValueError, match=r"nearest_indices to lie in \[0, 20\)"):
        ops.image_scores(squared, rows + 20, queries, bank)
    with pytest.raises(ValueError, match="codes"):
        ops.greedy_coreset(queries, infinite(5), 2, torch.zeros(64, dtype=torch.uint8, device=DEVICE))
    state = infinite(5)
    ops.greedy_coreset(queries, state, 3)
    with pytest.raises(ValueError, match=r"count to lie in \[0, 2\], the rows not yet picked, got 3"):
        ops.greedy_coreset(queries, state, 3)
    state[1] = float("nan")
    with pytest.raises(ValueError, match=r"min_distances to hold squared distances, or -1 for picks, got nan in row 1"):
        ops.greedy_coreset(queries, state, 1)
    with pytest.raises(ValueError, match="bank to have at least one row"):
        ops.image_scores(squared, rows, queries, bank[:0])


def test_minus_zero_is_zero() -> None:
    """Values are ordered like their bits, and those of -0 are large."""
    features = here(torch.arange(4, dtype=torch.float32)[:, None] * 5)
    state = torch.tensor([-0.0, 1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    assert ops.greedy_coreset(features, state, 4)[0].tolist() == [3, 2, 1, 0]


def test_opcheck() -> None:
    bank, queries = here(make_features("random", 300, 192)), here(make_features("random", 6, 192, seed=1))
    center = torch.zeros(192, dtype=torch.float64, device=DEVICE)
    matrix = torch.zeros((254, 192), dtype=torch.int16, device=DEVICE)
    order = torch.arange(300, dtype=torch.int32, device=DEVICE)
    native = torch.ops.patchcore_ext
    for op, arguments in (
        (native.prepare_bank, (bank, center, matrix, 63, order)),
        (native.prepare_bank, (bank, center, matrix[:0], 0, order)),
        (native.coreset_codes, (bank, center, center.new_zeros(192, 0))),
        (native.nearest_neighbors, (queries, bank, 3)),
        (native.greedy_coreset, (bank, infinite(300), 5)),
    ):
        torch.library.opcheck(op, arguments)


@gpu_only
def test_a_graph_replays_the_scores() -> None:
    bank, patches = make_features("random", 400, 64), make_features("random", 48, 64, seed=1).view(2, 24, 64)
    scorer, input_patches = PatchScorer(here(bank)), here(patches).clone()
    expected = scorer(input_patches)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scorer(input_patches)
    input_patches.copy_(here(patches.flip(0)))
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured.image_scores, expected.image_scores.flip(0))
    assert same(captured.patch_distances, expected.patch_distances.flip(0))


@gpu_only
def test_the_current_stream_is_used() -> None:
    bank, queries = here(make_features("random", 3000, 64)), here(make_features("random", 500, 64, seed=1))
    expected = ops.nearest_neighbors(queries, bank, 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        delayed = queries * 1  # on the stream, behind the sleep
        found = ops.nearest_neighbors(delayed, bank, 2)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


@gpu_only
def test_tensors_of_two_devices_are_refused() -> None:
    features = make_features("random", 50, 8)
    with pytest.raises((ValueError, RuntimeError), match=r"device|CUDA|CPU"):
        ops.nearest_neighbors(here(features), features, 1)
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: tensors of two GPUs were not tried")
    with pytest.raises(ValueError, match="one device"):
        ops.nearest_neighbors(here(features), features.to("cuda:1"), 1)
    found = ops.nearest_neighbors(features.to("cuda:1"), features.to("cuda:1"), 1)
    assert found[0].device.index == 1
