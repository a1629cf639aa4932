"""Heat maps, and a page that shows the images of a run beside them."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL.Image
from torch import Tensor

from .memory_bank import atomic_write

__all__ = ["ReportEntry", "default_color_range", "heat_map_image", "write_report"]

# "Inferno", perceptually uniform and readable without colour vision (S. van der Walt and N. Smith, matplotlib 1.5, CC0), at 16 equally spaced
# places. In between, straight lines: at most 6 of 255 steps away from the full table.
_COLORS = (
    (0, 0, 4),
    (12, 8, 38),
    (36, 12, 79),
    (66, 10, 104),
    (93, 18, 110),
    (120, 28, 109),
    (147, 38, 103),
    (174, 48, 92),
    (199, 62, 76),
    (221, 81, 58),
    (237, 105, 37),
    (248, 133, 15),
    (252, 165, 10),
    (250, 198, 45),
    (242, 230, 97),
    (252, 255, 164),
)
_OPACITY = 0.8  # the most that the colours hide of the grey image
_THUMBNAIL_SIDE = 256  # pixels of the longer side on the page
_JPEG_QUALITY = 80


@dataclass(frozen=True, eq=False)
class ReportEntry:
    """One image on the page.

    Attributes:
        path: shown as the image's name.
        score: image anomaly score.
        is_anomalous: the verdict.
        image: the image itself.
        heat_map: anomaly map [H, W] of the same size, in units of distance.
        label: what is known about the image, if anything.
    """

    path: str
    score: float
    is_anomalous: bool
    image: PIL.Image.Image
    heat_map: Tensor
    label: str | None = None


def heat_map_image(image: PIL.Image.Image, anomaly_map: Tensor, low: float, high: float) -> PIL.Image.Image:
    """The image in grey under the colours of its anomaly map: from clear at ``low`` over violet and red to light yellow at ``high``.

    Args:
        image: any mode; "F" and "I" (16-bit greyscale) are stretched from their own darkest to their brightest pixel.
        anomaly_map: [H, W] of the image's size, any floating dtype.
        low: distance of the first colour, which is clear; what is below looks the same.
        high: distance of the last colour; what is above looks the same.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: the map is of another size than the image or holds numbers that are not finite, or ``low`` is not below ``high``.
    """
    expected = (image.height, image.width)
    if tuple(anomaly_map.shape) != expected:
        raise ValueError(f"heat_map_image: expected anomaly_map to be of the image's size {list(expected)}, got {list(anomaly_map.shape)}.")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"heat_map_image: expected low to be below high, both finite, got {low} and {high}.")
    distances = anomaly_map.detach().cpu().double().numpy()  # [H, W]
    if not np.isfinite(distances).all():
        raise ValueError("heat_map_image: expected anomaly_map to be finite, got NaN or infinity in it.")
    grey = np.asarray(_grey(image), dtype=np.float64)[..., None]  # [H, W, 1]
    places = np.clip((distances - low) / (high - low), 0, 1)  # [H, W]
    opacity = _opacity(places)[..., None]  # [H, W, 1]
    blended = (1 - opacity) * grey + opacity * _colors(places)  # [H, W, 3]
    return PIL.Image.fromarray(np.rint(blended).astype(np.uint8))


def default_color_range(threshold: float) -> tuple[float, float]:
    """The distances between which heat maps are coloured: half the threshold, below which most of a good image lies, and 1.5 times of it.

    Args:
        threshold: of the image scores, which are distances too.

    Returns:
        (low, high); (0, 1) for a threshold that is no positive number.
    """
    return (0.5 * threshold, 1.5 * threshold) if 0 < threshold < math.inf else (0.0, 1.0)


def write_report(
    path: str | os.PathLike[str],
    entries: Sequence[ReportEntry],
    *,
    title: str,
    summary: Mapping[str, str],
    threshold: float,
    color_range: tuple[float, float] | None = None,
    covering_curve: Sequence[Sequence[float]] = (),
) -> None:
    """Writes one HTML file that needs nothing else: a table, and all images with their heat maps, the highest score first.

    Everything is inside the file (images as thumbnails), there is no script, and nothing is fetched. All heat maps have the same colours for
    the same distances. Text is escaped; characters that cannot be printed are shown as in a Python string.

    Args:
        path: the file; written whole or not at all.
        entries: in any order; equal scores keep theirs.
        title: of the page.
        summary: lines of the table, name to value.
        threshold: scores above it are anomalous.
        color_range: distances of the first and the last colour; None: :func:`default_color_range` of the threshold.
        covering_curve: pairs (size of the coreset, covering radius), drawn when there are at least two: see ``CoresetSelection.covering_curve``.

    Raises:
        ValueError: a score, the threshold or a heat map is not finite, or a heat map is of another size than its image.
        OSError: the file cannot be written.
    """
    for name, value in [("threshold", threshold), *((f"the score of {entry.path!r}", entry.score) for entry in entries)]:
        if not math.isfinite(value):
            raise ValueError(f"write_report: expected {name} to be a finite number, got {value}.")
    low, high = default_color_range(threshold) if color_range is None else color_range
    cards = [_card(entry, low, high) for entry in sorted(entries, key=lambda entry: -entry.score)]
    rows = [f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in summary.items()]
    page = _PAGE.format(
        title=_text(title),
        style=_STYLE,
        rows="\n".join(rows),
        legend=_legend(low, high, threshold),
        curve=_curve(covering_curve),
        cards="\n".join(cards) or "<p>No images.</p>",
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as 8-bit grey."""
    if image.mode not in ("F", "I", "I;16"):
        return image.convert("L")
    values = np.asarray(image, dtype=np.float64)  # [H, W]
    darkest, span = values.min(), np.ptp(values)
    return PIL.Image.fromarray(np.rint((values - darkest) * (255 / span if span > 0 else 0)).astype(np.uint8))


def _colors(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Colours [..., 3] in 0..255 of numbers in 0..1."""
    places = np.linspace(0, 1, len(_COLORS))
    return np.stack([np.interp(values, places, channel) for channel in zip(*_COLORS, strict=True)], axis=-1)


def _opacity(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How much the colours of numbers in 0..1 hide, in 0..1: what is ordinary stays clear."""
    return _OPACITY * np.minimum(2 * values, 1) ** 2


def _text(value: str) -> str:
    """Text for a page: nothing in it is markup, ends an attribute, hides, or changes the direction of writing."""
    printable = "".join(character if character.isprintable() else character.encode("unicode_escape").decode("ascii") for character in value)
    return html.escape(printable, quote=True)


def _thumbnail(image: PIL.Image.Image, description: str) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{_text(description)}" loading="lazy" decoding="async">'


def _card(entry: ReportEntry, low: float, high: float) -> str:
    verdict = "anomalous" if entry.is_anomalous else "good"
    label = "" if entry.label is None else f'<span class="label">labelled {_text(entry.label)}</span>'
    image = entry.image if entry.image.mode in ("L", "RGB") else entry.image.convert("RGB")
    if entry.image.mode in ("F", "I", "I;16"):
        image = _grey(entry.image)
    heat_map = heat_map_image(entry.image, entry.heat_map, low, high)
    return (
        f'<figure class="{verdict}">\n'
        f"{_thumbnail(image, entry.path)}\n"
        f"{_thumbnail(heat_map, f'heat map of {entry.path}')}\n"
        f'<figcaption><b class="score">{entry.score:.4g}</b> <span class="verdict">{verdict}</span> {label}'
        f'<span class="path">{_text(entry.path)}</span></figcaption>\n'
        "</figure>"
    )


def _legend(low: float, high: float, threshold: float) -> str:
    places = np.linspace(0, 1, len(_COLORS))
    gradient = ", ".join(f"rgb({red} {green} {blue} / {opacity:.2f})" for (red, green, blue), opacity in zip(_COLORS, _opacity(places), strict=True))
    place = 100 * (threshold - low) / (high - low)
    marks = [(0.0, f"{low:.4g}"), (100.0, f"{high:.4g} and above")]
    if 15 <= place <= 75:  # elsewhere it would lie over one of the others
        marks.insert(1, (place, f"threshold {threshold:.4g}"))
    spans = "".join(f'<span style="left:{position:.1f}%">{text}</span>' for position, text in marks)
    return f'<div class="bar" style="background:linear-gradient(to right, {gradient}), #aaa"></div><div class="marks">{spans}</div>'


def _curve(points: Sequence[Sequence[float]]) -> str:
    """Covering radius against the size of the coreset, as a small SVG with a logarithmic axis of sizes: it helps to choose the ratio."""
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return ""
    width, height, left, bottom = 420, 150, 8, 22
    largest = max(radius for _, radius in points) or 1.0
    span = math.log(points[-1][0] / points[0][0])
    places = [(left + (width - 2 * left) * math.log(size / points[0][0]) / span, (height - bottom) * (1 - radius / largest) + 4) for size, radius in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    size, radius = points[-1]
    return (
        f"<details><summary>Coreset: {size:.0f} patches, none of the good ones farther than {radius:.4g} from them</summary>"
        f'<svg viewBox="0 0 {width} {height}" class="curve" role="img" aria-label="covering radius against the size of the coreset">'
        f'<polyline points="{line}" fill="none" stroke="#b3261e" stroke-width="2"/>'
        f'<text x="{left}" y="{height - 4}">{points[0][0]:.0f} patches: radius {points[0][1]:.4g}</text>'
        f'<text x="{width - left}" y="{height - 4}" text-anchor="end">{size:.0f}: {radius:.4g}</text></svg>'
        "<p>Largest distance of a good patch to the memory bank, for every size on the way; where the curve is flat, more patches add little.</p></details>"
    )


# System colours follow the reader's light or dark setting.
_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 1.5rem 0.3rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: normal; opacity: 0.75; white-space: nowrap; }
.legend { max-width: 36rem; margin-bottom: 1.5rem; }
.legend p { margin: 0 0 0.4rem; }
.bar { height: 0.9rem; border-radius: 3px; }
.marks { position: relative; height: 1.4rem; font-size: 0.85rem; }
.marks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.marks span:first-child { transform: none; }
.marks span:last-child { transform: translateX(-100%); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.6rem; border: 1px solid var(--line); border-radius: 6px; display: grid; grid-template-columns: 1fr 1fr; gap: 0.4rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { grid-column: 1 / -1; font-size: 0.9rem; }
.score { font-variant-numeric: tabular-nums; }
.verdict { border-radius: 3px; padding: 0 0.4rem; color: white; background: #2f6f4f; }
.anomalous .verdict { background: #b3261e; }
.label { opacity: 0.75; }
details { margin-bottom: 1.5rem; max-width: 32rem; }
.curve { width: 100%; font-size: 13px; fill: currentColor; }
.path { display: block; opacity: 0.75; overflow-wrap: anywhere; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}
</table>
<div class="legend">
<p>Colours of all heat maps: distance of each place to the good images</p>
{legend}
</div>
{curve}
<main class="gallery">
{cards}
</main>
</body>
</html>
"""
