"""The batch size that the free memory decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import random_image, write
from small_model import SmallNet, images_of, make_model
from torch import Tensor, nn

from patchcore_ext import _batch_size
from patchcore_ext._batch_size import MAX_BATCH_SIZE, available_memory, bytes_per_pixel, choose_batch_size
from patchcore_ext.features import FeatureExtractor
from patchcore_ext.images import ImageTransform

CPU = torch.device("cpu")
TRANSFORM = ImageTransform(resize=(64, 64))


@pytest.fixture
def extractor() -> FeatureExtractor:
    return FeatureExtractor(SmallNet(), ("first", "second"))


def test_bytes_a_pixel_are_those_of_the_shapes(extractor: FeatureExtractor) -> None:
    # first: 6 channels at a half of the side; features: 6 + 8 channels there; float32.
    assert bytes_per_pixel(extractor, CPU) == 4 * (4 * 6 / 4) + 4 * (2 * 14 / 4)


@pytest.mark.parametrize(("images", "batch_size"), [(0.5, 1), (1, 1), (2, 2), (3.9, 2), (4, 4), (15, 8), (16, 16), (1000, 16)])
def test_batch_fits_into_a_quarter_of_the_free_memory(extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch, images: float, batch_size: int) -> None:
    need = bytes_per_pixel(extractor, CPU)
    assert need is not None
    monkeypatch.setattr(_batch_size, "available_memory", lambda _: int(4 * need * 64 * 64 * images))
    assert choose_batch_size(extractor, TRANSFORM, images_of(1), CPU) == batch_size


def test_largest_file_decides_where_sizes_follow_the_images(extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small, large, broken = write(tmp_path / "a.png", random_image(8, 8)), write(tmp_path / "b.png", random_image(64, 128)), tmp_path / "c.png"
    broken.write_bytes(b"broken")
    monkeypatch.setattr(_batch_size, "available_memory", lambda _: int(4 * (bytes_per_pixel(extractor, CPU) or 0) * 64 * 64 * 8))
    own_size = ImageTransform(resize=None)
    assert choose_batch_size(extractor, own_size, [small, str(broken)], CPU) == MAX_BATCH_SIZE
    assert choose_batch_size(extractor, own_size, [small, large, str(broken)], CPU) == 4
    assert choose_batch_size(extractor, ImageTransform(resize=None, crop=64), [small, large], CPU) == 8


def test_what_is_not_known_gives_the_largest_batch(extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise OverflowError("not this size")

    assert bytes_per_pixel(FeatureExtractor(nn.Sequential(Picky()), ("0",)), CPU) is None
    assert choose_batch_size(FeatureExtractor(nn.Sequential(Picky()), ("0",)), TRANSFORM, ["a.png"], CPU) == MAX_BATCH_SIZE
    monkeypatch.setattr(_batch_size, "available_memory", lambda _: 1)
    assert choose_batch_size(extractor, ImageTransform(resize=None), torch.utils.data.TensorDataset(images_of(1)), CPU) == MAX_BATCH_SIZE
    assert choose_batch_size(extractor, TRANSFORM, ["a.png"], CPU) == 1
    monkeypatch.setattr(_batch_size, "available_memory", lambda _: None)
    assert choose_batch_size(extractor, TRANSFORM, ["a.png"], CPU) == MAX_BATCH_SIZE


def test_free_memory_of_this_machine_is_plausible() -> None:
    free = available_memory(CPU)
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo: the free memory is not known here")
    assert free is not None
    assert 1 << 20 < free < 1 << 45


def test_model_takes_the_estimate_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(_batch_size, "available_memory", lambda _: 10**6)
    models = [make_model(batch_size=batch_size) for batch_size in (None, 5)]
    for model in models:
        model.extractor.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
        model.fit(images_of(9), progress=False)
    need = bytes_per_pixel(models[1].extractor, CPU)
    assert need is not None
    assert 10**6 / 4 / need / 32**2 == pytest.approx(4.69, abs=0.02)
    assert seen[:-1] == [1, 4, 4, 1, 5, 4]  # the first is the probe, as is the last
    assert models[0].settings["batch_size"] is None
