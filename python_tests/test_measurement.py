"""Metrics from predictions that anybody made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import images_of, write_images

from patchcore_ext.evaluation import EvaluationResult, measure
from patchcore_ext.images import ImageTransform
from patchcore_ext.layout import DatasetClass, read_dataset
from patchcore_ext.patchcore import Prediction

TRANSFORM = ImageTransform(resize=(32, 32))


@pytest.fixture
def part(tmp_path: Path) -> DatasetClass:
    write_images(tmp_path / "train" / "good", images_of(3))
    write_images(tmp_path / "test" / "good", images_of(2, seed=1))
    write_images(tmp_path / "test" / "square", images_of(2, seed=2, defect=True))
    mask = torch.zeros(2, 3, 24, 40)
    mask[:, :, 8:16, 12:20] = 1
    write_images(tmp_path / "ground_truth" / "square", mask)
    return read_dataset(tmp_path)[0]


def predictions_of(part: DatasetClass, scores: list[float]) -> list[Prediction]:
    """Maps that are 1 in the defects' place of half the images."""
    made = []
    for index, (image, score) in enumerate(zip(part.test, scores, strict=True)):
        anomaly_map = torch.zeros(24, 40)
        anomaly_map[8:16, 12:20] = index % 2
        made.append(Prediction(image.path, score, anomaly_map, score > 2.5, 2.5))
    return made


def test_predictions_of_a_method_with_a_threshold(part: DatasetClass) -> None:
    result = measure(part, predictions_of(part, [1.0, 3.0, 2.0, 4.0]), transform=TRANSFORM, threshold=2.5)
    assert (result.image_auroc, result.false_alarms, result.misses, result.threshold) == (0.75, 1, 1, 2.5)
    marked = 64  # of one image; half the marked pixels and those of one good image have the value 1
    good = 4 * 960 - 2 * marked
    assert result.pixel_auroc == pytest.approx((0.5 * (good - marked) + 0.25 * marked + 0.5 * 0.5 * (good - marked)) / good)
    assert (result.num_train, result.num_good, result.num_defective, result.num_unreadable) == (3, 2, 2, 0)


def test_without_a_threshold_there_are_no_verdicts(part: DatasetClass) -> None:
    result = measure(part, predictions_of(part, [1.0, 3.0, 2.0, 4.0]), transform=TRANSFORM, threshold=None, pixels=False, num_train=7)
    assert (result.threshold, result.false_alarms, result.misses, result.pixel_auroc, result.aupro, result.num_train) == (None, None, None, None, None, 7)
    assert [image.is_anomalous for image in result.images] == [None] * 4
    assert EvaluationResult({"part": result}, {}).mean["misses"] is None


def test_test_images_without_a_prediction_are_left_out(part: DatasetClass) -> None:
    result = measure(part, predictions_of(part, [1.0, 3.0, 2.0, 4.0])[:3], transform=TRANSFORM, threshold=None, problems=["one is broken"])
    assert (result.num_unreadable, result.images[3].score, result.problems) == (1, None, ("one is broken",))


def test_predictions_of_other_images_are_refused(part: DatasetClass) -> None:
    foreign = Prediction("elsewhere.png", 1.0, torch.zeros(24, 40), False, 2.5)
    with pytest.raises(ValueError, match="expected predictions to be of test images of class"):
        measure(part, [foreign], transform=TRANSFORM, threshold=None)
