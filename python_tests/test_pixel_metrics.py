"""Pixel metrics against their definitions, brute force, in float64; in bounded memory they give the same digits."""

from __future__ import annotations

import gc
import math
import tracemalloc
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from patchcore_ext import metrics
from patchcore_ext._pixel_metrics import _exact_sum
from patchcore_ext.metrics import PixelMetrics

Image = tuple[np.ndarray, np.ndarray]  # mask, map


def pro_curve(images: list[Image]) -> tuple[np.ndarray, np.ndarray]:
    """False positive rate and mean overlap at every threshold, one after the other."""
    components = []
    for index, (mask, _) in enumerate(images):
        labelled, count = ndimage.label(mask, np.ones((3, 3)))
        components += [(index, labelled == number) for number in range(1, count + 1)]
    good = sum(int((mask == 0).sum()) for mask, _ in images)
    fpr, overlap = [], []
    for threshold in [*np.unique(np.concatenate([values.ravel() for _, values in images]))[::-1], -np.inf]:
        called = [values > threshold for _, values in images]
        fpr.append(sum(int((hit & (mask == 0)).sum()) for hit, (mask, _) in zip(called, images, strict=True)) / good)
        overlap.append(np.mean([called[index][component].mean() for index, component in components]))
    return np.array(fpr), np.array(overlap)


def aupro_by_definition(images: list[Image], limit: float) -> float:
    fpr, overlap = pro_curve(images)
    inside = np.flatnonzero(fpr <= limit)
    x, y = fpr[inside], overlap[inside]
    if x[-1] < limit:
        share = (limit - x[-1]) / (fpr[len(x)] - x[-1])
        x, y = np.append(x, limit), np.append(y, y[-1] + share * (overlap[len(x)] - y[-1]))
    return float(np.trapezoid(y, x)) / limit


def small_images(kind: str, seed: int) -> list[Image]:
    """Three small images of a named kind, of different sizes."""
    generator = np.random.default_rng(seed)
    images = []
    for height, width in ((7, 9), (1, 12), (8, 5)):
        mask = generator.random((height, width)) < 0.25
        mask[0, 0] = mask[-1, -1] = True  # components in two corners
        mask[0, 3] = False
        values = generator.standard_normal((height, width)).astype(np.float32) + mask
        if kind == "tied":
            values = np.round(2 * values) / 2
        if kind == "constant":
            values = np.full_like(values, -1.5)
        if kind == "two values":
            values = (values > 0.5).astype(np.float32)
        if kind == "inverted":
            values = np.where(mask, -1, 1).astype(np.float32)
        if kind == "signed zeros":
            values = np.where(generator.random(mask.shape) < 0.5, np.float32(0.0), np.float32(-0.0))
        if kind == "one pixel":
            mask[:], mask[0, 2] = False, True
        images.append((mask, values.astype(np.float32)))
    if kind == "with good":
        images[1] = (np.zeros_like(images[1][0]), images[1][1])
    return images


KINDS = ("random", "tied", "constant", "two values", "inverted", "signed zeros", "one pixel", "with good")


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_metrics_are_their_definitions(kind: str, limit: float) -> None:
    for seed in range(8):
        images = small_images(kind, seed)
        masks, maps = [mask for mask, _ in images], [values for _, values in images]
        assert metrics.aupro(masks, maps, limit) == pytest.approx(aupro_by_definition(images, limit), abs=1e-12)
        expected = sklearn_metrics.roc_auc_score(np.concatenate([m.ravel() for m in masks]), np.concatenate([v.ravel() for v in maps]))
        assert metrics.pixel_auroc(masks, maps) == pytest.approx(expected, abs=1e-12)


def test_interpolation_at_the_limit_by_hand() -> None:
    mask, values = np.array([[1, 0, 0, 0, 0]]), np.array([[2, 3, 2, 2, 1]], dtype=np.float32)
    # Points (0, 0), (0.25, 0), (0.75, 1), (1, 1): at the limit 0.5 the overlap is 0.5, the area 0.25 * 0.5 / 2.
    assert metrics.aupro(mask[None], values[None], 0.5) == 0.125


def test_components_meet_at_corners_and_weigh_the_same() -> None:
    mask = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]])
    values = np.array([[2, 1, 1, 1, 1], [1, 2, 1, 1, 0]], dtype=np.float32)
    pixel_metrics = PixelMetrics(limit=1.0)
    pixel_metrics.update(mask, values)
    result = pixel_metrics.compute()
    assert result.num_components == 2
    assert result.aupro == 0.5  # the pair is found at once, the single pixel never
    assert result.pixel_auroc == 2 / 3


@pytest.mark.parametrize(
    "mask", [np.array([[1, 0, 1]], bool), np.array([[255, 0, 1]], np.uint8), np.array([[0.5, 0.0, -1.0]]), torch.tensor([[True, False, True]])]
)
def test_masks_of_any_type_give_the_same(mask: Any) -> None:
    pixel_metrics = PixelMetrics()
    pixel_metrics.update(mask, np.array([[1, 2, 3]], dtype=np.float32))
    result = pixel_metrics.compute()
    assert (result.num_components, result.num_anomalous_pixels, result.pixel_auroc) == (2, 2, 0.5)


def test_good_images_count_whatever_their_mask_looks_like() -> None:
    results = []
    for good in (None, np.zeros((2, 2), np.uint8), torch.zeros(2, 2)):
        pixel_metrics = PixelMetrics()
        pixel_metrics.update(np.eye(2), np.array([[3, 1], [1, 3]], np.float32))
        pixel_metrics.update(good, np.array([[4, 1], [1, 1]], np.float32))
        results.append(pixel_metrics.compute())
    assert results[0] == results[1] == results[2]
    assert results[0].pixel_auroc == 5 / 6


@pytest.mark.parametrize("mask", [None, np.zeros((2, 3)), np.ones((2, 3))])
def test_one_class_alone_has_no_pixel_metrics(mask: np.ndarray | None) -> None:
    pixel_metrics = PixelMetrics()
    pixel_metrics.update(mask, np.arange(6, dtype=np.float32).reshape(2, 3))
    anomalous = 0 if mask is None else int(mask.sum())
    assert pixel_metrics.compute() == metrics.PixelResult(None, None, 0.3, 1, 6, anomalous, int(anomalous > 0))


def test_more_images_may_follow_a_result() -> None:
    images = small_images("tied", 1)
    for memory in (2**20, 2**28):
        pixel_metrics = PixelMetrics(memory_bytes=memory)
        for count, (mask, values) in enumerate(images, 1):
            pixel_metrics.update(mask, values)
            first, second = pixel_metrics.compute(), pixel_metrics.compute()
            assert first == second
            assert first.aupro == metrics.aupro([m for m, _ in images[:count]], [v for _, v in images[:count]])


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2), np.float32), r"mask to be of the size of anomaly_map, \[3, 2\], got \[2, 3\]"),
        (np.zeros((2, 2, 3)), np.zeros((2, 2), np.float32), r"mask to be of the size of anomaly_map, \[2, 2\], got \[2, 2, 3\]"),
        (None, np.array([[0.0, np.nan]], np.float32), "anomaly_map to be finite, got NaN or infinity in 1 of 2"),
        (None, np.array([[0.0, -np.inf]], np.float32), "anomaly_map to be finite"),
        (np.array([[0.0, np.nan]]), np.zeros((1, 2), np.float32), "mask to be finite"),
        (None, np.zeros((1, 2, 2), np.float32), r"anomaly_map to be \[H, W\], got float32 of shape \[1, 2, 2\]"),
        (None, np.zeros((0, 2), np.float32), r"anomaly_map to be \[H, W\]"),
    ],
)
def test_wrong_images_are_refused_and_leave_no_trace(mask: Any, values: np.ndarray, message: str) -> None:
    pixel_metrics = PixelMetrics()
    with pytest.raises(ValueError, match=f"^PixelMetrics.update: expected {message}"):
        pixel_metrics.update(mask, values)
    with pytest.raises(ValueError, match=r"^PixelMetrics.compute: expected update to be called before"):
        pixel_metrics.compute()


def test_wide_maps_are_rounded_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="anomaly_map is float64 and is rounded to float32") as caught:
        value = metrics.pixel_auroc([np.array([[0, 1]])], [np.array([[1.0, 1.0 + 1e-12]])])
    assert value == 0.5
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="float64"), pytest.raises(ValueError, match="finite"):
        PixelMetrics().update(None, np.array([[1e300]]))


def test_wrong_arguments_of_pixel_metrics() -> None:
    one = np.zeros((1, 2, 2), np.float32)
    for limit in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="PixelMetrics: expected limit to be in"):
            PixelMetrics(limit)
    with pytest.raises(ValueError, match="memory_bytes to be at least 1048576, got 1000"):
        PixelMetrics(memory_bytes=1000)
    with pytest.raises(TypeError, match="memory_bytes to be an integer"):
        PixelMetrics(memory_bytes=1e9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aupro: expected masks and maps to be equally many, got only 1 masks"):
        metrics.aupro(one, [*one, *one])
    with pytest.raises(ValueError, match="pixel_auroc: expected masks and maps to be equally many, got only 0 maps"):
        metrics.pixel_auroc([None], [])
    with pytest.raises(ValueError, match="aupro: expected maps to be at least one"):
        metrics.aupro([], [])
    with pytest.raises(TypeError, match="anomaly_map to be numbers, got complex64"):
        PixelMetrics().update(None, one[0].astype(np.complex64))


def large_images(count: int = 200, size: int = 256) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Maps with ties within and across images; every other image has defects, a few are anomalous throughout."""
    generator = np.random.default_rng(3)
    for index in range(count):
        values = np.round(generator.standard_normal((size, size), dtype=np.float32), 3 if index % 3 else 1)
        mask = np.zeros((size, size), np.uint8)
        for top, left in generator.integers(0, size - 20, (index % 3, 2)):
            mask[top : top + 20, left : left + 3 + index % 15] = 255
        if index % 50 == 49:
            mask[:] = 255
        yield (mask if index % 2 else None), values + np.float32(0.5) * (mask > 0)


def measured(memory_bytes: int, threads: int = 1) -> tuple[metrics.PixelResult, int]:
    """The result on the large images, and the peak of allocated bytes."""
    torch.set_num_threads(threads)
    gc.collect()
    tracemalloc.start()
    pixel_metrics = PixelMetrics(memory_bytes=memory_bytes)
    for mask, values in large_images():
        pixel_metrics.update(mask, values)
    result = pixel_metrics.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


def test_little_memory_gives_the_same_digits_and_is_kept_to() -> None:
    budget, image = 4 * 2**20, 256 * 256
    small, peak = measured(budget)
    own = 18 * image  # the arrays of large_images
    assert peak < budget + 32 * image + own
    assert small.num_pixels * 4 > 8 * budget
    large, _ = measured(2**28)
    assert small == large
    assert large.num_components >= 100
    assert large.num_anomalous_pixels * 192 > 8 * budget  # so both kinds of pixels went through the file
    for threads in (2, 4):
        again, peak = measured(budget, threads)
        assert small == again
        assert peak < budget + 32 * image + own


def test_digits_depend_neither_on_memory_nor_on_order() -> None:
    generator = np.random.default_rng(5)
    images = []
    for _ in range(6):
        mask = ndimage.gaussian_filter(generator.standard_normal((128, 128)), 2) > 0.1
        images.append((mask, generator.standard_normal(mask.shape, dtype=np.float32) + mask.astype(np.float32)))
    for limit in np.linspace(0.05, 1.0, 12):
        results = []
        for memory, order in ((2**28, images), (2**20, images), (2**28, images[::-1])):
            pixel_metrics = PixelMetrics(float(limit), memory)
            for mask, values in order:
                pixel_metrics.update(mask, values)
            results.append(pixel_metrics.compute())
        assert results[0].num_anomalous_pixels * 192 > 2**20
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("kind", ["constant", "descending"])
def test_no_distribution_of_values_breaks_the_bound(kind: str) -> None:
    budget, size = 2**20, 512
    tracemalloc.start()
    pixel_metrics = PixelMetrics(limit=1.0, memory_bytes=budget)
    mask = np.indices((size, size)).sum(0) % 3 == 0  # [H, W], a third of it, in diagonals
    for index in range(8):
        values = np.full((size, size), 1.0 if kind == "constant" else -index, np.float32)
        pixel_metrics.update(mask, values)
    result = pixel_metrics.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < budget + 32 * size * size
    assert result.pixel_auroc == 0.5
    assert result.num_pixels == 8 * size * size


def test_the_temporary_file_is_closed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        pixel_metrics = PixelMetrics(memory_bytes=2**20)
        for _ in range(2):
            pixel_metrics.update(None, np.zeros((512, 512), np.float32))
        file = pixel_metrics._good._file
        assert not file.closed
        del pixel_metrics
        gc.collect()
        assert file.closed


def test_real_masks(magnetic_tiles: Path) -> None:
    """Real masks with made-up maps: the blurred mask in noise, at a tenth of the resolution so that the definition can be followed."""
    from PIL import Image as Picture

    generator = np.random.default_rng(0)
    images = []
    for path in sorted((magnetic_tiles / "ground_truth").glob("*/*"))[::40]:
        with Picture.open(path) as picture:
            mask = np.asarray(picture.convert("L"))[::10, ::10]
        blurred = ndimage.gaussian_filter((mask > 0).astype(np.float32), 2)
        images.append((mask, (blurred + 0.1 * generator.standard_normal(mask.shape)).astype(np.float32).round(2)))
    assert len(images) > 3
    assert any((mask > 0).any() for mask, _ in images)
    assert metrics.aupro([m for m, _ in images], [v for _, v in images]) == pytest.approx(aupro_by_definition(images, 0.3), abs=1e-12)


@pytest.mark.parametrize("span", [0, 3, 60, 1000])
def test_exact_sum_is_that_of_fractions_and_rounds_as_fsum_does(span: int) -> None:
    generator = np.random.default_rng(span)
    values = generator.standard_normal(5000) * 2.0 ** generator.integers(-span, span + 1, 5000)
    values[:4] = [0.0, -0.0, 5e-324, np.nextafter(1.0, 2.0)]
    found = _exact_sum(values)
    assert found == sum(map(Fraction, values.tolist()))
    assert float(found) == math.fsum(values.tolist())


def test_exact_sum_of_many_equal_mantissas_does_not_round() -> None:
    largest = np.nextafter(1.0, 0.0)  # all 53 bits are set
    assert _exact_sum(np.full(300_000, largest)) == 300_000 * Fraction(float(largest))
    assert _exact_sum(np.empty(0)) == 0
