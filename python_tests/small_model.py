"""A backbone of two layers, generated images and a quick model, for the tests of the model and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from patchcore_ext.patchcore import PatchCore, Prediction

SIDE = 32


class SmallNet(nn.Module):
    """Two layers, at a half and a quarter of the size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.second(torch.relu(self.first(images)))
        return output


def images_of(count: int, seed: int = 0, height: int = 24, width: int = 40, defect: bool = False) -> Tensor:
    """Stripes with some noise, float [count, 3, height, width] in 0..1; defective ones have a bright checkered square."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(count, 1, 1, 1, generator=generator) * 0.5
    stripes = 0.4 + 0.2 * torch.sin(torch.arange(width) / 3 + phase)
    images = (stripes + 0.02 * torch.randn(count, 3, height, width, generator=generator)).clamp(0, 1)
    if defect:
        images[:, :, 8:16, 12:20] = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    return images


def write_images(folder: Path, images: Tensor) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, image in enumerate(images):
        path = folder / f"{index:03d}.png"
        PIL.Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
        paths.append(str(path))
    return paths


def make_model(seed: int = 0, **options: Any) -> PatchCore:
    settings = {"resize": (SIDE, SIDE), "batch_size": 7, "device": "cpu", "seed": seed, **options}
    return PatchCore(SmallNet(), ("first", "second"), **settings)


def same_predictions(first: Iterator[Prediction], second: Iterator[Prediction]) -> bool:
    return all(
        a.path == b.path and a.score == b.score and a.is_anomalous == b.is_anomalous and torch.equal(a.anomaly_map, b.anomaly_map)
        for a, b in zip(first, second, strict=True)
    )
