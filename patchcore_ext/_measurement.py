"""The metrics of one class from the predictions of its test images, whoever made them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

from ._evaluation_results import ClassResult, ImageScore, printable
from .images import ImageTransform
from .layout import DatasetClass, LabelledImage, load_mask
from .metrics import PixelMetrics, errors_at_full_recall, f1_optimal_threshold, image_auroc
from .patchcore import Prediction

_log = logging.getLogger("patchcore_ext")
Item = TypeVar("Item")


def measure(
    item: DatasetClass,
    predictions: Iterable[Prediction],
    *,
    transform: ImageTransform,
    threshold: float | None,
    limit: float = 0.3,
    pixels: bool = True,
    num_train: int | None = None,
    problems: Sequence[str] = (),
    on_image: Callable[[LabelledImage, Prediction, Tensor | None], None] | None = None,
    clock: Clock | None = None,
) -> ClassResult:
    """Compares predictions with the truth: the protocol's second half, for PatchCore and for any other method that makes predictions.

    Args:
        item: the class; images of ``item.test`` without a prediction count as unreadable.
        predictions: of images of ``item.test``, each at most once, one held at a time.
        transform: what the images went through: pixels outside its crop are in no metric.
        threshold: the method's own, which the predictions' verdicts come from; None: it has none, and verdicts and their counts are None.
        limit: largest false positive rate of AUPRO.
        pixels: compute the metrics of pixels, where there are masks; False: anomaly maps are not looked at.
        num_train: number of images the method was fitted on; None: all of ``item.train``.
        problems: further sentences for the result; what is appended while the predictions are made counts.
        on_image: called with each image, its prediction and its mask [H, W] (None where there is none).
        clock: takes the seconds of "metrics", and of "files" with ``on_image``; None: a new one.

    Returns:
        The result; ``seconds`` are those of the clock.

    Raises:
        ValueError: a prediction for a path that is not in ``item.test``.
    """
    clock = clock or Clock()
    own_problems: list[str] = []
    counter = _Pixels(limit, transform, own_problems) if pixels and any(image.mask for image in item.test) else None
    images = {image.path: image for image in item.test}
    scores: dict[str, ImageScore] = {}
    for prediction in predictions:
        if prediction.path not in images:
            raise ValueError(f"measure: expected predictions to be of test images of class {item.name!r}, got one of {prediction.path!r}.")
        image = images[prediction.path]
        verdict = None if threshold is None else prediction.is_anomalous
        scores[image.path] = ImageScore(image.path, image.defect, image.is_defective, prediction.score, verdict)
        mask = None
        if counter is not None:
            with clock("metrics"):
                mask = counter.add(image, prediction)
        if on_image is not None:
            with clock("files"):
                on_image(image, prediction, mask)
    with clock("metrics"):
        metrics = {**_image_metrics(list(scores.values())), **(_Pixels.undefined if counter is None else counter.compute())}
    return ClassResult(
        **metrics,
        threshold=threshold,
        num_train=len(item.train) if num_train is None else num_train,
        num_unreadable=len(item.test) - len(scores),
        problems=(*item.problems, *problems, *own_problems),
        seconds=clock.seconds,
        images=tuple(scores.get(image.path) or ImageScore(image.path, image.defect, image.is_defective, None, None) for image in item.test),
    )


def _image_metrics(images: Sequence[ImageScore]) -> dict[str, Any]:
    labels = [image.is_defective for image in images]
    scores = [image.score for image in images if image.score is not None]
    has_verdicts = all(image.is_anomalous is not None for image in images)
    counts = {
        "num_good": labels.count(False),
        "num_defective": labels.count(True),
        "false_alarms": sum(bool(image.is_anomalous) and not image.is_defective for image in images) if has_verdicts else None,
        "misses": sum(not image.is_anomalous and image.is_defective for image in images) if has_verdicts else None,
    }
    if len(set(labels)) < 2:
        undefined = ("image_auroc", "f1", "f1_threshold", "misclassified", "errors_at_full_recall")
        return {**dict.fromkeys(undefined), **counts}
    optimum = f1_optimal_threshold(labels, scores)
    return {
        "image_auroc": image_auroc(labels, scores),
        "f1": optimum.f1,
        "f1_threshold": optimum.threshold,
        "misclassified": optimum.misclassified,
        "errors_at_full_recall": errors_at_full_recall(labels, scores).false_alarms,
        **counts,
    }


class _Pixels:
    """Pixel metrics of the images that have a truth; what is wrong with a mask goes to ``problems``."""

    undefined: Mapping[str, None] = {"pixel_auroc": None, "aupro": None}

    def __init__(self, limit: float, transform: ImageTransform, problems: list[str]) -> None:
        self._metrics = PixelMetrics(limit)
        self._transform = transform
        self._problems = problems
        self._pixels = self._seen_pixels = 0  # of all images
        self._marked = self._seen_marked = 0  # those of defects

    def add(self, image: LabelledImage, prediction: Prediction) -> Tensor | None:
        """Counts an image in; returns its mask [H, W], if there is one that can be used."""
        if image.is_defective and image.mask is None:
            return None
        height, width = prediction.anomaly_map.shape
        try:
            mask = None if image.mask is None else load_mask(image.mask, (height, width))
        except ValueError as error:
            _log.warning("Left out: %s", printable(str(error)))
            self._problems.append(str(error))
            return None
        seen = self._transform.seen_part(height, width)
        self._metrics.update(None if mask is None else mask[seen], prediction.anomaly_map[seen])
        self._pixels += height * width
        self._seen_pixels += prediction.anomaly_map[seen].numel()
        if mask is not None:
            self._marked += int(mask.sum())
            self._seen_marked += int(mask[seen].sum())
        return mask

    def compute(self) -> Mapping[str, float | None]:
        if self._metrics.num_images == 0:
            return self.undefined
        if self._seen_pixels < self._pixels:
            area, marked = 1 - self._seen_pixels / self._pixels, 1 - self._seen_marked / max(self._marked, 1)
            self._problems.append(
                f"The crop cuts off {area:.0%} of the test images' area and {marked:.0%} of their marked pixels; metrics of pixels are of the rest."
            )
        result = self._metrics.compute()
        return {"pixel_auroc": result.pixel_auroc, "aupro": result.aupro}


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - started

    def timed(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items, with the time that making them takes."""
        while True:
            with self(stage):
                item = next(items, None)
            if item is None:
                return
            yield item
