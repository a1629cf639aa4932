"""Model files: what comes back, what is refused, and how the backbone is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from small_model import SIDE, SmallNet, images_of, make_model, same_predictions
from torch import nn

from patchcore_ext.memory_bank import MemoryBank
from patchcore_ext.patchcore import PatchCore


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    return make_model().fit(images_of(30), progress=False)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_loaded_model_says_the_same(fitted: PatchCore, tmp_path: Path, include_backbone: bool) -> None:
    path = tmp_path / "model.safetensors"
    fitted.save(path, include_backbone=include_backbone)
    backbone = SmallNet(seed=5 if include_backbone else 0)  # included weights replace those of the module
    loaded = PatchCore.load(path, device="cpu", backbone=backbone)
    images = images_of(6, seed=1, defect=True)
    assert same_predictions(loaded.predict(images), fitted.predict(images))
    assert loaded.threshold == fitted.threshold
    assert loaded.settings == fitted.settings
    assert loaded.fit_report == fitted.fit_report
    assert loaded.bank.image_names == fitted.bank.image_names
    assert loaded.timings == {}
    loaded.save(tmp_path / "again.safetensors", include_backbone=include_backbone)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("1", "2"):
        make_model(num_workers=int(name) - 1).fit(images_of(22), progress=False).save(tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_model_file_is_a_memory_bank_too_and_the_other_way_round_not(fitted: PatchCore, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    assert torch.equal(MemoryBank.load(tmp_path / "model").features, fitted.bank.features)
    fitted.bank.save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"PatchCore\.load: expected path to be a saved model, got .*a memory bank alone"):
        PatchCore.load(tmp_path / "bank", backbone=SmallNet())


@pytest.mark.parametrize("record", [{}, [], {"settings": {}}, 3, {"settings": 1, "backbone": {}, "threshold": 1.0, "fit": {}}])
def test_model_file_with_damaged_settings_is_refused(fitted: PatchCore, tmp_path: Path, record: Any) -> None:
    fitted.bank.save(tmp_path / "model", {"model": record})
    with pytest.raises(ValueError, match="whose settings are damaged"):
        PatchCore.load(tmp_path / "model", backbone=SmallNet())


def test_settings_of_another_version_are_refused(fitted: PatchCore, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    bank = MemoryBank.load(tmp_path / "model")
    bank.metadata["model"]["settings"]["colour"] = "red"
    bank.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected .*model' to hold settings that this version knows, got: .*colour"):
        PatchCore.load(tmp_path / "model", backbone=SmallNet())


def test_numbers_from_numpy_can_be_saved(tmp_path: Path) -> None:
    model = make_model(num_neighbors=np.int64(3), projection_dim=np.int64(4), seed=np.int64(7)).fit(images_of(2), progress=False)
    model.save(tmp_path / "model")
    assert PatchCore.load(tmp_path / "model", backbone=SmallNet()).settings == model.settings


def test_model_file_cut_in_half_is_called_incomplete(fitted: PatchCore, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.safetensors", include_backbone=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.safetensors', which is incomplete: it has \d+ of \d+ bytes"):
        PatchCore.load(tmp_path / "half.safetensors", backbone=SmallNet())
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        PatchCore.load(tmp_path / "none.safetensors")


def test_another_backbone_is_refused(fitted: PatchCore, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model", include_backbone=False)
    other = SmallNet(seed=1)
    with pytest.raises(ValueError, match=r"to have digest sha256:\w{64}, got sha256:\w{64}: .*another backbone") as caught:
        PatchCore.load(tmp_path / "model", backbone=other)
    assert fitted.extractor.digest() in str(caught.value)
    assert PatchCore(other, ("first", "second"), device="cpu").extractor.digest() in str(caught.value)
    with pytest.raises(ValueError, match=r"expected backbone to be the module that .*a custom SmallNet.*pass backbone="):
        PatchCore.load(tmp_path / "model")
    with pytest.raises(TypeError, match=r"expected backbone to be a torch\.nn\.Module"):
        PatchCore.load(tmp_path / "model", backbone="resnet18")  # type: ignore[arg-type]


def test_included_weights_must_fit_the_module(fitted: PatchCore, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model", include_backbone=True)
    wider = SmallNet()
    wider.second = nn.Conv2d(6, 9, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="weights differ in name or shape"):
        PatchCore.load(tmp_path / "model", backbone=wider)


def test_backbone_changed_after_the_fit_is_not_stored(tmp_path: Path) -> None:
    net = SmallNet()
    model = PatchCore(net, ("first",), resize=(SIDE, SIDE), device="cpu").fit(images_of(2), progress=False)
    with torch.no_grad():
        net.first.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"PatchCore\.save: expected the backbone to be as it was in fit"):
        model.save(tmp_path / "model", include_backbone=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def test_torchvision_backbone_from_a_local_file(resnet_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(resnet_file.read_bytes())
    model = PatchCore("resnet18", ("layer1", "layer2"), weights=weights, resize=(SIDE, SIDE), device="cpu").fit(images_of(3), progress=False)
    assert model.extractor.weights_name == str(weights)
    images = images_of(2, seed=1)
    expected = list(model.predict(images))
    model.save(tmp_path / "model")
    model.save(tmp_path / "whole", include_backbone=True)
    assert same_predictions(PatchCore.load(tmp_path / "model", device="cpu").predict(images), iter(expected))
    weights.rename(tmp_path / "moved.pth")
    with pytest.raises(ValueError, match=r"expected the weights of resnet18 at .*weights\.pth.*pass weights="):
        PatchCore.load(tmp_path / "model", device="cpu")
    moved = PatchCore.load(tmp_path / "model", device="cpu", weights=tmp_path / "moved.pth")
    assert same_predictions(moved.predict(images), iter(expected))
    caplog.clear()
    whole = PatchCore.load(tmp_path / "whole", device="cpu")
    assert "random weights" not in caplog.text
    assert same_predictions(whole.predict(images), iter(expected))
    whole.save(tmp_path / "whole again", include_backbone=True)
    assert (tmp_path / "whole again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_random_torchvision_backbone_needs_its_weights_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = PatchCore("resnet18", ("layer1",), weights=None, resize=(SIDE, SIDE), device="cpu").fit(images_of(2), progress=False)
    assert "random weights" in caplog.text
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="resnet18 with random weights; save it with include_backbone=True"):
        PatchCore.load(tmp_path / "model")
    model.save(tmp_path / "whole", include_backbone=True)
    assert PatchCore.load(tmp_path / "whole", device="cpu").extractor.digest() == model.extractor.digest()


def test_interrupted_save_leaves_no_file(fitted: PatchCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchcore_ext.memory_bank.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
