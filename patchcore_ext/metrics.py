"""How good scores and anomaly maps are: image and pixel AUROC, AUPRO, thresholds, curves.

One rule decides everywhere, here as in ``Prediction.is_anomalous``: an image or a pixel is called anomalous when score > threshold. So a threshold
found here means the same when it is given to ``PatchCore.predict``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sklearn_metrics

from . import _checks
from ._checks import Numbers
from ._pixel_metrics import PixelMetrics, PixelResult, aupro, pixel_auroc

__all__ = [
    "Curves",
    "F1Optimum",
    "FullRecall",
    "PixelMetrics",
    "PixelResult",
    "aupro",
    "curves",
    "errors_at_full_recall",
    "f1_optimal_threshold",
    "image_auroc",
    "misclassified",
    "pixel_auroc",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class F1Optimum:
    """The best threshold by F1, found on the test labels: an upper bound of what a threshold chosen without them can reach.

    Attributes:
        threshold: scores above it are called anomalous.
        f1: the harmonic mean of precision and recall there, between 0 and 1.
        misclassified: number of missed defects and false alarms there.
    """

    threshold: float
    f1: float
    misclassified: int


@dataclass(frozen=True)
class FullRecall:
    """What it costs to miss nothing.

    Attributes:
        threshold: scores above it are called anomalous; every anomalous score is.
        false_alarms: number of good scores above it, the fewest that is possible without a miss.
    """

    threshold: float
    false_alarms: int


@dataclass(frozen=True, eq=False)
class Curves:
    """ROC and precision-recall curve on the same thresholds, one entry a threshold: what the rule score > threshold gives there.

    Attributes:
        thresholds: float64 [T + 1], descending: the T distinct scores, then -inf, so from "nothing is anomalous" to "everything is".
        fpr: float64 [T + 1], share of the good that is called anomalous.
        tpr: float64 [T + 1], share of the anomalous that is called anomalous; also the recall.
        precision: float64 [T + 1], share of what is called anomalous that is; 1 at the first threshold, where nothing is.
        average_precision: the precision averaged over the steps of the recall, without interpolation.
    """

    thresholds: npt.NDArray[np.float64]
    fpr: npt.NDArray[np.float64]
    tpr: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    average_precision: float

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """The true positive rate by its other name."""
        return self.tpr


def image_auroc(labels: Numbers, scores: Numbers) -> float:
    """Area under the ROC curve: the probability that an anomalous score exceeds a good one, ties counted as one half.

    Args:
        labels: [N], 1 or True for anomalous, 0 or False for good.
        scores: [N], finite; larger is more anomalous.

    Returns:
        A fraction of 1.

    Raises:
        ValueError: other shapes, other labels, scores that are not finite, or one of the two classes is missing.
        TypeError: not numbers.

    Example:
        >>> image_auroc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
        0.875
    """
    anomalous, values = _labels_and_scores("image_auroc", labels, scores, need_good=True)
    return float(sklearn_metrics.roc_auc_score(anomalous, values))


def curves(labels: Numbers, scores: Numbers) -> Curves:
    """ROC curve, precision-recall curve and average precision.

    Args:
        labels: [N], 1 or True for anomalous, 0 or False for good.
        scores: [N], finite; larger is more anomalous.

    Returns:
        Every distinct score as a threshold; nothing is left out.

    Raises:
        ValueError: other shapes, other labels, scores that are not finite, or one of the two classes is missing.
        TypeError: not numbers.

    Note:
        scikit-learn's curves are for score >= threshold; each of their thresholds is here the next smaller one.

    Example:
        >>> curves([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0]).thresholds.tolist()
        [4.0, 3.0, 2.0, 1.0, -inf]
    """
    anomalous, values = _labels_and_scores("curves", labels, scores, need_good=True)
    fpr, tpr, reached = sklearn_metrics.roc_curve(anomalous, values, drop_intermediate=False)
    precision, _, _ = sklearn_metrics.precision_recall_curve(anomalous, values)
    average = float(sklearn_metrics.average_precision_score(anomalous, values))
    return Curves(np.append(reached[1:], -np.inf), fpr, tpr, precision[::-1], average)


def f1_optimal_threshold(labels: Numbers, scores: Numbers) -> F1Optimum:
    """The threshold with the largest F1 = 2 TP / (2 TP + FP + FN); of several, the one with the fewest misclassified.

    Args:
        labels: [N], 1 or True for anomalous, 0 or False for good; at least one is anomalous.
        scores: [N], finite; larger is more anomalous.

    Returns:
        The optimum. Its threshold lies halfway between the two scores it separates where float32 has a number there, else on the lower one, so that it
        separates them when compared in float32 as well.

    Raises:
        ValueError: other shapes, other labels, scores that are not finite, or no anomalous label.
        TypeError: not numbers.

    Example:
        >>> f1_optimal_threshold([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0])
        F1Optimum(threshold=2.5, f1=1.0, misclassified=0)
    """
    anomalous, values = _labels_and_scores("f1_optimal_threshold", labels, scores)
    distinct, inverse = np.unique(values, return_inverse=True)  # [T]
    called = np.bincount(inverse)[::-1].cumsum()[::-1]  # [T], TP + FP when this score is the lowest one called anomalous
    found = np.bincount(inverse[anomalous], minlength=len(distinct))[::-1].cumsum()[::-1]  # [T], TP
    relevant = int(anomalous.sum())
    f1 = 2 * found / (called + relevant)
    errors = called + relevant - 2 * found
    best = int(np.lexsort((errors, -f1))[0])
    return F1Optimum(_threshold_below(values, float(distinct[best])), float(f1[best]), int(errors[best]))


def errors_at_full_recall(labels: Numbers, scores: Numbers) -> FullRecall:
    """The false alarms that remain when no anomalous image is missed.

    Args:
        labels: [N], 1 or True for anomalous, 0 or False for good; at least one is anomalous.
        scores: [N], finite; larger is more anomalous.

    Returns:
        The fewest false alarms, with a threshold just below the smallest anomalous score (where, see ``f1_optimal_threshold``).

    Raises:
        ValueError: other shapes, other labels, scores that are not finite, or no anomalous label.
        TypeError: not numbers.

    Example:
        >>> errors_at_full_recall([0, 0, 1, 1], [1.0, 3.5, 3.0, 4.0])
        FullRecall(threshold=2.0, false_alarms=1)
    """
    anomalous, values = _labels_and_scores("errors_at_full_recall", labels, scores)
    smallest = float(values[anomalous].min())
    return FullRecall(_threshold_below(values, smallest), int((values[~anomalous] >= smallest).sum()))


def misclassified(labels: Numbers, scores: Numbers, threshold: float) -> int:
    """Number of images on the wrong side of a threshold: missed defects (score <= threshold) and false alarms (score > threshold).

    Args:
        labels: [N], 1 or True for anomalous, 0 or False for good.
        scores: [N], finite; larger is more anomalous.
        threshold: scores above it are called anomalous; infinities are taken.

    Raises:
        ValueError: other shapes, other labels, scores that are not finite, or a threshold that is NaN.
        TypeError: not numbers.

    Example:
        >>> misclassified([0, 1, 1], [0.2, 0.5, 0.9], threshold=0.5)
        1
    """
    anomalous, values = _labels_and_scores("misclassified", labels, scores, need_anomalous=False)
    if math.isnan(threshold):
        raise ValueError("misclassified: expected threshold to be a number, got NaN.")
    return int(((values > threshold) != anomalous).sum())


def _threshold_below(scores: Array, lowest: float) -> float:
    """A threshold with ``lowest``, one of the scores, just above it, in float32 as well."""
    smaller = scores[scores < lowest]
    with np.errstate(over="ignore"):  # scores beyond float32 become infinite, which is not in between
        if len(smaller) == 0:
            return float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
        below = float(smaller.max())
        middle = float(np.float32(below / 2 + lowest / 2))
    return middle if below <= middle < lowest else below


def _labels_and_scores(
    op: str, labels: Numbers, scores: Numbers, *, need_anomalous: bool = True, need_good: bool = False
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    truth, values = _checks.numbers(op, "labels", labels), _checks.numbers(op, "scores", scores).astype(np.float64)
    if values.ndim != 1 or len(values) == 0 or truth.shape != values.shape:
        raise ValueError(f"{op}: expected labels and scores to be equally many, [N] with N >= 1, got shapes {list(truth.shape)} and {list(values.shape)}.")
    known = np.isin(truth, (0, 1))
    if not known.all():
        raise ValueError(f"{op}: expected labels to be 0 (good) or 1 (anomalous), got {truth[~known][0]}.")
    _checks.finite(op, "scores", values)
    anomalous = truth.astype(bool)
    if need_anomalous and not anomalous.any():
        raise ValueError(f"{op}: expected labels to hold at least one anomalous image, got {len(truth)} good ones.")
    if need_good and anomalous.all():
        raise ValueError(f"{op}: expected labels to hold at least one good image, got {len(truth)} anomalous ones.")
    return anomalous, values
