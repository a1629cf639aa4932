"""anomalib's Engine, command line, checkpoints and exports with our parts, against anomalib as it is; where anomalib is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anomalib", reason="anomalib is not installed (`make test-peers` runs these tests): our parts were not tried in its Engine")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]

from anomalib.data import Folder  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Patchcore  # noqa: E402
from anomalib.models.components import KCenterGreedy  # noqa: E402
from lightning import seed_everything  # noqa: E402

from patchcore_ext import PatchScorer, reference  # noqa: E402
from patchcore_ext.integrations import anomalib as ours  # noqa: E402
from patchcore_ext.integrations.anomalib import search  # noqa: E402

SETTINGS: dict[str, Any] = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False, "coreset_sampling_ratio": 0.1}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good stripes, and stripes with a square."""
    root, generator = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for name, count in (("good", 6), ("test_good", 3), ("test_bad", 3)):
        (root / name).mkdir()
        for i in range(count):
            pixels = 100 + 80 * np.sin(np.arange(64) / 4 + generator.random())[:, None] + 10 * generator.random((64, 64, 3)).transpose(2, 0, 1)
            if name == "test_bad":
                pixels[:, 20:40, 20:40] = 255
            Image.fromarray(pixels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def data_of(folder: Path) -> Folder:
    return Folder(
        name="stripes",
        root=folder,
        normal_dir="good",
        normal_test_dir="test_good",
        abnormal_dir="test_bad",
        train_batch_size=4,
        eval_batch_size=3,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def model_of(kind: Any, **more: Any) -> Any:
    seed_everything(0)
    return kind(**SETTINGS, pre_processor=Patchcore.configure_pre_processor((128, 128)), visualizer=False, **more)


def engine_of(results: Path) -> Engine:
    return Engine(accelerator="cpu", logger=False, default_root_dir=results, enable_progress_bar=False, enable_model_summary=False)


def fitted(kind: Any, folder: Path, results: Path, **more: Any) -> tuple[Any, Any, torch.Tensor]:
    """Model, metrics and scores, after the same seeding whatever the kind."""
    model, engine, data = model_of(kind, **more), engine_of(results), data_of(folder)
    seed_everything(0)
    engine.fit(model, datamodule=data)
    metrics = engine.test(model, datamodule=data, verbose=False)
    return model, metrics, scores_of(engine, model, data)


def scores_of(engine: Engine, model: Any, data: Folder) -> torch.Tensor:
    return torch.cat([batch.pred_score for batch in engine.predict(model, datamodule=data, return_predictions=True) or []])


@pytest.fixture(scope="module")
def stock(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, torch.Tensor, Path]:
    results = tmp_path_factory.mktemp("stock")
    return *fitted(Patchcore, folder, results), results


def test_sampler_picks_what_anomalib_picks() -> None:
    rows = torch.randn(3000, 400, generator=torch.Generator().manual_seed(0))
    picks = []
    for kind in (KCenterGreedy, ours.KCenterGreedy):
        seed_everything(1)
        picks.append(kind(rows, 0.02).select_coreset_idxs())
    assert picks[0] == picks[1]


@pytest.fixture(scope="module")
def with_ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, torch.Tensor, Path]:
    results = tmp_path_factory.mktemp("ours")
    made: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.ops, "prepare_bank", lambda bank, make=search.ops.prepare_bank: made.append(bank) or make(bank))
        found = fitted(ours.Patchcore, folder, results)
    assert [len(bank) for bank in made] == [len(found[0].model.memory_bank)]  # prepared once, for all batches of validation, test and prediction
    return *found, results


@pytest.mark.parametrize("way", ["class", "accelerate"])
def test_engine_finds_the_same(way: str, folder: Path, tmp_path: Path, stock: Any, with_ours: Any) -> None:
    model, metrics, scores, _ = with_ours
    if way == "accelerate":
        with ours.accelerate():
            model, metrics, scores = fitted(Patchcore, folder, tmp_path)
    assert torch.equal(model.model.memory_bank, stock[0].model.memory_bank)
    torch.testing.assert_close(scores, stock[2], atol=1e-4, rtol=0)
    assert metrics == stock[1]
    assert scores.max() > scores.min()


def test_half_precision_works() -> None:
    model, images = model_of(ours.Patchcore, precision="float16"), torch.rand(2, 3, 64, 64)
    model.model.train()
    model.model(images)
    model.fit()
    with torch.no_grad():
        found = model.model.eval()(images)
    assert model.model.memory_bank.dtype == found.pred_score.dtype == torch.float16
    assert found.pred_score.isfinite().all()


def test_memory_bank_is_made_of_all_parts() -> None:
    model = model_of(ours.Patchcore).model
    parts = [torch.randn(50, 384), torch.randn(70, 384), torch.randn(30, 384)]
    model.embedding_store.extend(parts)
    model.subsample_embedding(1.0)
    assert torch.equal(model.memory_bank.sort(0).values, torch.cat(parts).sort(0).values)
    assert model.embedding_store == []
    with pytest.raises(ValueError, match="Embedding store is empty"):
        model.subsample_embedding(0.1)


def test_checkpoints_go_both_ways(folder: Path, tmp_path: Path, stock: Any, with_ours: Any) -> None:
    (checkpoint,) = stock[3].rglob("model.ckpt")
    loaded = ours.Patchcore.load_from_checkpoint(checkpoint)
    assert type(loaded.model).__module__.startswith("patchcore_ext")
    torch.testing.assert_close(scores_of(engine_of(tmp_path), loaded, data_of(folder)), stock[2], atol=1e-4, rtol=0)
    (checkpoint,) = with_ours[3].rglob("model.ckpt")
    back = Patchcore.load_from_checkpoint(checkpoint)
    assert type(back.model).__module__.startswith("anomalib")
    torch.testing.assert_close(scores_of(engine_of(tmp_path), back, data_of(folder)), stock[2], atol=1e-4, rtol=0)


def test_memory_bank_of_checkpoint_and_export(folder: Path, tmp_path: Path, stock: Any) -> None:
    (checkpoint,) = stock[3].rglob("model.ckpt")
    for path in (checkpoint, stock[0].to_torch(tmp_path)):
        bank = ours.memory_bank_from_checkpoint(path)
        assert torch.equal(bank.features, stock[0].model.memory_bank)
        assert bank.metadata["anomalib"]["backbone"] == "resnet18"
        assert bank.metadata["anomalib"]["num_neighbors"] == 9
    model, images = stock[0].model.eval(), torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = {name: model.feature_pooler(maps) for name, maps in model.feature_extractor(images).items()}
        patches = model.reshape_embedding(model.generate_embedding(layers)).reshape(2, -1, 384)
        expected = model(images)
    torch.testing.assert_close(PatchScorer(bank, 9, "anomalib")(patches).image_scores, expected.pred_score, atol=1e-4, rtol=0)


def test_exports_hold_anomalibs_code_and_give_the_same(tmp_path: Path, with_ours: Any) -> None:
    model = with_ours[0]
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        expected = model.model(images)
        program = torch.export.export(model.model, (images,), strict=False)
    assert "patchcore_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(images).pred_score, expected.pred_score, atol=1e-4, rtol=0)
    exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
    with torch.no_grad():
        assert torch.equal(exported.model(images).pred_score, expected.pred_score)


def test_export_of_an_accelerated_model_is_anomalibs_own(tmp_path: Path, stock: Any) -> None:
    with ours.accelerate():
        stock[0].model.nearest_neighbors(torch.zeros(3, 384), 1)
        path = stock[0].to_torch(tmp_path)
    assert b"patchcore_ext" not in path.read_bytes()


def test_command_line_takes_the_class_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalib.cli import AnomalibCLI

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anomalib"])
    arguments = ["fit", "--model", "patchcore_ext.integrations.anomalib.Patchcore", "--model.backbone", "resnet18", "--model.pre_trained", "false"]
    arguments += ["--model.coreset_sampling_ratio", "0.05", "--model.visualizer", "false", "--data", "anomalib.data.Folder", "--data.name", "stripes"]
    arguments += ["--data.root", str(folder), "--data.normal_dir", "good", "--data.num_workers", "0", "--default_root_dir", str(tmp_path)]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.normal_test_dir", "test_good"]
    arguments += ["--data.abnormal_dir", "test_bad"]
    AnomalibCLI(args=arguments)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert len(ours.memory_bank_from_checkpoint(checkpoint)) == int(0.05 * 6 * 32 * 32)


def test_mh_patchcore_takes_our_search() -> None:
    from anomalib.models.image.mh_patchcore import torch_model

    stock = torch_model._nearest_neighbors
    bank, queries = (torch.randn(count, 64, generator=torch.Generator().manual_seed(count)) for count in (400, 30))
    with ours.accelerate():
        assert torch_model._nearest_neighbors is not stock
        for k in (1, 4):
            squared, indices = torch_model._nearest_neighbors(queries, bank, k)
            theirs = stock(queries, bank, k)
            assert squared.shape == theirs[0].shape
            assert torch.equal(indices.reshape(30, k), reference.nearest_neighbors(queries, bank, k)[1])
            torch.testing.assert_close(squared, theirs[0], rtol=1e-4, atol=1e-4)
        program = torch.export.export(_Search(), (queries, bank))
    assert "patchcore_ext" not in str(program.graph)
    assert torch_model._nearest_neighbors is stock


class _Search(torch.nn.Module):
    def forward(self, queries: torch.Tensor, bank: torch.Tensor) -> Any:
        from anomalib.models.image.mh_patchcore import torch_model

        return torch_model._nearest_neighbors(queries, bank, 1)


def test_anomaly_dino_takes_our_coreset() -> None:
    from anomalib.models.image.anomaly_dino import torch_model

    with ours.accelerate():
        assert torch_model.KCenterGreedy is ours.KCenterGreedy
        made: Any = torch_model.AnomalyDINOModel.__new__(torch_model.AnomalyDINOModel)
        torch.nn.Module.__init__(made)
        made.coreset_subsampling, made.sampling_ratio = True, 0.1
        made.register_buffer("memory_bank", torch.empty(0))
        rows = torch.randn(200, 64)
        made.embedding_store = [rows[:80], rows[80:]]
        made.fit()
    assert made.memory_bank.shape == (20, 64)
    squared, _ = reference.nearest_neighbors(made.memory_bank, rows, 1)
    assert not squared.any()
