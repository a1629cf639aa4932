"""The decision threshold: from scores of good images alone, with a stated false alarm rate.

With n scores of good images that had no part in the memory bank, a further good image of the same kind is equally likely to take any of the
n + 1 ranks among them. It lies above the k-th smallest of them with probability at most (n + 1 - k) / (n + 1), whatever the distribution of
the scores (split conformal prediction: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005). Nobody needs a defect.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _random

__all__ = [
    "MIN_HELD_OUT",
    "MIN_IMAGES",
    "Threshold",
    "check_false_alarm_rate",
    "conformal_threshold",
    "held_out_images",
    "leave_one_out_scores",
    "log_threshold",
    "quadrants",
]

_log = logging.getLogger("patchcore_ext")

MIN_IMAGES = 20
"""With fewer good images none can be spared for the threshold: it comes from leave-one-image-out scores."""
MIN_HELD_OUT = 8
"""Fewest images that are held out."""
_HELD_OUT_SHARE = 10  # one in ten


@dataclass(frozen=True)
class Threshold:
    """A threshold and what is known about it.

    Attributes:
        value: images with a score above it are called anomalous.
        num_scores: number of scores of good images it comes from.
        false_alarm_rate: the share of good images above it that was asked for.
        expected_rate: the share to expect on average (exact for scores without ties, an upper bound with ties): (n + 1 - k) / (n + 1).
    """

    value: float
    num_scores: int
    false_alarm_rate: float
    expected_rate: float

    @property
    def reached(self) -> bool:
        """Whether the number of scores is enough for the rate that was asked for."""
        return self.expected_rate <= self.false_alarm_rate + 1e-9


def check_false_alarm_rate(value: float) -> float:
    """The rate as a float, after checking that 0 < rate < 1; raises ValueError."""
    if not 0.0 < float(value) < 1.0:
        raise ValueError(f"PatchCore.fit: expected false_alarm_rate to be between 0 and 1 (0.01 is 1%), got {value}.")
    return float(value)


def conformal_threshold(scores: Sequence[float], false_alarm_rate: float) -> Threshold:
    """The k-th smallest score, k = ceil((n + 1) (1 - rate)); the largest score when k exceeds n.

    Args:
        scores: scores of n >= 1 good images, finite.
        false_alarm_rate: share of good images that may be called anomalous, between 0 and 1.

    Returns:
        The threshold; ``reached`` is False when n is too small for the rate (n >= 1 / rate - 1 is needed) and the largest score was taken.

    Raises:
        ValueError: no scores, a score that is not finite, or a rate outside (0, 1).

    Example:
        >>> conformal_threshold([3.0, 1.0, 2.0, 4.0], 0.4)
        Threshold(value=3.0, num_scores=4, false_alarm_rate=0.4, expected_rate=0.4)
    """
    rate = check_false_alarm_rate(false_alarm_rate)
    ordered = sorted(float(score) for score in scores)
    if not ordered or not all(math.isfinite(score) for score in ordered):
        raise ValueError(f"conformal_threshold: expected scores to be at least one finite number, got {len(ordered)} scores: {ordered[:3]}.")
    count = len(ordered)
    # n + 1 - k = floor((n + 1) rate); the small term undoes the rounding of the product (0.29 * 100 is less than 29), so that a rate of
    # exactly r / (n + 1) gives r.
    above = math.floor((count + 1) * rate + 1e-9)
    rank = min(count + 1 - above, count)
    return Threshold(ordered[rank - 1], count, rate, (count + 1 - rank) / (count + 1))


def held_out_images(num_images: int, seed: int) -> list[int]:
    """Indices of the images that are kept out of the bank: a tenth of them, at least 8; none if there are fewer than 20 images.

    Args:
        num_images: number of good images.
        seed: the same seed and number give the same images, on every machine.

    Returns:
        Indices in ascending order.
    """
    if num_images < MIN_IMAGES:
        return []
    count = max(MIN_HELD_OUT, num_images // _HELD_OUT_SHARE)
    order = _random.permutation(seed, num_images)
    return sorted(int(index) for index in order[:count])


def leave_one_out_scores(patches: Tensor, patch_groups: Tensor, bank: Tensor, bank_groups: Tensor, score: Callable[[Tensor, Tensor], float]) -> list[float]:
    """Scores of each group of patches against the bank rows of all other groups.

    With the image as the group: what each image would score if its own rows were not in the bank. A group that owns the whole bank has
    nothing to be compared with and is left out.

    Args:
        patches: [N, D], all patch features.
        patch_groups: integer [N], the group of each patch.
        bank: [M, D], the rows that were kept of them.
        bank_groups: integer [M], the group of each row.
        score: gives the image score of patches [P, D] (second argument) against bank rows [M', D] (first argument).

    Returns:
        One score a group, in ascending order of the group; at most as many as there are groups.

    Note:
        The bank was thinned with the left-out patches still there: what is left covers the other groups a little less well than a bank made
        without them would. On magnetic tiles the mean was within 2% of making each bank anew at a ratio of 0.1, and up to 6% high at 0.01.
    """
    scores = []
    for group in torch.unique(patch_groups).tolist():
        others = bank[bank_groups != group]  # [M', D]
        if others.shape[0] > 0:
            scores.append(score(others, patches[patch_groups == group]))
    return scores


def quadrants(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Groups for a single image, which has no other image to be compared with: the quarter of the image that each patch lies in.

    Quarters and not alternate patches, because the neighbourhoods of adjacent patches overlap: one always has its like beside it.

    Args:
        positions: integer [N, 2], (row, column) of each patch.
        grid: (rows, columns) of the patch grid.

    Returns:
        int64 [N], 0 to 3.
    """
    below, right = positions[:, 0] >= grid[0] // 2, positions[:, 1] >= grid[1] // 2  # [N]
    return 2 * below.to(torch.int64) + right.to(torch.int64)


def log_threshold(threshold: Threshold, rule: str, num_images: int) -> None:
    """Says in the log (logger "patchcore_ext") what the threshold rests on; a warning where it is little.

    Args:
        threshold: the threshold.
        rule: where its scores come from, for example "held-out images".
        num_images: number of good images in all.
    """
    rate, expected = f"{threshold.false_alarm_rate:.3g}", f"{threshold.expected_rate:.2g}"
    _log.info("Threshold %.6g from %d %s.", threshold.value, threshold.num_scores, rule)
    if num_images < MIN_IMAGES:
        _log.warning(
            "With %d good image%s (fewer than %d) none is held out: the threshold comes from %s, a rough guess; check it on more images.",
            num_images,
            "" if num_images == 1 else "s",
            MIN_IMAGES,
            rule,
        )
    elif not threshold.reached:
        needed = math.ceil(1 / threshold.false_alarm_rate - 1e-9) - 1
        _log.warning(
            "%d %s are too few for a false alarm rate of %s: the threshold is their largest score, and a share of about %s of good images "
            "lies above it. A rate of %s takes %d good images.",
            threshold.num_scores,
            rule,
            rate,
            expected,
            rate,
            max(MIN_IMAGES, needed * _HELD_OUT_SHARE),
        )
