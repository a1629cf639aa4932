"""patchcore_ext.ops: equal to the oracles bit for bit, whatever surrounds them; good citizens of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import DTYPES, FEATURE_KINDS, make_features
from numpy_oracle import nearest as numpy_nearest
from torch import Tensor

from patchcore_ext import _random, ops, reference

INFINITY = float("inf")


def state_of(rows: Tensor) -> Tensor:
    return torch.full((rows.shape[0],), INFINITY, dtype=torch.float64, device=rows.device)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(a.cpu(), b.cpu()) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 40])
def test_ops_equal_the_reference_bit_for_bit(kind: str, dim: int, dtype: torch.dtype, device: str) -> None:
    bank = make_features(kind, 50, dim, dtype)
    queries = torch.cat([make_features(kind, 11, dim, dtype, seed=1), bank[:1]])
    asked, known = queries.to(device), bank.to(device)

    for k in (1, 2, 9, 50):
        assert_same(ops.nearest_neighbors(asked, known, k), reference.nearest_neighbors(queries, bank, k))

    squared, rows = (value.view(3, 4) for value in reference.nearest_neighbors(queries, bank, 1))
    for num_neighbors in (1, 2, 9, 100):
        scores = ops.image_scores(squared.to(device), rows.to(device), asked, known, num_neighbors)
        assert_same([scores], [reference.image_scores(squared, rows, queries, bank, num_neighbors)])
        assert_same(ops.score_patches(asked, known, 4, num_neighbors), reference.score_patches(queries, bank, 4, num_neighbors))

    state = state_of(known)
    picks = ops.greedy_coreset(known, state, 50)
    assert_same([*picks, state], reference.greedy_coreset(bank, state_of(bank), 50))

    updated = ops.update_min_distances(asked, known[:5], state_of(asked))
    assert_same([updated], [reference.update_min_distances(queries, bank[:5], state_of(queries))])

    matrix = torch.from_numpy(_random.sparse_projection_matrix(dim, 7, seed=3))
    assert_same([ops.random_projection(known, matrix.to(device))], [reference.random_projection(bank, matrix)])


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_nearest_neighbors_equals_numpy(kind: str) -> None:
    bank, queries = make_features(kind, 30, 37), make_features(kind, 5, 37, seed=1)
    squared, indices = ops.nearest_neighbors(queries, bank, 30)
    expected_squared, expected_indices = numpy_nearest(queries.double().numpy(), bank.double().numpy(), 30)
    assert np.array_equal(squared.numpy(), expected_squared)
    assert np.array_equal(indices.numpy(), expected_indices)


def run_everything(features: Tensor) -> list[Tensor]:
    device = features.device
    state = state_of(features)
    picks = ops.greedy_coreset(features, state, 20)
    squared, rows = ops.nearest_neighbors(features[:24], features, 3)
    scores = ops.image_scores(squared[:, :1].reshape(2, 12), rows[:, :1].reshape(2, 12), features[:24], features[5:], 9)
    projected = ops.random_projection(features, torch.from_numpy(_random.gaussian_projection_matrix(features.shape[1], 5, seed=1)).to(device))
    return [state, *picks, squared, rows, scores, projected]


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_devices_give_the_same_bits(kind: str, device: str) -> None:
    features = make_features(kind, 3000, 64)  # several tiles
    codes = ops.coreset_codes(features.to(device))
    state = state_of(features.to(device))
    picks = ops.greedy_coreset(features.to(device), state, 200, codes)
    expected = state_of(features)
    assert_same(picks, ops.greedy_coreset(features, expected, 200))
    assert_same([state, *run_everything(features.to(device))], [expected, *run_everything(features)])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(threads: int) -> None:
    features = make_features("random", 3000, 64)  # enough work for several slots
    torch.set_num_threads(1)
    expected = run_everything(features)
    torch.set_num_threads(threads)
    assert_same(run_everything(features), expected)


def test_default_device_and_dtype_change_nothing() -> None:
    features = make_features("random", 200, 20)
    expected = run_everything(features)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    assert_same(run_everything(features), expected)


def test_flush_denormal_changes_nothing() -> None:
    features = make_features("random", 100, 9) * 1e-41
    expected = run_everything(features)
    assert expected[2][5] > 0  # the squares are there to be lost
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    found = run_everything(features)
    torch.set_flush_denormal(False)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    features = make_features("random", 100, 33, dtype)
    expected = run_everything(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run_everything(features), expected)


def test_strided_and_offset_tensors_are_read_in_place(device: str) -> None:
    wide = make_features("random", 80, 50).to(device)
    for view in (wide[::2, 3:20], wide.T[5:40, ::3], wide[10:].T.contiguous().T[:, 1:]):
        assert_same(run_everything(view), run_everything(view.contiguous()))


def test_numpy_arrays_are_taken() -> None:
    features = make_features("random", 40, 10)
    expected, _ = ops.nearest_neighbors(features, features, 2)
    array = features.numpy()
    for same in (array, array[::-1][::-1], np.asfortranarray(array), array.astype(">f4")):
        assert torch.equal(ops.nearest_neighbors(same, array, 2)[0], expected)
    frozen = array.copy()
    frozen.flags.writeable = False
    assert torch.equal(ops.nearest_neighbors(frozen, array, 2)[0], expected)
    with pytest.warns(UserWarning, match="float64 and is rounded to float32"):
        ops.nearest_neighbors(array.astype(np.float64), array, 1)


def test_slices_of_picks_change_nothing() -> None:
    features = make_features("tied", 90, 4)
    whole = ops.greedy_coreset(features, state_of(features), 60)
    state = state_of(features)
    parts = [ops.greedy_coreset(features, state, count) for count in (1, 0, 13, 46)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


SAMPLES = {
    "first_nonfinite_row": lambda: (make_features("random", 9, 5),),
    "square_root": lambda: (torch.rand(3, 4, dtype=torch.float64).T,),
    "random_projection": lambda: (make_features("random", 9, 5), torch.ones(3, 5, dtype=torch.float64)),
    "update_min_distances": lambda: (
        make_features("random", 9, 5),
        make_features("random", 2, 5),
        torch.full((9,), INFINITY, dtype=torch.float64),
    ),
    "greedy_coreset": lambda: (make_features("random", 9, 5), torch.full((9,), INFINITY, dtype=torch.float64), 4),
    "greedy_coreset_lazily": lambda: (
        make_features("random", 9, 5),
        torch.full((9,), INFINITY, dtype=torch.float64),
        torch.full((9,), -1, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        4,
        ops.coreset_codes(make_features("random", 9, 5)),
    ),
    "coreset_codes": lambda: (make_features("random", 9, 5), torch.zeros(5, dtype=torch.float64), torch.eye(5, 3, dtype=torch.float64) * 0.99),
    "add_picks": lambda: (
        make_features("random", 9, 5),
        torch.tensor([3, 1]),
        torch.full((9,), INFINITY, dtype=torch.float64),
        ops.coreset_codes(make_features("random", 9, 5)),
    ),
    "prepare_bank": lambda: (
        make_features("random", 300, 40),
        torch.zeros(40, dtype=torch.float64),
        torch.eye(9, 40).mul(16384).to(torch.int16),
        5,
        torch.arange(300, dtype=torch.int32),
    ),
    "nearest_neighbors": lambda: (make_features("random", 9, 5), make_features("random", 7, 5), 3),
    "image_scores": lambda: (
        torch.rand(3, 2, dtype=torch.float64),
        torch.tensor([[0, 1], [2, 3], [4, 4]]),
        make_features("random", 6, 5),
        make_features("random", 7, 5),
        3,
    ),
    "score_patches": lambda: (make_features("random", 6, 5), make_features("random", 7, 5), 2, 3),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.patchcore_ext, name).default, SAMPLES[name]())


@pytest.mark.parametrize("name", ["square_root", "random_projection", "nearest_neighbors", "image_scores", "score_patches"])
def test_export_traces_the_op(name: str) -> None:
    arguments = SAMPLES[name]()
    tensors = tuple(value for value in arguments if isinstance(value, Tensor))
    constants = arguments[len(tensors) :]

    class Call(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            result: Tensor | tuple[Tensor, Tensor] = getattr(ops, name)(*inputs, *constants)
            return result

    exported = torch.export.export(Call(), tensors).module()
    expected = Call()(*tensors)
    found = exported(*tensors)
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(a, b)


def test_compile_fullgraph_gives_the_same_bits() -> None:
    bank, queries = make_features("random", 30, 12), make_features("random", 8, 12, seed=1)

    def score(queries: Tensor) -> Tensor:
        squared, rows = ops.nearest_neighbors(queries, bank, 1)
        return ops.image_scores(squared.view(2, 4), rows.view(2, 4), queries, bank, 5) + 0.0

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries), score(queries))


@pytest.mark.parametrize("name", ["square_root", "random_projection", "nearest_neighbors", "image_scores", "score_patches"])
def test_backward_is_refused_with_a_clear_error(name: str) -> None:
    arguments = [value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value for value in SAMPLES[name]()]
    result = getattr(ops, name)(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    with pytest.raises(NotImplementedError, match=f"{name}: gradients are not implemented; detach"):
        result.sum().backward()


def test_selection_ops_detach() -> None:
    features = make_features("random", 9, 5).requires_grad_()
    state = state_of(features)
    assert not ops.greedy_coreset(features, state, 3)[1].requires_grad
    assert not ops.update_min_distances(features, features[:1], state).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_rows_are_named(bad: float, dtype: torch.dtype) -> None:
    good = make_features("random", 20, 6, dtype)
    features = good.clone()
    features[13, 2], features[17, 0] = bad, bad
    matrix = torch.zeros(2, 6, dtype=torch.float64)
    sentence = "to be finite, got NaN or infinity in row 13 "
    assert ops.first_nonfinite_row(features) == 13
    assert ops.first_nonfinite_row(good) == -1
    with pytest.raises(ValueError, match=f"random_projection: expected features {sentence}"):
        ops.random_projection(features, matrix)
    with pytest.raises(ValueError, match=f"greedy_coreset: expected features {sentence}"):
        ops.greedy_coreset(features, state_of(features), 1)
    with pytest.raises(ValueError, match=f"update_min_distances: expected centers {sentence}"):
        ops.update_min_distances(good, features, state_of(good))
    with pytest.raises(ValueError, match=f"nearest_neighbors: expected bank {sentence}"):
        ops.nearest_neighbors(good, features, 1)
    with pytest.raises(ValueError, match=f"nearest_neighbors: expected queries {sentence}"):
        ops.nearest_neighbors(features, good, 1)


def test_wrong_arguments_are_named() -> None:
    bank = make_features("random", 5, 4)
    with pytest.raises(ValueError, match=r"nearest_neighbors: expected k to be between 1 and 5 \(the rows of the bank\), got 6"):
        ops.nearest_neighbors(bank, bank, 6)
    with pytest.raises(ValueError, match=r"expected queries to have the dimension of bank \(4\), got 3"):
        ops.nearest_neighbors(bank[:, :3], bank, 1)
    with pytest.raises(ValueError, match=r"expected queries to be \[rows, dim\] with dim >= 1, got float32 of shape \[4\]"):
        ops.nearest_neighbors(bank[0], bank, 1)
    with pytest.raises(TypeError, match="expected bank to be float32, float16 or bfloat16, got int64"):
        ops.nearest_neighbors(bank, bank.long(), 1)
    with pytest.raises(TypeError, match=r"expected queries to be a torch.Tensor or numpy.ndarray, got list"):
        ops.nearest_neighbors([[1.0]], bank, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_distances to be a contiguous float64 tensor of shape \[5\], got float32"):
        ops.greedy_coreset(bank, torch.zeros(5), 1)
    with pytest.raises(ValueError, match=r"expected count to be between 0 and 5"):
        ops.greedy_coreset(bank, state_of(bank), 6)
    state = state_of(bank)
    ops.greedy_coreset(bank, state, 3)
    with pytest.raises(ValueError, match=r"expected count to lie in \[0, 2\], the rows not yet picked, got 3"):
        ops.greedy_coreset(bank, state, 3)
    squared, rows = torch.zeros(1, 5, dtype=torch.float64), torch.full((1, 5), 7)
    with pytest.raises(ValueError, match=r"nearest_indices to lie in \[0, 5\), the rows of the bank, got 7"):
        ops.image_scores(squared, rows, bank, bank)
    with pytest.raises(ValueError, match="queries to have 5 rows, got 4"):
        ops.image_scores(squared, rows * 0, bank[:4], bank)
    with pytest.raises(ValueError, match="^score_patches: expected queries to have a multiple of 2 >= 1 rows, got 5"):
        ops.score_patches(bank, bank, 2)
    with pytest.raises(ValueError, match="^score_patches: expected num_patches to be at least 1, got 0"):
        ops.score_patches(bank, bank, 0)
    with pytest.raises(ValueError, match=r"^score_patches: expected queries to have the dimension of bank \(4\), got 3"):
        ops.score_patches(bank[:, :3], bank, 1)
    with pytest.raises(ValueError, match="^score_patches: expected queries to be finite, got NaN or infinity in row 1 "):
        ops.score_patches(torch.tensor([[0.0], [math.inf]]), torch.zeros(3, 1), 2)


def test_the_registered_ops_check_too() -> None:
    bank = make_features("random", 5, 4)
    with pytest.raises(RuntimeError, match=r"patchcore_ext: nearest_neighbors: expected k to lie in \[1, 5\]"):
        torch.ops.patchcore_ext.nearest_neighbors(bank, bank, 9)
    with pytest.raises(RuntimeError, match="expected queries to be float32, float16 or bfloat16"):
        torch.ops.patchcore_ext.nearest_neighbors(bank.double(), bank, 1)
    for wrong, sentence in (((0, 1), "a multiple of 0 >= 1 rows, got 5"), ((5, 0), "expected num_neighbors to be at least 1, got 0")):
        with pytest.raises(RuntimeError, match=f"patchcore_ext: score_patches: .*{sentence}"):
            torch.ops.patchcore_ext.score_patches(bank, bank, *wrong)
    with pytest.raises(RuntimeError, match="score_patches: expected k to lie in|score_patches: expected bank to have at least one row"):
        torch.ops.patchcore_ext.score_patches(bank, bank[:0], 5, 1)


def test_square_root_is_correctly_rounded() -> None:
    values = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3
    exact = [math.sqrt(value) for value in values.tolist()]
    assert ops.square_root(values).tolist() == exact
    assert reference.square_root(values).tolist() == exact
    assert torch.equal(ops.square_root(values[::3]), ops.square_root(values)[::3])
    special = torch.tensor([0.0, INFINITY, 5e-324], dtype=torch.float64)
    assert ops.square_root(special).tolist() == reference.square_root(special).tolist() == [0.0, INFINITY, math.sqrt(5e-324)]
    with pytest.raises(TypeError, match="square_root: expected values to be a float64 tensor, got float32"):
        ops.square_root(values.float())


def test_empty_queries() -> None:
    bank = make_features("random", 5, 4)
    squared, rows = ops.nearest_neighbors(bank[:0], bank, 2)
    assert squared.shape == rows.shape == (0, 2)
    assert [value.shape for value in ops.score_patches(bank[:0], bank, 3)] == [(0,), (0, 3), (0, 3)]
    assert ops.image_scores(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.int64), bank[:0], bank).shape == (0,)
