"""Small image files that the tests of images and data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchcore_ext.images import ImageTransform

PLAIN = ImageTransform(resize=None, mean=(0, 0, 0), std=(1, 1, 1))
"""Leaves size and values (in 0..1) as they are."""


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(path: Path, image: Image.Image | None = None, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or random_image(6, 5)).save(path, **options)
    return str(path)
