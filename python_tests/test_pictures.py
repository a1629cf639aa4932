"""Heat maps, outlines and thumbnails."""

from __future__ import annotations

import base64
import io

import numpy as np
import PIL.Image
import pytest
import torch

from patchcore_ext._pictures import encoded, outlined, shrunk
from patchcore_ext.report import default_color_range, heat_map_image


def test_shrinking_keeps_small_defects_and_mean_distances() -> None:
    mask = np.zeros((900, 600), dtype=bool)
    mask[451, 301] = True
    heat_map = torch.arange(900 * 600, dtype=torch.float64).reshape(900, 600)
    image, small_map, small_mask = shrunk(PIL.Image.new("L", (600, 900), 77), heat_map, mask, 300)
    assert image.size == (200, 300)
    assert small_mask is not None
    assert np.argwhere(small_mask).tolist() == [[150, 100]]
    assert small_map.mean().item() == pytest.approx(heat_map.mean().item(), rel=1e-5)
    assert np.asarray(image).tolist() == np.full((300, 200), 77).tolist()


def test_outline_lies_around_the_defect() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[15:25, 10:20] = True
    grey = PIL.Image.new("L", (40, 40), 128)
    pixels = np.asarray(outlined(grey, mask))
    assert (pixels[mask] == 128).all()
    assert pixels[20, 20].tolist() == pixels[14, 15].tolist() == [64, 255, 160]
    assert pixels[20, 22].tolist() == [0, 0, 0]
    assert (pixels[20, 23:] == 128).all()


def test_heat_map_colours_follow_the_distance() -> None:
    image = PIL.Image.new("L", (256, 2), 100)
    distances = torch.linspace(10, 20, 256).expand(2, 256)
    pixels = np.asarray(heat_map_image(image, distances, 10.0, 20.0), dtype=float)  # [2, 256, 3]
    assert pixels[0, 0].tolist() == [100, 100, 100]
    assert pixels[0, 255].tolist() == pytest.approx([0.2 * 100 + 0.8 * value for value in (252, 255, 164)], abs=0.5)
    luminance = pixels[0, 128:] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -0.5).all()  # from the middle on brighter means farther; half a step for the rounding
    redness = pixels[0, :192, 0] - pixels[0, :192, 2]
    assert (np.diff(redness[64:]) > -1.5).all()
    assert redness[191] > 150
    outside = np.asarray(heat_map_image(image, torch.tensor([[-5.0], [99.0]]).expand(2, 256), 10.0, 20.0), dtype=float)
    assert outside[0, 0].tolist() == pixels[0, 0].tolist()
    assert outside[1, 0].tolist() == pixels[0, 255].tolist()


def test_heat_map_keeps_the_image_visible() -> None:
    image = PIL.Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    for distance, contrast in ((0.0, 255), (0.25, 204), (0.5, 51), (1.0, 51)):
        dark, bright = np.asarray(heat_map_image(image, torch.full((1, 2), distance), 0.0, 1.0), dtype=int)[0]
        assert bright - dark == pytest.approx([contrast] * 3, abs=1)


def test_colors_run_around_the_threshold() -> None:
    assert default_color_range(3.0) == (1.5, 4.5)
    for useless in (0.0, -1.0, float("inf"), float("nan")):
        assert default_color_range(useless) == (0.0, 1.0)


def test_heat_map_stretches_images_of_many_bits() -> None:
    # A sensor's 12 bits in a 16-bit file would be black otherwise.
    values = np.array([[0.010, 0.035, 0.060]], dtype=np.float32)
    stretched = heat_map_image(PIL.Image.fromarray(values), torch.zeros(1, 3), 0.0, 1.0)
    plain = heat_map_image(PIL.Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)), torch.zeros(1, 3), 0.0, 1.0)
    assert np.array_equal(np.asarray(stretched), np.asarray(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heat_map_takes_any_float_dtype(dtype: torch.dtype) -> None:
    image = PIL.Image.new("L", (4, 3))
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    expected = heat_map_image(image, values, 0.0, 11.0)
    assert np.array_equal(np.asarray(heat_map_image(image, values.to(dtype).requires_grad_(), 0.0, 11.0)), np.asarray(expected))


@pytest.mark.parametrize(
    ("anomaly_map", "low", "high", "message"),
    [
        (torch.zeros(4, 3), 0.0, 1.0, r"image's size \[3, 4\], got \[4, 3\]"),
        (torch.zeros(1, 3, 4), 0.0, 1.0, r"image's size \[3, 4\], got \[1, 3, 4\]"),
        (torch.zeros(3, 4), 1.0, 1.0, r"low to be below high, both finite, got 1\.0 and 1\.0"),
        (torch.zeros(3, 4), 0.0, float("inf"), "low to be below high, both finite"),
        (torch.zeros(3, 4), float("nan"), 1.0, "low to be below high, both finite"),
        (torch.full((3, 4), float("nan")), 0.0, 1.0, "anomaly_map to be finite"),
    ],
)
def test_heat_map_refuses_what_it_cannot_show(anomaly_map: torch.Tensor, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heat_map_image(PIL.Image.new("L", (4, 3)), anomaly_map, low, high)


def test_thumbnails_with_much_detail_are_compressed_harder() -> None:
    def size(image: PIL.Image.Image) -> int:
        return len(base64.b64decode(encoded(image).removeprefix("data:image/webp;base64,"), validate=True))

    noise = np.random.default_rng(0).integers(0, 255, (160, 160), dtype=np.uint8)
    faint, strong = PIL.Image.fromarray(noise // 32 + 100), PIL.Image.fromarray(noise)
    buffer = io.BytesIO()
    strong.save(buffer, format="WEBP", quality=82, method=2)
    assert size(strong) < 0.75 * buffer.tell()
    buffer = io.BytesIO()
    faint.save(buffer, format="WEBP", quality=82, method=2)
    assert size(faint) == buffer.tell() <= 11_000
