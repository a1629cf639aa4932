"""integrations.onnx: the exported formulas against PatchCore.predict, in torch, through torch.export and in onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FEATURE_KINDS, make_features
from PIL import Image
from small_model import SmallNet, images_of, make_model
from torch import Tensor

from patchcore_ext import PatchCore, Prediction, reference
from patchcore_ext.images import ImageTransform
from patchcore_ext.integrations.onnx import ExportableModel, _neighborhoods, export_onnx

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper aggregation, anomalib score": {"aggregation": "paper", "feature_dim": 10, "stride": 2, "patch_size": 5, "score": "anomalib"},
    "one neighbor": {"num_neighbors": 1, "coreset_ratio": 0.02},
    "amazon score": {"score": "amazon"},
    "max score": {"score": "max"},
    "few rows": {"coreset_ratio": 0.0005, "score": "paper"},
}


def fitted(**options: Any) -> PatchCore:
    return make_model(**options).fit(images_of(21, 0, 32, 32), progress=False)


def some_images() -> Tensor:
    """Good ones and defective ones, as large as the network's input: predict's maps are then those of the network's input, too."""
    return torch.cat([images_of(2, 7, 32, 32), images_of(2, 8, 32, 32, defect=True)])


def assert_near(found: Any, predictions: list[Prediction], tolerance: float = 1e-4) -> None:
    scores, maps, decisions = (value.detach().numpy() if isinstance(value, Tensor) else value for value in found)
    np.testing.assert_allclose(scores, [prediction.score for prediction in predictions], rtol=tolerance)
    expected = np.stack([prediction.anomaly_map.numpy() for prediction in predictions])
    assert np.abs(maps - expected).max() <= tolerance * expected.max()
    assert decisions.tolist() == [prediction.is_anomalous for prediction in predictions]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exported_formulas_give_what_predict_gives(variant: str) -> None:
    model = fitted(**VARIANTS[variant])
    images = some_images()
    predictions = list(model.predict(images, progress=False))
    assert {prediction.is_anomalous for prediction in predictions} == {True, False}
    with torch.inference_mode():
        assert_near(ExportableModel(model)(images), predictions)


def test_an_offset_of_the_features_costs_no_digits() -> None:
    net = SmallNet()
    for layer in (net.first, net.second):
        layer.bias.data += 300.0
    model = PatchCore(net, ("first", "second"), resize=(32, 32), device="cpu").fit(images_of(21, 0, 32, 32), progress=False)
    images = some_images()
    rows = model.bank.features.numpy()
    expanded = np.square(rows).sum(1) - 2 * rows @ rows.T + np.square(rows).sum(1)[:, None]
    assert np.diagonal(expanded).max() > 0.01  # what float32 norms and products make of a distance of zero
    with torch.inference_mode():
        assert_near(ExportableModel(model)(images), list(model.predict(images, progress=False)), 1e-3)  # the backbone itself rounds at 300


@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("count", [1, 4, 40])
def test_neighborhoods_are_those_of_the_reference(kind: str, count: int) -> None:
    bank = make_features(kind, 40, 5)
    expected = []
    for row in range(40):
        others = reference.squared_distance(bank[row], bank).sort(stable=True).indices
        expected.append([row, *others[others != row].tolist()][:count])
    assert _neighborhoods(bank, count, "paper").tolist() == expected
    assert _neighborhoods(bank, count, "max").tolist() == [[row] for row in _neighborhoods(bank, 1, "max")[:, 0].tolist()]


def test_torch_export_with_any_batch_size(tmp_path: Path) -> None:
    model = fitted()
    images = some_images()
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.export.save(torch.export.export(ExportableModel(model), (images[:2],), dynamic_shapes=dynamic), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (images, images[3:]):
        assert_near(program(batch), list(model.predict(batch, progress=False)))


def test_the_backbone_stays_as_it_is() -> None:
    model = fitted()
    ExportableModel(model)
    assert all(parameter.requires_grad for parameter in model.extractor.network.parameters())


def test_models_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the model to be fitted first"):
        ExportableModel(make_model())
    with pytest.raises(ValueError, match="export_onnx: expected model to have a float32 backbone, got bfloat16"):
        ExportableModel(fitted(precision="bfloat16"))
    open_size = fitted(resize=32)
    with pytest.raises(ValueError, match="expected size to be given for a model with resize=32 and no crop"):
        ExportableModel(open_size)
    assert ExportableModel(open_size, (32, 48))(torch.rand(1, 3, 32, 48))[1].shape == (1, 32, 48)


def test_without_onnx_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["onnx"] = None
from patchcore_ext.integrations.onnx import export_onnx
try:
    export_onnx(None, "model.onnx")
except ImportError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "export_onnx: needs onnx, which cannot be imported" in process.stdout
    assert "run: pip install onnx onnxscript onnxruntime" in process.stdout


@pytest.fixture
def onnxruntime() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: the ONNX export did not run (make test-onnx runs it)")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the ONNX export did not run (make test-onnx runs it)")


@pytest.mark.parametrize("variant", ["default", "paper aggregation, anomalib score", "amazon score", "few rows"])
def test_onnxruntime_gives_the_same_scores_and_maps(onnxruntime: Any, variant: str, tmp_path: Path) -> None:
    model = fitted(**VARIANTS[variant])
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # no temporary file, no second file with weights
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = some_images()
    for batch in (images, images[3:]):
        assert_near(session.run(None, {"images": batch.numpy()}), list(model.predict(batch, progress=False)))
    about = json.loads(session.get_modelmeta().custom_metadata_map["patchcore_ext"])
    assert about["threshold"] == model.threshold
    assert about["size"] == [32, 32]
    assert about["settings"]["score"] == model.settings["score"]


def test_a_failed_export_leaves_the_old_file(onnxruntime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(fitted(), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"old"
    with pytest.raises(FileNotFoundError, match="the folder .* does not exist"):
        export_onnx(fitted(), tmp_path / "absent" / "model.onnx")


def test_real_images_through_onnxruntime(onnxruntime: Any, magnetic_tiles: Path, resnet18_weights: Path, tmp_path: Path) -> None:
    good = sorted(map(str, (magnetic_tiles / "train" / "good").iterdir()))[:30]
    model = PatchCore("resnet18", weights=resnet18_weights, coreset_ratio=0.1, resize=(128, 128), device="cpu").fit(good, progress=False)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    plain = ImageTransform(resize=(128, 128), mean=(0, 0, 0), std=(1, 1, 1))
    paths = [str(path) for defect in ("good", "crack") for path in sorted((magnetic_tiles / "test" / defect).iterdir())[:3]]
    pixels = torch.stack([plain(Image.open(path)) for path in paths])
    scores, maps, decisions = session.run(None, {"images": pixels.numpy()})
    predictions = list(model.predict(paths, progress=False))
    np.testing.assert_allclose(scores, [prediction.score for prediction in predictions], rtol=1e-4)
    assert decisions.tolist() == [prediction.is_anomalous for prediction in predictions]
    for anomaly_map, prediction in zip(maps, predictions, strict=True):
        whole = model.transform.map_to_image(torch.from_numpy(anomaly_map), *prediction.anomaly_map.shape)
        assert torch.allclose(whole, prediction.anomaly_map, atol=1e-4 * float(prediction.anomaly_map.max()), rtol=0)
