"""Pixel AUROC and AUPRO: exact, and in bounded memory.

No curve is made. Averaging the overlaps of all components commutes with integrating over the false positive rate, and a pixel of a component of s
pixels lifts the overlap of that component by 1 / s when the threshold falls below the pixel's value. With N good pixels, of which ``above`` lie above
that value and ``reached`` reach it, the lift is linear between the rates above / N and reached / N (one step, however many pixels are tied) and stays
from there on. All that is wanted of a pixel is therefore this pair of counts. They are integers and add up over any division of the good pixels, so
the digits depend neither on the memory nor on the threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from . import _checks
from ._checks import ArrayLike
from ._spool import Spool

__all__ = ["PixelMetrics", "PixelResult", "aupro", "pixel_auroc"]

Array = npt.NDArray[Any]

_EIGHT_NEIGHBORS = np.ones((3, 3), dtype=bool)
_COMPONENT_PIXEL = np.dtype([("value", np.float32), ("size", np.uint32)])
_WORK_BYTES = 96  # of compute() for each component pixel it holds at a time, the pixel itself included
_MAX_THREADS = 4


@dataclass(frozen=True)
class PixelResult:
    """The pixel metrics of a set of images.

    Attributes:
        pixel_auroc: area under the ROC curve of all pixels, a fraction of 1; None when there is no anomalous or no good pixel, which leaves it undefined.
        aupro: area under the mean per-component overlap up to ``limit``, divided by ``limit``, a fraction of 1; None in the same cases.
        limit: the largest false positive rate of ``aupro``.
        num_images: number of images.
        num_pixels: number of pixels of all images.
        num_anomalous_pixels: number of pixels under the masks.
        num_components: number of 8-connected components of the masks.
    """

    pixel_auroc: float | None
    aupro: float | None
    limit: float
    num_images: int
    num_pixels: int
    num_anomalous_pixels: int
    num_components: int


class PixelMetrics:
    """Pixel AUROC and AUPRO of any number of images, one image at a time, without histograms: every distinct map value is a threshold.

    AUPRO is the area under the mean overlap of the components against the false positive rate, from 0 to ``limit``, divided by ``limit`` (Bergmann et
    al. 2020, "Uninformed Students", arXiv:1911.02357; 2021, "The MVTec Anomaly Detection Dataset", IJCV 129). Components are 8-connected regions of a
    mask, each of the same weight whatever its size; the rate is that of the good pixels of all images; between two thresholds, and to the limit,
    the curve is linear.

    Args:
        limit: largest false positive rate, 0 < limit <= 1.
        memory_bytes: most bytes that the stored pixels and the work of ``compute`` take, at least 2**20. What does not fit goes to an anonymous
            temporary file (8 bytes for each pixel of a component, 4 for each other one), in the folder that TMPDIR names.

    Raises:
        ValueError: limit or memory_bytes out of range.
        TypeError: memory_bytes is not an integer.

    Attributes:
        limit: the largest false positive rate.
        num_images: number of images so far.

    Note:
        Beside ``memory_bytes``, ``update`` takes up to 32 bytes for each pixel of the one image it is given. The results are the same digits for any
        ``memory_bytes`` and any number of threads; the order of the images changes nothing.

    Cost:
        N log N comparisons for N pixels. Beyond the memory, the good pixels are read from the file once for every ``memory_bytes`` / 192 pixels of
        components.

    Example:
        >>> metrics = PixelMetrics()
        >>> metrics.update(np.array([[0, 0, 0, 255]], dtype=np.uint8), np.array([[0.1, 0.2, 0.7, 0.9]], dtype=np.float32))
        >>> metrics.update(None, np.array([[0.1, 0.8]], dtype=np.float32))
        >>> metrics.compute().aupro
        1.0
    """

    def __init__(self, limit: float = 0.3, memory_bytes: int = 2**28) -> None:
        if not 0.0 < limit <= 1.0:
            raise ValueError(f"PixelMetrics: expected limit to be in (0, 1], got {limit}.")
        memory = _checks.integer("PixelMetrics", "memory_bytes", memory_bytes, 2**20)
        self.limit = float(limit)
        # Good pixels lie in sorted pieces, one for each thread.
        self._num_pieces = max(1, min(torch.get_num_threads(), _MAX_THREADS))
        self._good = Spool(np.dtype(np.float32), memory // 2 // 4, self._sort_good)
        self._anomalous = Spool(_COMPONENT_PIXEL, memory // 2 // _WORK_BYTES, _sort_anomalous)
        self.num_images = 0
        self._num_components = 0

    def update(self, mask: ArrayLike | None, anomaly_map: ArrayLike) -> None:
        """Adds one image.

        Args:
            mask: [H, W], bool, integers or floats: what is not zero is anomalous; None, or zero everywhere, for a good image.
            anomaly_map: [H, W], finite, larger is more anomalous. Taken as float32; wider types are rounded to it with a warning.

        Raises:
            ValueError: not two-dimensional, mask and map of different sizes, or values that are not finite; nothing was added then.
            TypeError: not numbers.
            OSError: the temporary file cannot grow; the metrics are of no use afterwards.
        """
        values = _map_values(anomaly_map)  # [H, W]
        anomalous = None if mask is None else _anomalous_pixels(mask, values.shape)  # bool [H, W]
        self.num_images += 1
        if anomalous is None or not anomalous.any():
            self._good.append(values.ravel())
            return
        components, count = ndimage.label(anomalous, _EIGHT_NEIGHBORS)  # int32 [H, W]
        inside = components[anomalous]  # [A]
        pixels = np.empty(len(inside), _COMPONENT_PIXEL)
        pixels["value"] = values[anomalous]
        pixels["size"] = np.bincount(inside)[inside]
        self._good.append(values[~anomalous])
        self._anomalous.append(pixels)
        self._num_components += int(count)

    def compute(self) -> PixelResult:
        """The metrics of all images so far; more may be added afterwards.

        Raises:
            ValueError: there was no image.
        """
        if self.num_images == 0:
            raise ValueError("PixelMetrics.compute: expected update to be called before, got no image.")
        num_good, num_anomalous = self._good.count, self._anomalous.count
        pixel_auroc = aupro = None
        if num_good > 0 and num_anomalous > 0:
            bound = self.limit * num_good
            pairs = 0  # twice the pairs of an anomalous and a good pixel in their right order, ties counted as one half
            areas = Fraction(0)
            for pixels in self._anomalous.blocks():
                above, reached = self._good_counts(pixels["value"].copy())
                pairs += int((2 * num_good - above - reached).sum())
                areas += _exact_sum(_areas(above, reached, bound) / pixels["size"])
            aupro = float(areas) / (bound * self._num_components)
            pixel_auroc = pairs / (2 * num_good * num_anomalous)
        return PixelResult(pixel_auroc, aupro, self.limit, self.num_images, num_good + num_anomalous, num_anomalous, self._num_components)

    def _good_counts(self, values: Array) -> tuple[Array, Array]:
        """How many good pixels lie above each of the sorted values, and how many reach it: int64 [A] each."""
        above, reached = np.full(len(values), self._good.count), np.full(len(values), self._good.count)  # less those below
        bounds = [len(values) * i // self._num_pieces for i in range(self._num_pieces + 1)]

        def subtract(pieces: Sequence[Array], begin: int, end: int) -> None:
            for piece in pieces:
                above[begin:end] -= np.searchsorted(piece, values[begin:end], "right")
                reached[begin:end] -= np.searchsorted(piece, values[begin:end], "left")

        with ThreadPoolExecutor(self._num_pieces) as pool:
            for block in self._good.blocks():
                list(pool.map(subtract, repeat(np.array_split(block, self._num_pieces)), bounds, bounds[1:]))
        return above, reached

    def _sort_good(self, block: Array) -> None:
        pieces = np.array_split(block, self._num_pieces)
        with ThreadPoolExecutor(self._num_pieces) as pool:
            list(pool.map(np.ndarray.sort, pieces))


def pixel_auroc(masks: Iterable[ArrayLike | None], maps: Iterable[ArrayLike]) -> float | None:
    """Area under the ROC curve of all pixels of all images; see ``PixelMetrics`` for images that come one at a time.

    Args:
        masks: [N, H, W], or one [H, W] or None (a good image) an image, of any sizes; what is not zero is anomalous.
        maps: the anomaly maps, [N, H, W] or one [H, W] an image.

    Returns:
        A fraction of 1, correctly rounded; None when there is no anomalous or no good pixel.

    Raises:
        ValueError: not as many masks as maps, none at all, or what ``PixelMetrics.update`` refuses.
        TypeError: not numbers.

    Example:
        >>> pixel_auroc(np.array([[[0, 0, 1]]]), np.array([[[0.1, 0.3, 0.2]]], dtype=np.float32))
        0.5
    """
    return _pixel_result("pixel_auroc", masks, maps).pixel_auroc


def aupro(masks: Iterable[ArrayLike | None], maps: Iterable[ArrayLike], limit: float = 0.3) -> float | None:
    """Area under the per-region overlap up to a false positive rate of ``limit``, divided by it; defined at ``PixelMetrics``.

    Args:
        masks: [N, H, W], or one [H, W] or None (a good image) an image, of any sizes; what is not zero is anomalous.
        maps: the anomaly maps, [N, H, W] or one [H, W] an image.
        limit: largest false positive rate, 0 < limit <= 1.

    Returns:
        A fraction of 1; None when there is no anomalous or no good pixel.

    Raises:
        ValueError: limit out of range, not as many masks as maps, none at all, or what ``PixelMetrics.update`` refuses.
        TypeError: not numbers.

    Example:
        >>> aupro(np.array([[[0, 0, 1]]]), np.array([[[0.1, 0.3, 0.2]]], dtype=np.float32), limit=1.0)
        0.5
    """
    return _pixel_result("aupro", masks, maps, limit).aupro


def _pixel_result(op: str, masks: Iterable[ArrayLike | None], maps: Iterable[ArrayLike], limit: float = 0.3) -> PixelResult:
    metrics, missing = PixelMetrics(limit), object()
    for index, (mask, anomaly_map) in enumerate(zip_longest(masks, maps, fillvalue=missing)):
        if mask is missing or anomaly_map is missing:
            raise ValueError(f"{op}: expected masks and maps to be equally many, got only {index} {'masks' if mask is missing else 'maps'}.")
        metrics.update(mask, anomaly_map)  # type: ignore[arg-type]
    if metrics.num_images == 0:
        raise ValueError(f"{op}: expected maps to be at least one anomaly map, got none.")
    return metrics.compute()


def _sort_anomalous(block: Array) -> None:
    block[:] = block[block["value"].argsort()]


def _areas(above: Array, reached: Array, bound: float) -> Array:
    """Area from 0 to ``bound`` under lines that are 0 to ``above``, 1 from ``reached`` and linear between: float64 [A], in good pixels."""
    whole = bound - (above + reached) / 2
    cut = (bound - above) ** 2 / (2 * np.maximum(reached - above, 1))
    return np.where(reached <= bound, whole, np.where(above < bound, cut, 0.0))


def _exact_sum(values: Array) -> Fraction:
    """The sum of finite float64 values [A] without rounding, so the same in any order: what math.fsum rounds, for arrays.

    A value is a whole number below 2^53 times a power of two. Whole numbers of the same power are added as their upper 27 and lower 26 bits: the sums
    of up to 2^26 of these stay within the 53 bits of float64, in which bincount adds.
    """
    total = Fraction(0)
    for start in range(0, len(values), 1 << 26):
        mantissas, exponents = np.frexp(values[start : start + (1 << 26)])
        whole = np.ldexp(mantissas, 53).astype(np.int64)
        least = int(exponents.min())
        for part, bits in ((whole >> 26, 26), (whole & ((1 << 26) - 1), 0)):
            for power, count in enumerate(np.bincount(exponents - least, weights=part)):
                total += Fraction(int(count)) * Fraction(2) ** (least + power + bits - 53)
    return total


def _map_values(anomaly_map: ArrayLike) -> npt.NDArray[np.float32]:
    op = "PixelMetrics.update"
    array = _checks.numbers(op, "anomaly_map", anomaly_map)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{op}: expected anomaly_map to be [H, W], got {_checks.describe(array)}.")
    if not np.can_cast(array.dtype, np.float32):
        warnings.warn(f"{op}: anomaly_map is {array.dtype} and is rounded to float32; pass float32 to silence this.", UserWarning, stacklevel=3)
    with np.errstate(over="ignore"):
        values = array.astype(np.float32, copy=False)
    _checks.finite(op, "anomaly_map", values)
    return values


def _anomalous_pixels(mask: ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    op = "PixelMetrics.update"
    array = _checks.numbers(op, "mask", mask)
    if array.shape != shape:
        raise ValueError(f"{op}: expected mask to be of the size of anomaly_map, {list(shape)}, got {list(array.shape)}.")
    _checks.finite(op, "mask", array)
    anomalous: npt.NDArray[np.bool_] = array != 0
    return anomalous
