"""PatchCore: fit and predict on a small backbone and generated images."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import SIDE, SmallNet, images_of, make_model, same_predictions, write_images
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from patchcore_ext.patchcore import PatchCore
from patchcore_ext.scoring import PatchScorer
from patchcore_ext.threshold import held_out_images


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    return make_model().fit(images_of(30), progress=False)


# Fit and predict


def test_defects_score_higher_and_where_they_are() -> None:
    fitted = make_model(seed=1).fit(images_of(30), progress=False)
    good = list(fitted.predict(images_of(20, seed=9)))
    bad = list(fitted.predict(images_of(20, seed=9, defect=True)))
    assert min(prediction.score for prediction in bad) > max(prediction.score for prediction in good)
    assert all(prediction.is_anomalous for prediction in bad)
    assert sum(prediction.is_anomalous for prediction in good) < 10
    for prediction in bad:
        assert prediction.anomaly_map.shape == (24, 40)
        assert prediction.anomaly_map.dtype == torch.float32
        row, column = divmod(int(prediction.anomaly_map.argmax()), 40)
        assert 5 <= row <= 18
        assert 9 <= column <= 22
        assert prediction.is_anomalous == (prediction.score > prediction.threshold)
    assert [prediction.path for prediction in good[:2]] == ["image 0", "image 1"]


def test_bank_rows_are_the_features_at_their_places(fitted: PatchCore) -> None:
    bank, images = fitted.bank, images_of(30)
    assert bank.image_indices is not None
    assert bank.positions is not None
    with torch.inference_mode():
        features, (rows, columns) = fitted.extractor(fitted.transform.apply_to_batch(images))
    assert (rows, columns) == (SIDE // 2, SIDE // 2)
    held_out = held_out_images(30, seed=0)
    assert len(bank.image_names) == 30 - len(held_out)
    assert not set(bank.image_names) & {f"image {index}" for index in held_out}
    for row, image, (y, x) in zip(bank.features, bank.image_indices.tolist(), bank.positions.tolist(), strict=True):
        index = int(bank.image_names[image].removeprefix("image "))
        assert torch.allclose(row, features[index, y * columns + x], atol=1e-6)
    assert len(bank) == int(0.1 * (30 - len(held_out)) * rows * columns)
    assert fitted.timings.keys() == {"features", "coreset", "threshold"}
    assert all(seconds > 0 for seconds in fitted.timings.values())


def test_threshold_is_the_largest_score_of_few_held_out_images(fitted: PatchCore) -> None:
    held_out = held_out_images(30, seed=0)
    # Alone they may go through other convolution kernels than in their batch; hence approx.
    scores = [prediction.score for prediction in fitted.predict(images_of(30)[held_out])]
    assert fitted.threshold == pytest.approx(max(scores), rel=1e-5)
    assert fitted.fit_report["held_out_names"] == [f"image {index}" for index in held_out]
    assert fitted.fit_report["expected_false_alarm_rate"] == pytest.approx(1 / 9)
    looser = make_model().fit(images_of(30), false_alarm_rate=0.5, progress=False)
    assert looser.threshold == pytest.approx(sorted(scores)[4], rel=1e-5)


def test_share_of_false_alarms_on_fresh_good_images_is_the_expected_one() -> None:
    trials, fresh, rate = 12, 50, 0.25
    alarms = 0
    for trial in range(trials):
        model = make_model().fit(images_of(60, seed=2 * trial), false_alarm_rate=rate, progress=False)
        alarms += sum(prediction.is_anomalous for prediction in model.predict(images_of(fresh, seed=2 * trial + 1), progress=False))
    # The second largest of 8 held-out scores: a fresh one lies above it with a chance that is Beta(2, 7) over the choices of the 8.
    expected = model.fit_report["expected_false_alarm_rate"]
    assert expected == pytest.approx(2 / 9)
    error = math.sqrt(expected * (1 - expected) / (trials * fresh) + expected * (1 - expected) / 10 / trials)
    assert abs(alarms / (trials * fresh) - expected) < 3 * error


def test_scores_are_those_of_the_parts(fitted: PatchCore) -> None:
    image = images_of(1, seed=4)
    with torch.inference_mode():
        features, _ = fitted.extractor(fitted.transform.apply_to_batch(image))
    expected = PatchScorer(fitted.bank, num_neighbors=9, score="paper")(features.clone())
    assert next(fitted.predict(image)).score == float(expected.image_scores[0])


def test_sources_of_all_kinds_give_the_same_model(tmp_path: Path) -> None:
    images = (images_of(24) * 255).round().to(torch.uint8)
    paths = write_images(tmp_path / "good", images / 255)
    options: dict[str, Any] = {"resize": None, "batch_size": 24}  # no resize: tensors and files are resized by different code
    reference = make_model(**options).fit(images, progress=False).bank.features
    sources: list[Any] = [
        tmp_path / "good",
        str(tmp_path / "good"),
        paths,
        tuple(Path(path) for path in paths),
        TensorDataset(images),
        DataLoader(TensorDataset(images), batch_size=24),
    ]
    for source in sources:
        assert torch.equal(make_model(**options).fit(source, progress=False).bank.features, reference), type(source)
    assert make_model(**options).fit(paths, progress=False).bank.image_names == [
        path for index, path in enumerate(paths) if index not in held_out_images(24, seed=0)
    ]


def test_images_of_several_sizes_keep_their_own_pixels(tmp_path: Path) -> None:
    write_images(tmp_path / "a", images_of(12, height=24, width=40))
    write_images(tmp_path / "b", images_of(12, height=50, width=30))
    model = make_model(resize=SIDE).fit(tmp_path, progress=False)
    assert model.bank.positions is not None
    shapes = {prediction.path[-9:-8]: tuple(prediction.anomaly_map.shape) for prediction in model.predict(tmp_path)}
    assert shapes == {"a": (24, 40), "b": (50, 30)}
    # 32 pixels are the short side: patch grids of 16 x 27 and 27 x 16.
    assert model.bank.positions.amax(dim=0).tolist() == [26, 26]


def test_outside_of_the_crop_the_map_is_zero() -> None:
    model = make_model(crop=16).fit(images_of(20), progress=False)
    anomaly_map = next(model.predict(images_of(1, defect=True, height=32, width=32))).anomaly_map
    assert anomaly_map.shape == (32, 32)
    assert float(anomaly_map[:8].abs().max()) == 0.0
    assert float(anomaly_map[8:24, 8:24].min()) > 0.0


def test_same_seed_same_model_other_seed_another() -> None:
    images = images_of(25)
    first, second, third = (make_model(seed=seed).fit(images, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.bank.features, second.bank.features)
    assert first.threshold == second.threshold
    assert not torch.equal(first.bank.features, third.bank.features)


def test_prediction_does_not_depend_on_global_state(fitted: PatchCore) -> None:
    images, good, model = images_of(3, seed=2), images_of(30), make_model()
    expected = list(fitted.predict(images))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    with torch.inference_mode():
        inside = list(fitted.predict(images))
    refitted = model.fit(good, progress=False)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert same_predictions(iter(inside), iter(expected))
    assert torch.equal(refitted.bank.features, fitted.bank.features)
    # The caller may go on with the maps, in place and with gradients.
    assert not expected[0].anomaly_map.is_inference()
    expected[0].anomaly_map.add_(1.0)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("score", ["paper", "max", "anomalib", "amazon"])
def test_every_score_works_end_to_end(score: str) -> None:
    model = make_model(score=score, coreset_ratio=0.05).fit(images_of(20), progress=False)
    bad = list(model.predict(images_of(4, seed=5, defect=True)))
    assert all(prediction.is_anomalous for prediction in bad)


def test_threshold_can_be_given_and_set(fitted: PatchCore) -> None:
    image = images_of(1, seed=3)
    score = next(fitted.predict(image)).score
    assert next(fitted.predict(image, threshold=score)).is_anomalous is False
    below = next(fitted.predict(image, threshold=math.nextafter(score, 0)))
    assert (below.is_anomalous, below.threshold) == (True, math.nextafter(score, 0))
    model = make_model().fit(images_of(2), progress=False)
    model.threshold = 0.25
    assert next(model.predict(image)).threshold == 0.25
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected threshold to be a finite number"):
            fitted.predict(image, threshold=value)


# Few images


@pytest.mark.parametrize("count", [1, 2, 3, 19])
def test_few_images_all_go_into_the_bank(count: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="patchcore_ext")
    model = make_model(coreset_ratio=0.5).fit(images_of(count), progress=False)
    assert model.bank.image_names == [f"image {index}" for index in range(count)]
    assert 0 < model.threshold < math.inf
    assert model.fit_report["num_scores"] == (4 if count == 1 else count)
    assert f"With {count} good image" in caplog.text
    assert ("each quarter of the image" if count == 1 else "leave-one-image-out") in caplog.text
    # A defect is far outside of what the images say about each other.
    assert all(prediction.is_anomalous for prediction in model.predict(images_of(3, seed=7, defect=True)))


def test_leave_one_image_out_scores_are_those_against_the_other_images() -> None:
    images = images_of(5)
    model = make_model(coreset_ratio=1).fit(images, progress=False)
    with torch.inference_mode():
        features, _ = model.extractor(model.transform.apply_to_batch(images))
    scores = []
    for index in range(5):
        others = torch.cat([features[other] for other in range(5) if other != index])
        scores.append(float(PatchScorer(others)(features[index]).image_scores[0]))
    assert model.threshold == pytest.approx(max(scores), rel=1e-5)


def test_a_single_patch_gives_a_model() -> None:
    model = PatchCore(SmallNet(), ("second",), resize=(4, 4), device="cpu")
    model.fit(images_of(1), progress=False)
    assert len(model.bank) == 1
    assert model.threshold == 0.0
    assert next(model.predict(images_of(1, seed=1))).is_anomalous


# Failures and Ctrl-C


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "tpu"}, "expected device to be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"device": "meta"}, "expected device to be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'meta'"),
        ({"coreset_ratio": 0.0}, "expected ratio to lie in"),
        ({"num_neighbors": 0}, "expected num_neighbors to be at least 1, got 0"),
        ({"batch_size": 0}, "expected batch_size to be at least 1, got 0"),
        ({"num_workers": -1}, "expected num_workers to be at least 0, got -1"),
        ({"seed": -1}, "expected seed to be between 0 and"),
        ({"score": "best"}, "expected score to be one of 'paper'"),
        ({"projection": "fourier"}, "expected projection to be one of"),
        ({"aggregation": "sum"}, "expected aggregation to be one of"),
        ({"patch_size": 2}, "expected patch_size to be odd"),
        ({"resize": 0}, "expected resize to be at least 1 pixel"),
    ],
)
def test_wrong_settings_are_told_at_once(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_model(**options)


def test_unknown_layer_and_backbone_are_named() -> None:
    with pytest.raises(ValueError, match="expected layers to be modules of SmallNet, got 'third'.*There are: first, second"):
        PatchCore(SmallNet(), ("first", "third"), device="cpu")
    with pytest.raises(ValueError, match="expected backbone to be the name of a torchvision classification network, got 'resnet19'"):
        PatchCore("resnet19")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"got 'cuda', but CUDA is not available; use 'cpu' or 'auto'\.$"):
        make_model(device="cuda")
    assert make_model(device="auto").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_backbone_on_cuda_gives_the_same_decisions(fitted: PatchCore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected device to be below cuda:"):
        make_model(device="cuda:64")
    fitted.save(tmp_path / "model")
    on_cuda = PatchCore.load(tmp_path / "model", device="cuda", backbone=SmallNet())
    images = images_of(8, seed=1, defect=True)
    for a, b in zip(on_cuda.predict(images), fitted.predict(images), strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-2)
        assert a.anomaly_map.device.type == "cpu"


def test_unfitted_model_says_so() -> None:
    model = make_model()
    for use in (lambda: model.predict(images_of(1)), lambda: model.bank, lambda: model.threshold, lambda: model.save("model")):
        with pytest.raises(ValueError, match="expected the model to be fitted first"):
            use()
    assert "not fitted" in repr(model)


def test_bad_sources_are_told_at_once(fitted: PatchCore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, sentence in ((tmp_path / "missing", "which does not exist"), (tmp_path / "empty", "with none in it"), ([], "empty sequence")):
        with pytest.raises(ValueError, match=sentence):
            make_model().fit(source)
        with pytest.raises(ValueError, match=sentence):
            fitted.predict(source)
    with pytest.raises(ValueError, match="at least one image"):
        make_model().fit(TensorDataset(images_of(1)[:0]))


def test_damaged_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, images_of(3))
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:60])
    model = make_model()
    with pytest.raises(ValueError, match=r"001\.png"):
        model.fit(tmp_path, progress=False)
    assert "not fitted" in repr(model)


class _Overflowing(SmallNet):
    def forward(self, images: Tensor) -> Tensor:
        # Infinite for images with a white pixel.
        factor = torch.where(images.amax((1, 2, 3), keepdim=True) > 2.4, math.inf, 1.0)  # [B, 1, 1, 1]
        output: Tensor = self.second(torch.relu(self.first(images)) * factor)
        return output


def test_image_with_features_that_are_not_finite_is_named(tmp_path: Path) -> None:
    images = images_of(3)
    images[1, :, 3, 3] = 1.0
    model = PatchCore(_Overflowing(), ("second",), resize=None, device="cpu")
    with pytest.raises(ValueError, match="expected patch features to be finite, got NaN or infinity for 'image 1'"):
        model.fit(images, progress=False)


@pytest.mark.parametrize("stage", ["features", "coreset", "threshold"])
def test_interrupted_fit_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    model = make_model().fit(images_of(22), progress=False)
    bank, threshold, timings = model.bank, model.threshold, model.timings

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if stage == "features":
        monkeypatch.setattr(model.extractor, "forward", interrupt)
    elif stage == "coreset":
        monkeypatch.setattr("patchcore_ext.ops.greedy_coreset", interrupt)
        monkeypatch.setattr("patchcore_ext.ops.greedy_coreset_lazily", interrupt)
    else:
        monkeypatch.setattr("patchcore_ext._calibration.conformal_threshold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(images_of(25, seed=8), progress=False)
    assert model.bank is bank
    assert model.threshold == threshold
    assert model.timings == timings


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model().fit(images_of(20), progress=True)
    list(model.predict(images_of(2), progress=True))
    shown = capfd.readouterr().err
    assert all(word in shown for word in ("features", "coreset", "predict", "20/20"))
    model.fit(images_of(20), progress=False)
    list(model.predict(images_of(2)))  # stderr is no terminal here
    assert "image/s" not in capfd.readouterr().err
