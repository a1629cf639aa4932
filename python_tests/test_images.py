"""Finding, reading and transforming images, and the way back from a map to the original's pixels."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from image_files import PLAIN, random_image, write
from PIL import Image
from torch import Tensor

from patchcore_ext.images import IMAGE_SUFFIXES, ImageTransform, list_images, load_image


def sixteen_bit_ramp(dtype: str = "<u2") -> np.ndarray:
    return np.arange(0, 65536, 16, dtype=np.int64).reshape(64, 64).astype(dtype)


# --- list_images ----------------------------------------------------------------------------------------------------------------


def test_list_images_searches_folders_in_natural_order(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "B/1.PNG", "a/img10.jpg", "a/img9.jpg", "a/deeper/x.bmp", ".hidden.png", ".cache/1.png", "a-b/1.tif"]
    for name in names:
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [Path(path).relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["2.png", "10.png", "a/deeper/x.bmp", "a/img9.jpg", "a/img10.jpg", "a-b/1.tif", "B/1.PNG"]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_list_images_does_not_depend_on_the_order_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "A.png", "b1.png", "b01.png", "c/1.png", "d/1.png"):
        write(tmp_path / name)
    expected = list_images(tmp_path)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: ((d, s.sort(reverse=True) or s, f[::-1]) for d, s, f in walk(*args, **options)))
    assert list_images(tmp_path) == expected


def test_list_images_follows_links_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    assert list_images(tmp_path / "data") == [str(tmp_path / "data" / "link" / "1.png")]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_list_images_takes_every_suffix_that_pil_can_write(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x{suffix.upper()}", random_image(4, 4).convert("1") if suffix == ".pbm" else None)
    assert list_images(tmp_path) == [path]
    assert load_image(path).mode == "RGB"


def test_list_images_keeps_named_files_as_they_are(tmp_path: Path) -> None:
    paths = [Path(write(tmp_path / name, format="png")) for name in ("b.png", "a.dat")]
    assert list_images(paths) == [str(path) for path in paths]
    assert list_images(paths[1]) == [str(paths[1])]


def test_list_images_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "1.png")
    (tmp_path / "empty").mkdir()
    for source, error, message in (
        (tmp_path / "missing", ValueError, r"got '.*missing', which does not exist"),
        (tmp_path / "empty", ValueError, r"images \(\.bmp .*\), got '.*empty' with none in it"),
        ([], ValueError, "got an empty sequence"),
        ([path, "nowhere.png", "gone.png"], ValueError, r"got 'nowhere\.png', which does not exist \(2 such entries\)"),
        ([path, tmp_path], ValueError, "a folder; pass a folder alone"),
        (7, TypeError, "got int"),
        ([path, 7], TypeError, "sequence of image paths"),
    ):
        with pytest.raises(error, match=message):
            list_images(source)


# --- load_image -----------------------------------------------------------------------------------------------------------------


class Reload(Protocol):
    def __call__(self, image: Image.Image, suffix: str, **options: Any) -> Image.Image: ...


@pytest.fixture
def reloaded(tmp_path: Path) -> Reload:
    """Writes an image as image<suffix> and loads it."""

    def reload(image: Image.Image, suffix: str, **options: Any) -> Image.Image:
        image.save(tmp_path / f"image{suffix}", **options)
        return load_image(tmp_path / f"image{suffix}")

    return reload


COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (200, 100, 50)]


def colours(mode: str) -> Image.Image:
    image = Image.new("RGB", (4, 1))
    for x, colour in enumerate(COLOURS):
        image.putpixel((x, 0), colour)
    return image.convert(mode)


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", ".png"), ("RGBA", ".png"), ("RGBX", ".tif"), ("RGB", ".bmp")])
def test_load_image_keeps_colours(reloaded: Reload, mode: str, suffix: str) -> None:
    assert pixels(reloaded(colours(mode), suffix)) == COLOURS


def test_load_image_drops_alpha_unblended(reloaded: Reload) -> None:
    image = colours("RGBA")
    image.putalpha(Image.frombytes("L", (4, 1), bytes([0, 1, 128, 255])))
    assert pixels(reloaded(image, ".png")) == COLOURS
    grey = Image.merge("LA", (Image.frombytes("L", (2, 1), bytes([90, 200])), Image.frombytes("L", (2, 1), bytes([0, 255]))))
    assert pixels(reloaded(grey, ".png")) == [(90, 90, 90), (200, 200, 200)]


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255, 7])])
@pytest.mark.filterwarnings("error")
def test_load_image_palette_with_transparency(reloaded: Reload, transparency: int | bytes | None) -> None:
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 3]))
    image.putpalette([value for colour in COLOURS for value in colour])
    options = {} if transparency is None else {"transparency": transparency}
    assert pixels(reloaded(image, ".png", **options)) == COLOURS


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_transform_takes_every_8_bit_mode(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    result = PLAIN(image)
    assert result.shape == (3, 2, 3)
    assert result.dtype == torch.float32


def test_load_image_one_bit_and_grey(reloaded: Reload) -> None:
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(reloaded(bits, ".png")) == [(0, 0, 0), (255, 255, 255)]
    assert pixels(reloaded(Image.frombytes("L", (2, 1), bytes([3, 250])), ".png")) == [(3, 3, 3), (250, 250, 250)]


def test_load_image_cmyk(reloaded: Reload) -> None:
    cyan = Image.new("CMYK", (2, 1), (255, 0, 0, 0))
    assert pixels(reloaded(cyan, ".tif")) == [(0, 255, 255)] * 2


@pytest.mark.parametrize(("dtype", "suffix"), [("<u2", ".png"), ("<u2", ".tif"), (">u2", ".tif"), ("<i4", ".tif"), ("<u2", ".pgm")])
def test_load_image_16_bit_keeps_all_levels(reloaded: Reload, dtype: str, suffix: str) -> None:
    image = reloaded(Image.fromarray(sixteen_bit_ramp(dtype)), suffix)
    values = np.asarray(image)
    assert image.mode == "F"
    assert len(np.unique(values)) == 4096
    np.testing.assert_allclose(values, sixteen_bit_ramp() / 65535, rtol=1e-6)


def test_transform_16_bit_resizes_without_rounding() -> None:
    ramp = np.tile(np.linspace(0, 1000, 64), (64, 1))  # 4 levels in 8 bits
    tensor = ImageTransform(resize=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(ramp.round().astype(np.uint16)))
    assert len(tensor[0, 0].unique()) == 32
    assert torch.equal(tensor[0], tensor[2])
    expected = torch.nn.functional.interpolate(torch.from_numpy(ramp.round())[None, None] / 65535, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(tensor[0].double(), expected[0, 0], rtol=1e-4, atol=1e-7)


def test_load_image_float_only_in_0_to_1(reloaded: Reload) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(reloaded(Image.fromarray(values), ".tif")), values)
    for wrong in (values * 255, values - 0.1, np.where(values > 0.9, np.float32("nan"), values)):
        with pytest.raises(ValueError, match=r"image\.tif' \(mode F\) to have values in 0\.\.1, got "):
            reloaded(Image.fromarray(wrong), ".tif")


@pytest.mark.parametrize("value", [-1, 65536])
def test_load_image_32_bit_only_in_16_bits(reloaded: Reload, value: int) -> None:
    with pytest.raises(ValueError, match=r"\(mode I\) to have values in 0\.\.65535"):
        reloaded(Image.fromarray(np.array([[0, value]], dtype=np.int32)), ".tif")


def test_load_image_takes_the_first_frame(reloaded: Reload) -> None:
    first, second = Image.new("RGB", (4, 1), (10, 20, 30)), Image.new("RGB", (4, 1), (90, 80, 70))
    assert pixels(reloaded(first, ".tif", save_all=True, append_images=[second])) == [(10, 20, 30)] * 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_load_image_truncated_is_named(tmp_path: Path, suffix: str) -> None:
    path = Path(write(tmp_path / f"cut{suffix}", random_image(64, 64)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"expected '.*cut\{suffix}' to be a readable image, got: .+"):
        load_image(path)


def test_load_image_unreadable_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, reason in (("text.png", "cannot identify"), ("empty.png", "cannot identify"), ("gone.png", "No such file"), ("", "")):
        with pytest.raises(ValueError, match=rf"{name}' to be a readable image, got: .*{reason}"):
            load_image(tmp_path / name)


def test_load_image_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bomb.png", random_image(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"bomb\.png' to be an image of ordinary size, got .*Raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        load_image(path)


# --- ImageTransform -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "crop", "wide", "tall"),  # sizes that an image of 48 x 64 and one of 64 x 48 come to
    [
        ((256, 256), None, (256, 256), (256, 256)),
        ((20, 30), None, (20, 30), (20, 30)),
        (24, None, (24, 32), (32, 24)),
        (25, None, (25, 33), (33, 25)),
        (24, 16, (16, 16), (16, 16)),
        (24, [10, 24], (10, 24), (10, 24)),
        (None, None, (48, 64), (64, 48)),
        (None, (47, 33), (47, 33), (47, 33)),
    ],
)
def test_transform_sizes(resize: Any, crop: Any, wide: tuple[int, int], tall: tuple[int, int]) -> None:
    transform = ImageTransform(resize=resize, crop=crop)
    for image, size in ((random_image(48, 64), wide), (random_image(64, 48), tall)):
        tensor = transform(image)
        assert tensor.shape == (3, *size)
        assert tensor.is_contiguous()
        assert transform.window(image.height, image.width).size == size


def test_transform_normalises_like_imagenet() -> None:
    tensor = ImageTransform(resize=None)(Image.new("RGB", (2, 2), (255, 0, 51)))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(tensor[:, 1, 1], torch.tensor(expected, dtype=torch.float32))


def test_transform_equals_torchvision() -> None:
    from torchvision.transforms import v2

    image = random_image(61, 90)
    for ours, theirs in (
        (ImageTransform((32, 40)), [v2.Resize((32, 40))]),
        (ImageTransform(40), [v2.Resize(40)]),
        (ImageTransform((64, 64), 40), [v2.Resize((64, 64)), v2.CenterCrop(40)]),
    ):
        steps = [*theirs, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(ours.mean, ours.std)]
        torch.testing.assert_close(ours(image), v2.Compose(steps)(image), rtol=1e-6, atol=1e-6)


def test_transform_crops_the_centre() -> None:
    image = Image.fromarray(np.arange(7 * 9, dtype=np.uint8).reshape(7, 9))
    tensor = ImageTransform(resize=None, crop=(3, 4), mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert torch.equal((tensor[0] * 255).round().int(), torch.arange(63, dtype=torch.int32).view(7, 9)[2:5, 2:6])


@pytest.mark.parametrize("transform", [ImageTransform((20, 31)), ImageTransform(20, 16), ImageTransform((70, 90), (64, 50)), PLAIN])
def test_transform_of_a_batch_equals_that_of_its_images(transform: ImageTransform) -> None:
    images = [random_image(40, 52, seed) for seed in range(3)]
    batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = torch.stack([transform(image) for image in images])
    rounding = 1.01 / 255 / min(transform.std)  # PIL rounds to 8 bits after each of its two passes
    torch.testing.assert_close(transform.apply_to_batch(batch), expected, rtol=0, atol=rounding)
    torch.testing.assert_close(transform.apply_to_batch(batch.double() / 255), transform.apply_to_batch(batch), rtol=1e-5, atol=1e-5)
    grey = batch[:, :1]
    assert torch.equal(transform.apply_to_batch(grey), transform.apply_to_batch(grey.repeat(1, 3, 1, 1)))


def test_transform_of_a_batch_leaves_its_input_alone() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float32)
    before = images.clone()
    PLAIN.apply_to_batch(images).zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"shape \[B, 3, H, W\].*got \[3, 8, 8\]"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"got \[1, 4, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"got \[0, 3, 8, 8\]"),
        (torch.full((1, 3, 8, 8), 255.0), ValueError, r"values in 0\.\.1, got 255\.\.255.*divide 8-bit values by 255"),
        (torch.full((1, 3, 8, 8), -2.0), ValueError, r"values in 0\.\.1, got -2\.\.-2"),
        (torch.full((1, 3, 8, 8), math.nan), ValueError, r"values in 0\.\.1, got nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, r"uint8 or float, got torch\.int64"),
    ],
)
def test_transform_refuses_batches(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageTransform().apply_to_batch(images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resize": 0}, ValueError, "resize to be at least 1 pixel"),
        ({"resize": (256, -1)}, ValueError, "resize to be at least 1 pixel"),
        ({"resize": (1, 2, 3)}, TypeError, r"resize to be None, an int or a pair \(height, width\)"),
        ({"crop": 22.4}, TypeError, "crop to be None, an int or a pair"),
        ({"crop": ()}, ValueError, "crop to be at least 1 pixel"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean to be three numbers"),
        ({"std": (0.5, 0.5, 0)}, ValueError, "std to be three positive numbers"),
    ],
)
def test_transform_refuses_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageTransform(**options)


def test_transform_crop_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match=r"crop to fit into the resized image of 100 x 120 \(height x width\), got 224 x 224\. Use a smaller"):
        ImageTransform((100, 120), 224)(random_image(8, 8))
    with pytest.raises(ValueError, match="crop to fit"):
        ImageTransform(None, (8, 9)).apply_to_batch(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("transform", [ImageTransform(), ImageTransform(320, (280, 300), std=(1, 2, 3)), ImageTransform(None)])
def test_transform_survives_json(transform: ImageTransform) -> None:
    again = ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform
    assert hash(again) == hash(transform)
    with pytest.raises(ValueError, match=r"settings to be among .*got \['flip'\]"):
        ImageTransform.from_dict({"flip": True})


# --- map_to_image ---------------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    ImageTransform((32, 48)),
    ImageTransform((32, 32), 24),
    ImageTransform(32),
    ImageTransform(32, (20, 28)),
    ImageTransform(None),
    ImageTransform(None, 40),
    ImageTransform((200, 100), (150, 90)),
]


@pytest.mark.parametrize("transform", GEOMETRIES)
@pytest.mark.parametrize(("height", "width"), [(61, 97), (97, 61), (64, 64)])
def test_map_to_image_puts_an_impulse_back(transform: ImageTransform, height: int, width: int) -> None:
    """An impulse lands on the pixel whose centre is nearest to the centre of the map's pixel."""
    resized, top, left, (map_height, map_width) = transform.window(height, width)
    for row, column in ((map_height // 2, map_width // 2), (1, 2), (map_height - 3, map_width - 2)):
        impulse = torch.zeros(map_height, map_width, dtype=torch.float32)
        impulse[row, column] = 1
        result = transform.map_to_image(impulse, height, width)
        assert result.shape == (height, width)
        assert result.dtype == torch.float32
        weights = result / result.sum()
        y = (weights.sum(1) * torch.arange(height)).sum().item()
        x = (weights.sum(0) * torch.arange(width)).sum().item()
        # Half a pixel of the coarser grid: how far interpolation can move the centre of mass.
        assert y == pytest.approx((row + top + 0.5) * height / resized[0] - 0.5, abs=0.5 * max(1, height / resized[0]))
        assert x == pytest.approx((column + left + 0.5) * width / resized[1] - 0.5, abs=0.5 * max(1, width / resized[1]))


def test_map_to_image_inverts_the_transform() -> None:
    """A bright pixel of the original comes back to where it was, through a resize that keeps the aspect and a crop."""
    transform = ImageTransform(resize=60, crop=(48, 64), mean=(0, 0, 0), std=(1, 1, 1))
    for row, column in ((60, 80), (30, 40), (95, 130)):
        image = Image.new("RGB", (160, 120))
        image.paste((255, 255, 255), (column - 2, row - 2, column + 3, row + 3))
        result = transform.map_to_image(transform(image)[0], 120, 160)
        peak = divmod(int(result.argmax()), 160)
        assert abs(peak[0] - row) <= 1
        assert abs(peak[1] - column) <= 1


def test_map_to_image_is_zero_outside_the_crop() -> None:
    transform = ImageTransform((100, 100), 50)
    result = transform.map_to_image(torch.ones(50, 50), 200, 200)
    assert torch.equal(result[52:148, 52:148], torch.ones(96, 96))
    result[48:152, 48:152] = 0
    assert not result.any()


def test_map_to_image_without_a_change_of_size_is_exact() -> None:
    values = torch.rand(30, 40, dtype=torch.float64)
    assert torch.equal(ImageTransform((30, 40)).map_to_image(values, 30, 40), values.float())


def test_map_to_image_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"anomaly_map to be of shape \[224, 224\].*480 x 640, got \[256, 256\]"):
        ImageTransform((256, 256), 224).map_to_image(torch.zeros(256, 256), 480, 640)


@pytest.mark.parametrize(("resize", "crop"), [((32, 48), 16), (32, 24), (None, (7, 9)), ((64, 64), None), (17, 11)])
def test_the_seen_part_holds_the_whole_pixels_of_the_crop(resize: Any, crop: Any) -> None:
    transform = ImageTransform(resize, crop)
    for height, width in ((24, 40), (31, 17), (100, 100)):
        resized, top, left, size = transform.window(height, width)
        seen = transform.seen_part(height, width)
        for part, start, length, scale in zip(seen, (top, left), size, (resized[0] / height, resized[1] / width), strict=True):
            assert part.start * scale >= start - 1e-9 > (part.start - 1) * scale - 1e-8
            assert part.stop * scale <= start + length + 1e-9 < (part.stop + 1) * scale + 1e-8
