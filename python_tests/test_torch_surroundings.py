"""The ops and PatchScorer in what torch puts around them: compile, export, AOTInductor, inference mode, autocast, Python threads, state dicts."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, make_features
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from patchcore_ext import CoresetSampler, PatchScorer, PatchScores, _random, ops, reference

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")),
    reason="no C++ compiler, which torch's inductor needs: compiled and ahead-of-time packages did not run",
)
DIM = 16


class Everything(nn.Module):
    """Projection, search, root and image score, with ordinary torch before, between and behind."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        matrix = torch.from_numpy(_random.sparse_projection_matrix(DIM, 9, seed=1))
        self.register_buffer("matrix", matrix)
        self.register_buffer("bank", ops.random_projection(make_features("random", rows, DIM), matrix))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = ops.random_projection(features.flatten(0, 1) * 2.0, self.matrix)
        squared, rows = ops.nearest_neighbors(patches, self.bank, 2)
        distances = ops.square_root(squared).float()
        shape = features.shape[:2]
        scores = ops.image_scores(squared[:, 0].reshape(shape), rows[:, 0].reshape(shape), patches, self.bank, 5)
        return scores + 1.0, distances.amax(1), rows


class Scoring(nn.Module):
    """PatchScorer behind a layer, as a plain tuple."""

    def __init__(self, rows: int = 300) -> None:
        super().__init__()
        self.scorer = PatchScorer(make_features("random", rows, DIM), num_neighbors=4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.scorer(features * 0.5)
        return scores.image_scores, scores.patch_distances, scores.nearest_indices


MODULES: dict[str, Callable[[], nn.Module]] = {"ops": Everything, "PatchScorer": Scoring}


def images_of_patches(count: int, seed: int = 3) -> Tensor:
    return make_features("random", count * 6, DIM, seed=seed).view(count, 6, DIM)


def assert_same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("name", MODULES)
def test_inductor_compiles_one_graph_of_the_same_bits(name: str) -> None:
    module = MODULES[name]().eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for count in (2, 5):
            assert_same_bits(compiled(images_of_patches(count)), module(images_of_patches(count)))


def test_preparing_banks_of_many_sizes_compiles_once() -> None:
    """What is asked of the extension must not make a constant of the number of rows."""
    counter = CompileCounter()
    prepare = torch.compile(torch.ops.patchcore_ext.prepare_bank.default, backend=counter, fullgraph=True, dynamic=True)
    matrix = torch.eye(7, 40, dtype=torch.float64).mul(2**14).to(torch.int16)
    for rows in (300, 411, 520):
        bank = make_features("random", rows, 40)
        arguments = bank, bank.median(0).values.double(), matrix, 7, torch.arange(rows, dtype=torch.int32)
        assert torch.equal(prepare(*arguments), torch.ops.patchcore_ext.prepare_bank(*arguments))
    assert counter.frame_count == 1


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (images_of_patches(2),), dynamic_shapes={"features": {0: torch.export.Dim("batch", min=1)}})


@pytest.mark.parametrize("name", MODULES)
def test_export_saves_and_loads(name: str, tmp_path: Path) -> None:
    module = MODULES[name]().eval()
    torch.export.save(exported(module), tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    for count in (1, 4):
        assert_same_bits(loaded(images_of_patches(count)), module(images_of_patches(count)))


@needs_compiler
def test_an_ahead_of_time_package_runs_in_another_process(tmp_path: Path) -> None:
    module = Scoring().eval()
    package = torch._inductor.aoti_compile_and_package(exported(module), package_path=str(tmp_path / "scoring.pt2"))
    features = images_of_patches(3)
    torch.save(features, tmp_path / "features.pt")
    code = f"""
import torch
import patchcore_ext  # registers the ops
run = torch._inductor.aoti_load_package({package!r})
torch.save([value.clone() for value in run(torch.load({str(tmp_path / "features.pt")!r}))], {str(tmp_path / "found.pt")!r})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert_same_bits(tuple(torch.load(tmp_path / "found.pt")), module(features))


@pytest.mark.parametrize("name", MODULES)
def test_inference_mode_changes_nothing(name: str) -> None:
    module = MODULES[name]()
    expected = module(images_of_patches(2))
    with torch.inference_mode():
        inference_tensors = images_of_patches(2).clone()
        assert inference_tensors.is_inference()
        assert_same_bits(module(inference_tensors), expected)
        assert_same_bits(MODULES[name]()(inference_tensors), expected)  # made in inference mode


def test_selection_in_inference_mode() -> None:
    features = make_features("random", 3000, DIM)
    expected = CoresetSampler(num_samples=40, progress=False).select(features)
    with torch.inference_mode():
        found = CoresetSampler(num_samples=40, progress=False).select(features.clone())
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)


def test_bfloat16_from_autocast_is_an_exact_input() -> None:
    """What a layer under autocast hands over is bfloat16; the scores are those of these very numbers."""
    layer, features = nn.Linear(DIM, DIM), images_of_patches(3)
    scorer = PatchScorer(make_features("random", 300, DIM))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        patches = layer(features)
        found = scorer(patches)
    assert patches.dtype == torch.bfloat16
    assert_same_bits(found, scorer(patches.float()))
    squared, rows = reference.nearest_neighbors(patches.flatten(0, 1), scorer.bank, 1)
    assert torch.equal(found.nearest_indices.flatten(), rows[:, 0])
    assert torch.equal(found.patch_distances.flatten(), reference.square_root(squared[:, 0]).float())


def test_several_python_threads_run_the_ops_at_once() -> None:
    """Different work in each thread, so that state shared by mistake would show; torch's own threads below them."""
    torch.set_num_threads(2)

    def work(seed: int) -> tuple[Tensor, ...]:
        features = make_features("random", 3000 + 100 * seed, DIM, seed=seed)
        selection = CoresetSampler(num_samples=300, seed=seed, progress=False).select(features)
        scores = PatchScorer(features[selection.indices])(features[:60].view(3, 20, DIM))
        projected = ops.random_projection(features[:50], torch.from_numpy(_random.gaussian_projection_matrix(DIM, 5, seed=seed)))
        return (selection.indices, selection.distances, *scores, projected)

    expected = [work(seed) for seed in range(4)]
    found: dict[int, list[tuple[Tensor, ...]]] = {seed: [] for seed in range(4)}
    start = threading.Barrier(4)

    def repeat(seed: int) -> None:
        start.wait()
        found[seed] += [work(seed) for _ in range(3)]

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert len(found[seed]) == 3
        for result in found[seed]:
            assert_same_bits(result, expected[seed])


def scorer_of(seed: int = 0, rows: int = 300, dtype: torch.dtype = torch.float32) -> PatchScorer:
    return PatchScorer(make_features("random", rows, DIM, dtype, seed), num_neighbors=4)


def scores_of(scorer: PatchScorer) -> PatchScores:
    result: PatchScores = scorer(images_of_patches(4))
    return result


def test_the_state_dict_holds_the_bank_and_nothing_else(tmp_path: Path) -> None:
    scorer = scorer_of()
    torch.save(scorer.state_dict(), tmp_path / "scorer.pt")
    state = torch.load(tmp_path / "scorer.pt", weights_only=True)
    assert list(state) == ["bank"]
    for assign in (False, True):
        other = scorer_of(seed=9)
        other.load_state_dict(state, strict=True, assign=assign)
        assert_same_bits(scores_of(other), scores_of(scorer))  # with copies made anew: old ones would give old neighbours


def test_a_scorer_inside_a_module_is_saved_with_it() -> None:
    module, other = Scoring(), Scoring()
    other.scorer.bank.mul_(2)
    other.scorer.prepare()
    assert list(module.state_dict()) == ["scorer.bank"]
    other.load_state_dict(module.state_dict(), strict=True)
    assert_same_bits(other(images_of_patches(2)), module(images_of_patches(2)))


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    scorer = scorer_of()
    before = scores_of(scorer)
    with pytest.raises(RuntimeError, match="size mismatch for bank"):
        scorer.load_state_dict(scorer_of(rows=299).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        scorer.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        scorer.load_state_dict({**scorer.state_dict(), "other": torch.zeros(1)})
    assert_same_bits(scores_of(scorer), before)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))], ids=["deepcopy", "pickle"])
def test_copies_have_their_own_bank(copy_of: Callable[[PatchScorer], PatchScorer]) -> None:
    scorer = scorer_of()
    expected = scores_of(scorer)
    other = copy_of(scorer)
    scorer.bank.zero_()
    scorer.prepare()
    assert_same_bits(scores_of(other), expected)
    assert scorer.describe()["prepared_bytes"] == other.describe()["prepared_bytes"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_is_another_bank(dtype: torch.dtype) -> None:
    bank = make_features("random", 300, DIM)
    assert_same_bits(scores_of(PatchScorer(bank, num_neighbors=4).to(dtype)), scores_of(PatchScorer(bank.to(dtype), num_neighbors=4)))
