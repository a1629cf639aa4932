"""Batches of images from every kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import PLAIN, random_image, write
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from patchcore_ext.data import Batch, ImageDataset, load_batches
from patchcore_ext.images import ImageTransform

# --- datasets and batches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Seven images; the sizes change after 0, 1, 2 in a row of (3, 1, 3)."""
    for index, (height, width) in enumerate([(8, 12)] * 3 + [(12, 8)] + [(8, 12)] * 3):
        write(tmp_path / "mixed" / f"{index}.png", random_image(height, width, index))
    return tmp_path / "mixed"


def check_mixed(batches: list[Batch], folder: Path, sizes: list[int]) -> None:
    assert [len(batch.images) for batch in batches] == sizes
    assert [path for batch in batches for path in batch.paths] == [str(folder / f"{index}.png") for index in range(7)]
    images = [image for batch in batches for image in batch.images]
    shapes = [size for batch in batches for size in batch.sizes]
    for index, (image, size) in enumerate(zip(images, shapes, strict=True)):
        assert size == ((12, 8) if index == 3 else (8, 12))
        assert torch.equal(image, PLAIN(random_image(*size, index)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_mixed_sizes_keep_the_order(mixed_folder: Path, num_workers: int) -> None:
    check_mixed(list(load_batches(mixed_folder, PLAIN, 2, num_workers)), mixed_folder, [2, 1, 1, 2, 1])
    check_mixed(list(load_batches(mixed_folder, PLAIN, 16, num_workers)), mixed_folder, [3, 1, 3])


def test_batches_of_one_transformed_size_are_full(mixed_folder: Path) -> None:
    batches = list(load_batches(mixed_folder, ImageTransform((10, 10)), 4))
    assert [batch.images.shape for batch in batches] == [(4, 3, 10, 10), (3, 3, 10, 10)]
    assert batches[0].sizes[3] == (12, 8)


def test_batches_of_paths_a_file_and_an_image_dataset(mixed_folder: Path) -> None:
    paths = [mixed_folder / "5.png", str(mixed_folder / "4.png")]
    (batch,) = load_batches(paths, PLAIN)
    assert batch.paths == [str(path) for path in paths]
    assert torch.equal(batch.images[0], PLAIN(random_image(8, 12, 5)))
    (single,) = load_batches(paths[0], PLAIN)
    assert torch.equal(single.images, batch.images[:1])
    (again,) = load_batches(ImageDataset(paths, ImageTransform()), PLAIN)  # its own transform is not the model's
    assert torch.equal(again.images, batch.images)


def test_image_dataset_items(mixed_folder: Path) -> None:
    dataset = ImageDataset(mixed_folder, PLAIN)
    assert len(dataset) == 7
    sample = dataset[3]
    assert (sample.index, sample.path, sample.size) == (3, str(mixed_folder / "3.png"), (12, 8))
    assert torch.equal(sample.image, PLAIN(random_image(12, 8, 3)))


class Images(Dataset[Any]):
    """A user's dataset of four images in the form `wrap` gives them."""

    def __init__(self, wrap: Any) -> None:
        self.wrap = wrap

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.wrap(random_image(6, 7, index))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_float_tensor(image: Image.Image) -> Tensor:
    return as_tensor(image).float() / 255


def labelled(image: Image.Image) -> tuple[Image.Image, int]:
    return image, 1


def labelled_tensor(image: Image.Image) -> list[Any]:
    return [as_tensor(image), "good", torch.zeros(6, 7)]


def check_images(batches: list[Batch], sizes: list[int]) -> None:
    assert [len(batch.images) for batch in batches] == sizes
    assert [path for batch in batches for path in batch.paths] == [f"image {index}" for index in range(4)]
    assert [size for batch in batches for size in batch.sizes] == [(6, 7)] * 4
    expected = torch.stack([PLAIN(random_image(6, 7, index)) for index in range(4)])
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), expected)


@pytest.mark.parametrize("wrap", [Image.Image.copy, as_tensor, as_float_tensor, labelled, labelled_tensor])
def test_batches_of_a_dataset(wrap: Any) -> None:
    check_images(list(load_batches(Images(wrap), PLAIN, 3)), [3, 1])
    check_images(list(load_batches([Images(wrap)[index] for index in range(4)], PLAIN, 3)), [3, 1])


def test_batches_of_a_dataset_with_workers() -> None:
    check_images(list(load_batches(Images(labelled), PLAIN, 3, num_workers=2)), [3, 1])


def test_batches_of_an_iterable_dataset() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (random_image(6, 7, index) for index in range(4))

    check_images(list(load_batches(Stream(), PLAIN, 3)), [3, 1])


@pytest.mark.parametrize("wrap", [as_tensor, as_float_tensor, labelled_tensor])
def test_batches_of_a_loader(wrap: Any) -> None:
    check_images(list(load_batches(DataLoader(Images(wrap), batch_size=3), PLAIN, 2)), [3, 1])  # the loader decides
    check_images(list(load_batches(DataLoader(Images(wrap), batch_size=None), PLAIN)), [1, 1, 1, 1])


@pytest.mark.parametrize("wrap", [Image.Image.copy, labelled, as_tensor])
def test_batches_of_a_loader_that_does_not_stack(wrap: Any) -> None:
    check_images(list(load_batches(DataLoader(Images(wrap), batch_size=3, collate_fn=list), PLAIN)), [3, 1])


def test_batches_of_a_tensor() -> None:
    images = torch.stack([as_tensor(random_image(6, 7, index)) for index in range(4)])
    check_images(list(load_batches(images, PLAIN, 3)), [3, 1])
    check_images(list(load_batches(images.double() / 255, PLAIN, 4)), [4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_name_an_unreadable_file_in_one_line(mixed_folder: Path, num_workers: int) -> None:
    (mixed_folder / "1.png").write_bytes(b"broken")
    batches = load_batches(mixed_folder, PLAIN, 4, num_workers)
    assert next(batches).paths == [str(mixed_folder / "0.png")]  # what came before it is not lost
    with pytest.raises(ValueError, match=r"^load_image: expected '.*1\.png' to be a readable image.*$") as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_files_are_told_in_order_and_left_out(mixed_folder: Path, num_workers: int, batch_size: int) -> None:
    broken = [str(mixed_folder / "1.png"), str(mixed_folder / "3.png")]
    Path(broken[0]).write_bytes(b"broken")
    Path(broken[1]).write_bytes(Path(broken[1]).read_bytes()[:-60])
    told: list[tuple[str, ValueError]] = []
    batches = load_batches(mixed_folder, PLAIN, batch_size, num_workers, on_unreadable=lambda path, error: told.append((path, error)))
    read = [path for batch in batches for path in batch.paths]
    assert [path for path, _ in told] == broken
    assert all(path in str(error) for path, error in told)
    assert read == [path for path in ImageDataset(mixed_folder, PLAIN).paths if path not in broken]


def test_batches_name_the_image_that_a_crop_does_not_fit(mixed_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"crop to fit.*got 8 x 12.*The image is '.*3\.png'"):
        list(load_batches(mixed_folder, ImageTransform(None, (8, 12))))
    with pytest.raises(ValueError, match=r"crop to fit.*The image is 'image 0' of the dataset"):
        list(load_batches(Images(labelled), ImageTransform(None, 9)))


def test_batches_refuse_bad_sources_at_once(tmp_path: Path) -> None:
    for source, error, message in (
        (tmp_path / "missing", ValueError, "which does not exist"),
        (3, TypeError, "got int"),
        (torch.zeros(3, 8, 8), ValueError, r"tensor source to be of shape \[B, 3, H, W\], got \[3, 8, 8\]"),
    ):
        with pytest.raises(error, match=message):
            load_batches(source, PLAIN)
    for options, message in (
        ({"batch_size": 0}, "batch_size to be an int of at least 1"),
        ({"num_workers": -1}, "num_workers to be an int"),
    ):
        with pytest.raises(ValueError, match=message):
            load_batches(torch.zeros(1, 3, 8, 8), PLAIN, **options)


def test_batches_refuse_items_that_are_no_images() -> None:
    with pytest.raises(TypeError, match=r"item 0 of the dataset to be, or to start with, .*got dict"):
        list(load_batches(Images(lambda image: {"image": image}), PLAIN))
    with pytest.raises(TypeError, match=r"got a tensor of shape \[6, 7\]"):
        list(load_batches(Images(lambda image: as_tensor(image)[0]), PLAIN))
    with pytest.raises(TypeError, match=r"item 0 of the dataset .*got dict"):
        list(load_batches(DataLoader(Images(lambda image: {"image": as_tensor(image)}), batch_size=2), PLAIN))
    normalised = DataLoader(Images(lambda image: as_float_tensor(image) * 4 - 2), batch_size=2, collate_fn=default_collate)
    with pytest.raises(ValueError, match=r"Leave the normalisation to the transform"):
        list(load_batches(normalised, PLAIN))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_do_not_touch_or_need_torch_defaults(mixed_folder: Path, num_workers: int) -> None:
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        check = list(load_batches(mixed_folder, PLAIN, 16, num_workers))
        restored = ImageTransform((4, 4)).map_to_image(torch.zeros(4, 4, device="cpu"), 8, 8)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    check_mixed(check, mixed_folder, [3, 1, 3])
    assert restored.dtype == torch.float32
    assert restored.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)
