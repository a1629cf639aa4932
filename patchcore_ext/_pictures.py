"""Pictures of a report: heat maps, the outlines of masks, and thumbnails."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageChops
import PIL.ImageFilter
import torch
from torch import Tensor

__all__ = ["default_color_range", "displayable", "encoded", "heat_map_image", "legend_gradient", "outlined", "shrunk"]

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
# (colour, width in pixels) from the mask outwards: light beside dark is seen on every image.
_OUTLINE = (((64, 255, 160), 2), ((0, 0, 0), 1))
_WEBP_QUALITIES = (82, 60, 35)
_THUMBNAIL_BYTES = 11_000  # two for each of 1,000 images, in base64: 30 MB


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


def legend_gradient() -> str:
    """The colours of a heat map as a CSS gradient from left to right, as clear as they lie on an image."""
    places = np.linspace(0, 1, len(_COLORS))
    stops = (f"rgb({red} {green} {blue} / {opacity:.2f})" for (red, green, blue), opacity in zip(_COLORS, _opacity(places), strict=True))
    return f"linear-gradient(to right, {', '.join(stops)})"


def displayable(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as "L" or "RGB"; modes of more than 8 bits are stretched as in :func:`heat_map_image`."""
    if image.mode in ("F", "I", "I;16"):
        return _grey(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def shrunk(
    image: PIL.Image.Image, anomaly_map: Tensor, mask: npt.NDArray[np.bool_] | None, longest_side: int
) -> tuple[PIL.Image.Image, Tensor, npt.NDArray[np.bool_] | None]:
    """Image, map [H, W] and mask [H, W] at a size for a screen; what is small enough stays as it is.

    The map is averaged over what falls on a pixel; a pixel of the mask is set when any of those that fall on it is, so that a small defect stays.

    Returns:
        The three, of one size, with at most ``longest_side`` pixels on the longer side.
    """
    factor = longest_side / max(image.size)
    if factor >= 1:
        return image, anomaly_map, mask
    width, height = (max(1, round(side * factor)) for side in image.size)
    small_map = torch.nn.functional.interpolate(anomaly_map[None, None].float(), size=(height, width), mode="area")[0, 0]  # [height, width]
    if mask is not None:
        pooled = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), (height, width))  # [1, height, width]
        mask = pooled[0].numpy() > 0
    return displayable(image).resize((width, height), PIL.Image.Resampling.BILINEAR), small_map, mask


def outlined(image: PIL.Image.Image, mask: npt.NDArray[np.bool_]) -> PIL.Image.Image:
    """The image in RGB with the outline of a mask [H, W] around the defect, which itself stays visible."""
    drawn = displayable(image).convert("RGB")
    inside = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
    for color, width in _OUTLINE:
        around = inside.filter(PIL.ImageFilter.MaxFilter(2 * width + 1))
        drawn.paste(color, mask=PIL.ImageChops.subtract(around, inside))
        inside = around
    return drawn


def encoded(image: PIL.Image.Image) -> str:
    """A thumbnail as a WebP ``data:`` address, in the best quality in which it is small, or else in the lowest."""
    for quality in _WEBP_QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=quality, method=2)
        if buffer.tell() <= _THUMBNAIL_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


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
