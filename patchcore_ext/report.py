"""The report: one HTML file with the images of a run, their heat maps, and a threshold to try out."""

from __future__ import annotations

import base64
import hashlib
import heapq
import importlib.resources
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from ._pictures import default_color_range, displayable, encoded, heat_map_image, legend_gradient, outlined, shrunk
from .memory_bank import atomic_write

__all__ = ["Report", "ReportEntry", "default_color_range", "heat_map_image", "write_report"]

_SHOWN_LIMIT = 1000  # images on a page, which carries them all inside
_THUMBNAIL_SIDE = 320  # pixels of the longer side on the page
_NUM_BINS = 60  # of the histogram
_TRUTHS = ("good", "defective", "unknown")


@dataclass(frozen=True, eq=False)
class ReportEntry:
    """One image of a run.

    Attributes:
        path: shown as the image's name.
        score: image anomaly score.
        is_anomalous: the verdict: score > threshold.
        image: the image itself, of any mode.
        heat_map: anomaly map [H, W] of the same size, any floating dtype, in units of distance.
        defect: name of the kind of defect, or of whatever group the image belongs to; the page can be filtered by it. None: not named.
        is_defective: what is known to be true of the image; None: nothing is known.
        mask: array [H, W] of the same size, not zero where the defect is; its outline is drawn. None: not known.
    """

    path: str
    score: float
    is_anomalous: bool
    image: PIL.Image.Image
    heat_map: Tensor
    defect: str | None = None
    is_defective: bool | None = None
    mask: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class _Card:
    """What the page keeps of an image: pictures as ``data:`` addresses, and what its script needs to know."""

    name: str
    score: float
    is_anomalous: bool
    truth: str  # one of _TRUTHS
    group: str
    picture: str
    heat_map: str
    width: int
    height: int
    has_outline: bool


class Report:
    """Collects the images of a run and writes them as a page.

    Everything is inside the file: pictures (as thumbnails), style and script. Nothing is fetched, and a policy in the page forbids it. All heat
    maps have the same colours for the same distances. Text is escaped; characters that cannot be printed are shown as in a Python string.

    Args:
        threshold: scores above it are anomalous; the page's slider starts there.
        color_range: distances of the first and the last colour; None: :func:`default_color_range` of the threshold.
        limit: the most images that the page shows, those with the highest scores; the others are counted only.

    Raises:
        ValueError: the threshold is not finite, the range is empty or not finite, or ``limit`` is negative.

    Note:
        Memory: the thumbnails of the shown images, 10 to 25 kB each, and two numbers of every image.

    Example:
        >>> import PIL.Image, tempfile, torch
        >>> report = Report(threshold=1.0)
        >>> report.add(ReportEntry("a.png", 2.0, True, PIL.Image.new("L", (8, 8)), torch.full((8, 8), 2.0), "scratch", is_defective=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.write(f"{folder}/report.html", title="Bottles")
    """

    def __init__(self, threshold: float, *, color_range: tuple[float, float] | None = None, limit: int = _SHOWN_LIMIT) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"Report: expected threshold to be a finite number, got {threshold}.")
        low, high = default_color_range(threshold) if color_range is None else color_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"Report: expected color_range to be two finite numbers, the lower first, got {low} and {high}.")
        if limit < 0:
            raise ValueError(f"Report: expected limit to be 0 or more, got {limit}.")
        self._threshold = float(threshold)
        self._color_range = (low, high)
        self._limit = limit
        self._scores: dict[str, list[float]] = {truth: [] for truth in _TRUTHS}
        # The cards with the highest scores: (score, -index, card); the index decides between equal scores.
        self._highest: list[tuple[float, int, _Card]] = []

    def __len__(self) -> int:
        """Number of images so far, shown or not."""
        return sum(map(len, self._scores.values()))

    def add(self, entry: ReportEntry) -> None:
        """Counts an image, and keeps its thumbnails while its score is among the highest.

        Args:
            entry: the image; nothing of it is kept.

        Raises:
            ValueError: the score or the heat map is not finite, map or mask is of another size than the image, or the verdict is not what score
                and threshold say.
        """
        self._check(entry)
        score = float(entry.score)
        key = (score, -len(self))
        self._scores[_truth_of(entry)].append(score)
        if len(self._highest) < self._limit:
            heapq.heappush(self._highest, (*key, self._card(entry)))
        elif self._highest and key > self._highest[0][:2]:
            heapq.heapreplace(self._highest, (*key, self._card(entry)))

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        title: str,
        summary: Mapping[str, str] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        covering_curve: Sequence[Sequence[float]] = (),
    ) -> None:
        """Writes the page: the summary, all scores, and the shown images, the highest score first.

        Args:
            path: the file; written whole or not at all.
            title: of the page.
            summary: lines of the summary, name to value.
            metrics: figures for the top of the page, name to value; None or NaN: not measured.
            covering_curve: pairs (size of the coreset, covering radius), drawn when there are at least two: see ``CoresetSelection.covering_curve``.

        Raises:
            OSError: the file cannot be written.
        """
        cards = [card for _, _, card in sorted(self._highest, key=lambda item: item[:2], reverse=True)]
        page = _template().render(
            title=title,
            summary=summary or {},
            metrics={name: _figure(value) for name, value in (metrics or {}).items()},
            threshold=self._threshold,
            total=len(self),
            counts={truth: len(scores) for truth, scores in self._scores.items() if scores},
            histogram=_histogram(self._scores, self._threshold),
            roc=_roc(self._scores["good"], self._scores["defective"]),
            curve=_covering_curve(covering_curve),
            legend=_legend(*self._color_range, self._threshold),
            aspect=_aspect(cards),
            cards=cards,
            groups=sorted({card.group for card in cards}, key=lambda group: (group != "good", group)),
            run={
                "threshold": self._threshold,
                "scores": {truth: sorted(scores) for truth, scores in self._scores.items()},
                "cards": [{"score": card.score, "truth": card.truth, "group": _printable(card.group)} for card in cards],
            },
        )
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8", newline="\n")

    def _check(self, entry: ReportEntry) -> None:
        name, size = repr(entry.path), (entry.image.height, entry.image.width)
        if not math.isfinite(entry.score):
            raise ValueError(f"Report.add: expected the score of {name} to be a finite number, got {entry.score}.")
        if tuple(entry.heat_map.shape) != size:
            raise ValueError(f"Report.add: expected the heat map of {name} to be of the image's size {list(size)}, got {list(entry.heat_map.shape)}.")
        if not bool(torch.isfinite(entry.heat_map).all()):
            raise ValueError(f"Report.add: expected the heat map of {name} to be finite, got NaN or infinity in it.")
        if entry.mask is not None and np.shape(entry.mask) != size:
            raise ValueError(f"Report.add: expected the mask of {name} to be of the image's size {list(size)}, got {list(np.shape(entry.mask))}.")
        if entry.is_anomalous != (entry.score > self._threshold):
            expected = f"{entry.score > self._threshold} for score {entry.score} and threshold {self._threshold}"
            raise ValueError(f"Report.add: expected is_anomalous of {name} to be {expected}, got {entry.is_anomalous}.")

    def _card(self, entry: ReportEntry) -> _Card:
        mask = None if entry.mask is None else np.asarray(entry.mask) != 0  # [H, W]
        image, heat_map, mask = shrunk(entry.image, entry.heat_map.detach().cpu(), mask, _THUMBNAIL_SIDE)
        has_outline = mask is not None and bool(mask.any())
        truth = _truth_of(entry)
        return _Card(
            name=entry.path,
            score=float(entry.score),
            is_anomalous=entry.is_anomalous,
            truth=truth,
            group=truth if entry.defect is None else entry.defect,
            picture=encoded(outlined(image, mask) if mask is not None and has_outline else displayable(image)),
            heat_map=encoded(heat_map_image(image, heat_map, *self._color_range)),
            width=image.width,
            height=image.height,
            has_outline=has_outline,
        )


def write_report(
    path: str | os.PathLike[str],
    entries: Iterable[ReportEntry],
    *,
    title: str,
    summary: Mapping[str, str],
    threshold: float,
    color_range: tuple[float, float] | None = None,
    covering_curve: Sequence[Sequence[float]] = (),
    metrics: Mapping[str, float | None] | None = None,
) -> None:
    """Writes the page of a run whose images are at hand: a :class:`Report` in one call.

    Args:
        path: the file; written whole or not at all.
        entries: in any order; equal scores keep theirs.
        title: of the page.
        summary: lines of the summary, name to value.
        threshold: scores above it are anomalous.
        color_range: as in :class:`Report`.
        covering_curve: as in :meth:`Report.write`.
        metrics: as in :meth:`Report.write`.

    Raises:
        ValueError: as in :class:`Report` and :meth:`Report.add`; an earlier page stays as it was.
        OSError: the file cannot be written.
    """
    report = Report(threshold, color_range=color_range)
    for entry in entries:
        report.add(entry)
    report.write(path, title=title, summary=summary, metrics=metrics, covering_curve=covering_curve)


def _truth_of(entry: ReportEntry) -> str:
    return "unknown" if entry.is_defective is None else "defective" if entry.is_defective else "good"


def _printable(value: object) -> str:
    """Text in which nothing hides or changes the direction of writing."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode("ascii") for character in str(value))


def _figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, int) or abs(value) > 1 else f"{value:.4f}"


def _template() -> jinja2.Template:
    """The page's template, with style and script put in."""
    folder = importlib.resources.files("patchcore_ext") / "templates"
    page, style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = _printable
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment.globals |= {"style": style, "script": script, "script_digest": digest}
    return environment.from_string(page)


def _histogram(scores: Mapping[str, Sequence[float]], threshold: float) -> dict[str, Any]:
    """Bars in percent of the width and height, stacked in the order of _TRUTHS, over a range that holds all scores and the threshold."""
    values = [threshold, *(score for part in scores.values() for score in part)]
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    # Scores that differ in their last digit share a bar; equal ones stand in the middle.
    margin = max(0.02 * (high - low), 1e-6 * size, 1e-30) if low < high else 0.5 * size or 0.5
    low, high = low - margin, high + margin
    counts = {truth: np.histogram(part, bins=_NUM_BINS, range=(low, high))[0] for truth, part in scores.items()}  # [_NUM_BINS] each
    tallest = max(1, int(np.sum(list(counts.values()), axis=0).max()))
    below = np.zeros(_NUM_BINS)
    bars = []
    for truth, count in counts.items():
        heights = 100 * count / tallest
        places = np.flatnonzero(count)
        bars += [{"truth": truth, "left": 100 * index / _NUM_BINS, "top": 100 - below[index] - heights[index], "height": heights[index]} for index in places]
        below = below + heights
    return {"low": low, "high": high, "bars": bars, "bar_width": 100 / _NUM_BINS, "threshold": 100 * (threshold - low) / (high - low)}


def _roc(good: Sequence[float], defective: Sequence[float]) -> dict[str, Any] | None:
    """The receiver operating characteristic as an SVG line in a square of 100, and the area below it; equal scores are one step."""
    if not good or not defective:
        return None
    thresholds = np.unique([*good, *defective])[::-1]
    false_alarms = 1 - np.searchsorted(np.sort(good), thresholds) / len(good)  # shares of scores >= threshold
    found = 1 - np.searchsorted(np.sort(defective), thresholds) / len(defective)
    false_alarms, found = np.concatenate([[0.0], false_alarms]), np.concatenate([[0.0], found])
    area = float(np.sum(np.diff(false_alarms) * (found[1:] + found[:-1]) / 2))
    places = dict.fromkeys(f"{100 * x:.1f},{100 - 100 * y:.1f}" for x, y in zip(false_alarms, found, strict=True))
    return {"area": area, "line": " ".join(places)}


def _covering_curve(points: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Covering radius against the size of the coreset, as a line in a box of 100 with a logarithmic axis of sizes: it helps to choose the ratio."""
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    largest = max(radius for _, radius in points) or 1.0
    span = math.log(points[-1][0] / points[0][0])
    line = " ".join(f"{100 * math.log(size / points[0][0]) / span:.1f},{100 * (1 - radius / largest):.1f}" for size, radius in points)
    return {"line": line, "first": points[0], "last": points[-1]}


def _legend(low: float, high: float, threshold: float) -> dict[str, Any]:
    """The gradient, and the marks below it: (percent of the width, text)."""
    place = 100 * (threshold - low) / (high - low)
    marks = [(0.0, f"{low:.4g}"), (100.0, f"≥ {high:.4g}")]
    if 15 <= place <= 75:  # elsewhere it would lie over one of the others
        marks.insert(1, (place, f"threshold {threshold:.4g}"))
    return {"gradient": legend_gradient(), "marks": marks}


def _aspect(cards: Sequence[_Card]) -> float:
    """Width over height of the frames that the pictures lie in: that of most images, between 1/2 and 2."""
    return min(2.0, max(0.5, float(np.median([card.width / card.height for card in cards])))) if cards else 1.0
