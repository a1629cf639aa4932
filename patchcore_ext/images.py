"""Images one at a time: finding, reading and transforming them, and bringing anomaly maps back to their pixels."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageTransform",
    "Window",
    "find_images",
    "list_images",
    "load_image",
    "natural_key",
]

IMAGE_SUFFIXES = (".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes, in lower case, of the files that `list_images` takes from a folder."""

# Modes that PIL converts to RGB only by way of another one, or (P) only with a warning.
_DETOURS = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
# Resampled floats may overshoot 0..1 by a little.
_RANGE_TOLERANCE = 1e-3


class Window(NamedTuple):
    """Where the transformed image lies in the resized one, in pixels.

    Attributes:
        resized: (height, width) of the whole image after the resize.
        top: First row of the crop.
        left: First column of the crop.
        size: (height, width) of the crop = of the transformed image.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]


def list_images(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the paths of the images in a folder, of one file, or of a sequence of files.

    A folder is searched with all its subfolders (through symbolic links too, each folder once) for files that end in one of
    IMAGE_SUFFIXES; names that start with "." are left out. The order is natural ("2.png" before "10.png") and the same
    everywhere. Files that are named one by one keep their order and may end in anything.

    Raises:
        ValueError: Something is missing or unreadable, a sequence is empty or holds a folder, a folder holds no image.
        TypeError: The source is neither a path nor a sequence of paths.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if os.path.isdir(path):
            found = find_images(path)
            if not found:
                raise ValueError(f"list_images: expected source to hold images ({' '.join(IMAGE_SUFFIXES)}), got {path!r} with none in it.")
            return found
        if not os.path.exists(path):
            raise ValueError(f"list_images: expected source to be a folder or an image, got {path!r}, which does not exist.")
        return [path]
    if not isinstance(source, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in source):
        raise TypeError(f"list_images: expected source to be a folder, an image or a sequence of image paths, got {type(source).__name__}.")
    paths = [os.fspath(path) for path in source]
    if not paths:
        raise ValueError("list_images: expected source to name at least one image, got an empty sequence.")
    wrong = [path for path in paths if not os.path.isfile(path)]
    if wrong:
        reason = "a folder; pass a folder alone" if os.path.isdir(wrong[0]) else "which does not exist"
        more = f" ({len(wrong)} such entries)" if len(wrong) > 1 else ""
        raise ValueError(f"list_images: expected source to hold image files, got {wrong[0]!r}, {reason}{more}.")
    return paths


def find_images(folder: str) -> list[str]:
    """Return the paths of the images in a folder, as `list_images` does, but an empty list where there are none.

    Raises:
        ValueError: The folder, or one below it, cannot be read.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"list_images: expected source to be a folder that can be read, got {error}.") from error

    seen: set[str] = set()
    found: list[str] = []
    for directory, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        # A link to a folder above would be followed for ever.
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [os.path.join(directory, name) for name in names if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(found, key=natural_key)


def natural_key(path: str) -> list[tuple[list[str | int], str]]:
    """Return what to sort paths by: folder by folder, numbers by their value ("2.png" before "10.png")."""
    # split puts text at even places and digits at odd ones, so like is compared with like.
    parts = path.split(os.sep)
    return [([int(text) if i % 2 else text.casefold() for i, text in enumerate(re.split("([0-9]+)", part))], part) for part in parts]


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return the image of a file: mode "RGB" with 8 bits, or mode "F" scaled to 0..1 where the file has 16-bit greyscale.

    Palettes, greyscale, CMYK, one-bit and the like become RGB; alpha is dropped, not blended. The pixels are those stored in
    the file: an EXIF orientation is not applied. Of several frames the first is taken.

    Args:
        path: A file in any format that PIL reads.

    Raises:
        ValueError: The file is missing, truncated, no image, larger than PIL.Image.MAX_IMAGE_PIXELS allows, or has float or 32-bit
            values outside the known ranges (0..1, 0..65535).
    """
    name = os.fspath(path)
    try:
        with Image.open(name) as image:
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"load_image: expected {name!r} to be an image of ordinary size, got {error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted."
        ) from error
    except Exception as error:  # PIL's readers raise nearly anything on a bad file
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"load_image: expected {name!r} to be a readable image, got: {reason}.") from error
    return _plain_mode(image, "load_image", name)


def _plain_mode(image: Image.Image, caller: str, name: str) -> Image.Image:
    """Return the image in mode "RGB" or "F" (0..1)."""
    if image.mode not in ("F", "I", *_SIXTEEN_BIT):
        return image.convert(_DETOURS.get(image.mode, image.mode)).convert("RGB")
    values = np.asarray(image).astype(np.float32)
    limit = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= limit):  # written so that NaN fails
        raise ValueError(
            f"{caller}: expected {name!r} (mode {image.mode}) to have values in 0..{limit}, got {low:g}..{high:g}. "
            "Scale the image, or save it with 8 or 16 bits."
        )
    return Image.fromarray(values / np.float32(limit))


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop and normalisation of an image, and the way back for its anomaly map.

    Args:
        resize: (height, width), to which the image is stretched; an int for the short side, which keeps the aspect; None for none.
            Bilinear with antialiasing. The paper uses (256, 256).
        crop: (height, width), or an int for a square, of the centre crop after the resize; None for none. The paper uses 224, which
            leaves 23% of the area unseen.
        mean: Mean of each channel in 0..1 (ImageNet's).
        std: Standard deviation of each channel in 0..1 (ImageNet's).

    Raises:
        ValueError: A size below 1, mean or std not of three numbers, a std of zero.
        TypeError: A size that is neither None, an int nor a pair of ints.

    Example:
        >>> transform = ImageTransform(resize=(256, 256), crop=224)
        >>> transform(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    resize: tuple[int, int] | int | None = (256, 256)
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        # JSON and command lines bring lists.
        object.__setattr__(self, "resize", _checked_size("resize", self.resize))
        object.__setattr__(self, "crop", _checked_size("crop", self.crop))
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and not min(values) > 0):
                raise ValueError(f"ImageTransform: expected {name} to be three {'positive ' * (name == 'std')}numbers, got {values}.")
            object.__setattr__(self, name, values)

    def window(self, height: int, width: int) -> Window:
        """Return the geometry for an image of this height and width: the resized size and the place of the crop in it.

        Raises:
            ValueError: The crop is larger than the resized image.
        """
        if self.resize is None:
            resized = (height, width)
        elif isinstance(self.resize, int):
            long_side = int(self.resize * max(height, width) / min(height, width))  # rounded as torchvision.transforms.Resize does
            resized = (self.resize, long_side) if height <= width else (long_side, self.resize)
        else:
            resized = self.resize
        if self.crop is None:
            return Window(resized, 0, 0, resized)
        size = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if size[0] > resized[0] or size[1] > resized[1]:
            raise ValueError(
                f"ImageTransform: expected crop to fit into the resized image of {resized[0]} x {resized[1]} (height x width), "
                f"got {size[0]} x {size[1]}. Use a smaller crop or a larger resize."
            )
        return Window(resized, (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2, size)

    def seen_part(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the rows and columns of an image of this height and width that lie inside the crop, whole pixels only."""
        resized, top, left, size = self.window(height, width)
        # In whole numbers: ceil(top * height / resized) to floor((top + size) * height / resized).
        rows = slice(-(-top * height // resized[0]), (top + size[0]) * height // resized[0])
        columns = slice(-(-left * width // resized[1]), (left + size[1]) * width // resized[1])
        return rows, columns

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the transformed image as float32 [3, h, w], normalised.

        Args:
            image: In any mode; as `load_image` does it, 16-bit greyscale is worked on in float, all else in 8-bit RGB.
        """
        image = _plain_mode(image, "ImageTransform", "image")
        resized, top, left, (height, width) = self.window(image.height, image.width)
        if resized != (image.height, image.width):
            image = image.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))  # [h, w, 3] uint8 or [h, w] float32
        return self._normalise(pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1).to(torch.float32) / 255)  # [3, h, w]

    def apply_to_batch(self, images: Tensor) -> Tensor:
        """Return a batch transformed as a single image would be, float32 [B, 3, h, w] on the same device.

        Args:
            images: [B, 3, H, W] or greyscale [B, 1, H, W]; uint8, or float in 0..1, not normalised.

        Raises:
            ValueError: Another shape, or float values outside 0..1.
            TypeError: Neither uint8 nor float.

        Note:
            The resize is torch's bilinear one with antialiasing; on uint8 it differs from `__call__` by PIL's rounding to 8 bits.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"ImageTransform: expected images to be of shape [B, 3, H, W] or [B, 1, H, W], got {list(images.shape)}.")
        if images.dtype == torch.uint8:
            pixels = images.to(torch.float32) / 255
        elif images.is_floating_point():
            pixels = images.to(torch.float32)
            low, high = (value.item() for value in pixels.aminmax())
            if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
                raise ValueError(
                    f"ImageTransform: expected float images to have values in 0..1, got {low:g}..{high:g}. "
                    "Leave the normalisation to the transform, and divide 8-bit values by 255."
                )
        else:
            raise TypeError(f"ImageTransform: expected images to be uint8 or float, got {images.dtype}.")
        resized, top, left, (height, width) = self.window(images.shape[2], images.shape[3])
        if resized != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels, size=resized, mode="bilinear", align_corners=False, antialias=True)
        return self._normalise(pixels[:, :, top : top + height, left : left + width])  # [B, 3, h, w]

    def map_to_image(self, anomaly_map: Tensor, height: int, width: int) -> Tensor:
        """Return an anomaly map in the pixels of the original image, float32 [height, width].

        The map is put at its place in the resized image, 0 outside the crop, and that is resized (bilinear,
        align_corners=False, antialiased where it shrinks) to the original.

        Args:
            anomaly_map: Float tensor [h, w], of the size that the transform gives to an image of this height and width.
            height: Of the original, in pixels.
            width: Of the original, in pixels.

        Raises:
            ValueError: The map has another size.
        """
        resized, top, left, size = self.window(height, width)
        if tuple(anomaly_map.shape) != size:
            raise ValueError(
                f"ImageTransform: expected anomaly_map to be of shape {list(size)}, as the transform makes an image of {height} x {width}, "
                f"got {list(anomaly_map.shape)}."
            )
        canvas = anomaly_map.new_zeros((1, 1, *resized), dtype=torch.float32)
        canvas[0, 0, top : top + size[0], left : left + size[1]] = anomaly_map
        if resized != (height, width):
            canvas = F.interpolate(canvas, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        return canvas[0, 0]  # [height, width]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageTransform:
        """Return the transform whose settings `to_dict` gave, lists in place of tuples allowed.

        Raises:
            ValueError: A setting that there is not.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"ImageTransform: expected settings to be among {known}, got {unknown}.")
        return cls(**settings)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Greyscale without channels, or with one, becomes three by broadcasting."""
        mean, std = (torch.tensor(values, dtype=torch.float32, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


def _checked_size(name: str, value: Any) -> tuple[int, int] | int | None:
    sides = list(value) if isinstance(value, (tuple, list)) else [value]
    if value is None:
        return None
    if len(sides) > 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"ImageTransform: expected {name} to be None, an int or a pair (height, width), got {value!r}.")
    if not sides or min(sides) < 1:
        raise ValueError(f"ImageTransform: expected {name} to be at least 1 pixel, got {value!r}.")
    return (sides[0], sides[-1]) if isinstance(value, (tuple, list)) else sides[0]
