"""Our parts for anomalib: sampler, search, ``accelerate``; on anomalib itself where it is installed, else on a stand-in with its seams."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import fake_anomalib
import pytest
import torch
from torch import Tensor

from patchcore_ext import CoresetSampler, ops, reference
from patchcore_ext.integrations import anomalib as ours
from patchcore_ext.integrations.anomalib import seams, search

INSTALLED = importlib.util.find_spec("anomalib") is not None
SEAMS = (
    fake_anomalib.COMPONENTS,
    f"{fake_anomalib.COMPONENTS}.sampling",
    fake_anomalib.SAMPLER,
    fake_anomalib.PATCHCORE,
    fake_anomalib.ANOMALY_DINO,
)


@pytest.fixture(autouse=True)
def anomalib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """anomalib, or the stand-in; no test leaves it accelerated."""
    if not INSTALLED:
        fake_anomalib.install(monkeypatch)
    else:
        importlib.import_module("anomalib.models")
    yield
    ours.restore()


def rows_of(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def model_with(bank: Tensor) -> Any:
    model = sys.modules[fake_anomalib.PATCHCORE].PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False)  # type: ignore[attr-defined]
    model.memory_bank = bank
    return model.eval()


def bound() -> dict[str, Any]:
    """What anomalib has bound in all places."""
    search_method = vars(sys.modules[fake_anomalib.PATCHCORE].PatchcoreModel)["nearest_neighbors"]  # type: ignore[attr-defined]
    return {"search": search_method, **{name: vars(sys.modules[name])["KCenterGreedy"] for name in SEAMS}}


# Sampler


def test_sampler_picks_greedily_on_its_features() -> None:
    sampler = ours.KCenterGreedy(rows_of(3000, 40), 0.05)
    picks = sampler.select_coreset_idxs()
    assert isinstance(picks, list)
    assert all(type(pick) is int for pick in picks)
    assert len(picks) == sampler.coreset_size == 150
    state = reference.update_min_distances(sampler.features, sampler.features[picks[:1]], torch.full((3000,), torch.inf, dtype=torch.float64))
    state[picks[0]] = -1
    assert picks[1:] == reference.greedy_coreset(sampler.features, state, 149)[0].tolist()


def test_sampler_takes_rows_with_more_dimensions_as_they_are() -> None:
    rows = rows_of(300, 12).reshape(300, 3, 2, 2)
    sampler = ours.KCenterGreedy(rows, 0.1)
    torch.manual_seed(0)
    coreset = sampler.sample_coreset()
    torch.manual_seed(0)
    first = int(torch.randint(300, (1,)))
    assert torch.equal(sampler.features, rows.reshape(300, 12))
    assert torch.equal(coreset, rows[CoresetSampler(num_samples=30, projection_dim=None, start=first).select(rows.reshape(300, 12)).indices])


@pytest.mark.parametrize("start", [torch.tensor(7), torch.tensor([7])])
def test_sampler_starts_where_randint_says(start: Tensor) -> None:
    with patch("torch.randint", side_effect=lambda *_, **__: start):
        assert ours.KCenterGreedy(rows_of(100, 4, 1)[:, :, None], 0.05).select_coreset_idxs()[0] == 7


def test_sampler_steps_by_hand_are_those_of_a_selection() -> None:
    sampler = ours.KCenterGreedy(rows_of(200, 6)[:, :, None], 0.1)
    picks = sampler.select_coreset_idxs()
    kept = sampler.features[picks]
    after = sampler.min_distances
    assert after is not None
    assert after.shape == (200, 1)
    torch.testing.assert_close(after, torch.cdist(sampler.features, kept, compute_mode="donot_use_mm_for_euclid_dist").amin(1, keepdim=True))
    sampler.reset_distances()
    with pytest.raises(TypeError, match="must be of type Tensor"):
        sampler.get_new_idx()
    by_hand: list[Any] = [torch.tensor(picks[0])]
    for _ in range(len(picks) - 1):
        sampler.update_distances(by_hand[-1])
        by_hand.append(sampler.get_new_idx())
    assert [int(pick) for pick in by_hand] == picks
    sampler.update_distances(None)
    sampler.update_distances(by_hand[-1][None])
    assert torch.equal(sampler.min_distances, after)


def test_sampler_never_repeats_a_row() -> None:
    rows = torch.ones(60, 3, 1)
    assert sorted(ours.KCenterGreedy(rows, 1.0).select_coreset_idxs()) == list(range(60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sampler_keeps_the_dtype(dtype: torch.dtype) -> None:
    coreset = ours.KCenterGreedy(rows_of(400, 20).to(dtype), 0.1).sample_coreset()
    assert coreset.shape == (40, 20)
    assert coreset.dtype == dtype


def test_sampler_refuses_what_keeps_nothing_or_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="coreset_size must be a positive integer"):
        ours.KCenterGreedy(torch.randn(10, 4), sampling_ratio=0.01)
    with pytest.raises(ValueError, match="at most 1"):
        ours.KCenterGreedy(torch.randn(10, 4), sampling_ratio=1.5)
    rows = torch.randn(20, 4, 1)
    rows[3] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        ours.KCenterGreedy(rows, 0.5).select_coreset_idxs()


# Search


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 5])
def test_accelerated_search_is_exact_in_anomalibs_shapes(k: int, dtype: torch.dtype) -> None:
    bank, queries = rows_of(500, 64).to(dtype), rows_of(70, 64, 1).to(dtype)
    model = model_with(bank)
    with ours.accelerate():
        distances, indices = model.nearest_neighbors(queries, k)
    squared, expected = reference.nearest_neighbors(queries, bank, k)
    assert distances.shape == indices.shape == ((70,) if k == 1 else (70, k))
    assert distances.dtype == dtype
    assert torch.equal(indices.reshape(70, k), expected)
    assert torch.equal(distances.reshape(70, k), ops.square_root(squared).to(dtype))


def test_prepared_copies_follow_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(search.ops, "prepare_bank", lambda bank, make=ops.prepare_bank: made.append(bank) or make(bank))
    model, queries = model_with(rows_of(600, 32)), rows_of(8, 32, 1)
    with ours.accelerate():
        model.nearest_neighbors(queries, 1)
        model.nearest_neighbors(queries, 3)
        assert len(made) == 1
        model.memory_bank.copy_(rows_of(600, 32, 2))  # as load_state_dict does
        assert torch.equal(model.nearest_neighbors(queries, 1)[1], reference.nearest_neighbors(queries, model.memory_bank, 1)[1][:, 0])
        assert len(made) == 2
        model.memory_bank = rows_of(600, 32, 3)
        assert torch.equal(model.nearest_neighbors(queries, 1)[1], reference.nearest_neighbors(queries, model.memory_bank, 1)[1][:, 0])
        assert len(made) == 3


def test_banks_made_in_inference_mode_are_never_stale() -> None:
    queries = rows_of(80, 32, 1)
    with torch.inference_mode():
        model = model_with(rows_of(600, 32).clone())
        with ours.accelerate():
            model.nearest_neighbors(queries, 1)
            model.memory_bank.copy_(rows_of(600, 32, 2))
            assert torch.equal(model.nearest_neighbors(queries, 1)[1], reference.nearest_neighbors(queries, model.memory_bank, 1)[1][:, 0])


def test_prepared_copies_go_with_the_bank() -> None:
    gc.collect()
    before = len(search._copies)
    bank = rows_of(600, 32)
    search.prepared(bank)
    assert len(search._copies) == before + 1
    del bank
    gc.collect()
    assert len(search._copies) == before


def test_threads_may_search_at_once() -> None:
    model, queries = model_with(rows_of(2000, 64)), rows_of(50, 64, 1)
    expected = reference.nearest_neighbors(queries, model.memory_bank, 1)[1][:, 0]
    found: list[Tensor] = []
    with ours.accelerate():
        threads = [threading.Thread(target=lambda: found.append(model.nearest_neighbors(queries, 1)[1])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(torch.equal(indices, expected) for indices in found)


def test_nothing_of_ours_is_saved_with_a_model() -> None:
    model, queries = model_with(rows_of(600, 32)), rows_of(8, 32, 1)
    names, attributes = set(model.state_dict()), set(vars(model))
    with ours.accelerate():
        expected = model.nearest_neighbors(queries, 1)
        assert set(model.state_dict()) == names
        assert set(vars(model)) == attributes
        again = copy.deepcopy(model)
        assert torch.equal(again.nearest_neighbors(queries, 1)[0], expected[0])


class _Spy:
    """Counts calls of anomalib's own search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        model = sys.modules[fake_anomalib.PATCHCORE].PatchcoreModel  # type: ignore[attr-defined]
        stock = model.nearest_neighbors

        def counted(module: Any, embedding: Tensor, n_neighbors: int) -> Any:
            self.calls += 1
            return stock(module, embedding, n_neighbors)

        monkeypatch.setattr(model, "nearest_neighbors", counted)


class _Searcher(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, queries: Tensor) -> Any:
        return self.model.nearest_neighbors(queries, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_exports_and_compilers_see_anomalibs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = _Spy(monkeypatch)
    wrapped, queries = _Searcher(model_with(rows_of(300, 16))), rows_of(5, 16, 1)
    with ours.accelerate():
        wrapped(queries)
        assert spy.calls == 0
        program = torch.export.export(wrapped, (queries,))
        assert "patchcore_ext" not in str(program.graph)
        assert torch.equal(program.module()(queries)[1], wrapped(queries)[1])
        traced = torch.jit.trace(wrapped, queries, check_trace=False)
        assert "patchcore_ext" not in str(traced.inlined_graph)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        calls = spy.calls
        wrapped(queries)
        assert spy.calls == calls + 1


def test_searches_that_are_not_ours_to_do_are_anomalibs(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = _Spy(monkeypatch)
    model, queries = model_with(rows_of(300, 16)), rows_of(5, 16, 1)
    with ours.accelerate():
        asking = queries.clone().requires_grad_()
        model.nearest_neighbors(asking, 1)[0].sum().backward()
        assert asking.grad is not None
        with torch.no_grad():
            model.nearest_neighbors(asking, 1)
        assert spy.calls == 1
        model.memory_bank = model.memory_bank.double()
        model.nearest_neighbors(queries.double(), 1)
        assert spy.calls == 2
        model.memory_bank = model.memory_bank.to("meta")
        model.nearest_neighbors(queries.double().to("meta"), 1)
        assert spy.calls == 3


# accelerate and restore


def test_accelerate_changes_all_places_and_restore_gives_all_back() -> None:
    before = bound()
    ours.accelerate()
    now = bound()
    assert all(now[name] is ours.KCenterGreedy for name in SEAMS)
    assert now["search"] is not before["search"]
    ours.restore()
    assert all(bound()[name] is value for name, value in before.items())
    ours.restore()
    assert all(bound()[name] is value for name, value in before.items())


def test_accelerate_twice_is_accelerate_once() -> None:
    before = bound()
    ours.accelerate()
    first = bound()
    ours.accelerate()
    assert all(bound()[name] is value for name, value in first.items())
    ours.restore()
    assert all(bound()[name] is value for name, value in before.items())


def test_blocks_end_what_they_began() -> None:
    before = bound()
    with ours.accelerate():
        with ours.accelerate():
            pass
        assert bound()[fake_anomalib.PATCHCORE] is ours.KCenterGreedy
        with pytest.raises(ZeroDivisionError), ours.accelerate():
            _ = 1 / 0
        assert bound()[fake_anomalib.PATCHCORE] is ours.KCenterGreedy
    assert all(bound()[name] is value for name, value in before.items())
    with pytest.raises(ZeroDivisionError), ours.accelerate():
        _ = 1 / 0
    assert all(bound()[name] is value for name, value in before.items())


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bound()

    class Refusing:
        """Takes no attributes."""

        __slots__ = ()
        __name__ = "Refusing"

    found = seams._find_seams()
    monkeypatch.setattr(seams, "_find_seams", lambda: [*found, seams._Seam(Refusing(), "search", None, None)])
    with pytest.raises(AttributeError):
        ours.accelerate()
    assert all(bound()[name] is value for name, value in before.items())


def test_an_anomalib_that_is_built_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bound()
    monkeypatch.delattr(sys.modules[fake_anomalib.PATCHCORE], "PatchcoreModel")
    with pytest.raises(RuntimeError, match="PatchcoreModel"):
        ours.accelerate()
    monkeypatch.undo()
    if INSTALLED:
        assert all(bound()[name] is value for name, value in before.items())


def test_what_others_have_changed_meanwhile_stays() -> None:
    module: Any = sys.modules[fake_anomalib.ANOMALY_DINO]
    stock = module.KCenterGreedy
    ours.accelerate()
    try:
        module.KCenterGreedy = theirs = type("Theirs", (), {})
        with pytest.warns(UserWarning, match="KCenterGreedy has been changed by others"):
            ours.restore()
        assert module.KCenterGreedy is theirs
    finally:
        module.KCenterGreedy = stock


def test_models_pickle_as_anomalibs_own() -> None:
    if not INSTALLED:
        pytest.skip("anomalib is not installed: pickling of its models did not run")
    model = model_with(rows_of(300, 16))
    with ours.accelerate():
        model.nearest_neighbors(rows_of(5, 16, 1), 1)
        data = pickle.dumps(model)
        file = io.BytesIO()
        torch.save({"model": model}, file)
    assert b"patchcore_ext" not in data
    assert b"patchcore_ext" not in file.getvalue()
    assert torch.equal(pickle.loads(data).memory_bank, model.memory_bank)


def test_importing_the_integrations_imports_no_third_party() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {"anomalib", "lightning", "patchcore", "faiss", "timm"}, name
sys.meta_path.insert(0, Refuse())
import patchcore_ext.integrations.anomalib, patchcore_ext.integrations.patchcore_inspection
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=fake_anomalib.__file__.rsplit("/", 2)[0])


def test_package_says_what_it_has() -> None:
    assert set(ours.__all__) <= set(dir(ours))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ours.nonsense
