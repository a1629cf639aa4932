"""Shared data and settings of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_features(kind: str, rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Feature rows of a named kind, rounded to ``dtype``."""
    noise = torch.randn(rows, dim, generator=_generator(seed))
    kinds: dict[str, Callable[[], Tensor]] = {
        "random": lambda: noise,
        "tied": lambda: torch.randint(0, 3, (rows, dim), generator=_generator(seed)).float(),
        "duplicate": lambda: noise[torch.arange(rows) % max(1, rows // 4)],
        "all-equal": lambda: torch.full((rows, dim), 0.5),
        "offset": lambda: noise + 1e4,
    }
    return kinds[kind]().to(dtype)


FEATURE_KINDS = ("random", "tied", "duplicate", "all-equal", "offset")


def _devices() -> list[str]:
    """What the ops are tested on: the CPU, and a GPU where the kernels run on it. PATCHCORE_EXT_TEST_DEVICE names one of them, which must be there."""
    from patchcore_ext import build_info

    devices = build_info()["cuda_devices"]
    usable = ["cuda"] if devices and devices[0]["problem"] is None else []
    wish = os.environ.get("PATCHCORE_EXT_TEST_DEVICE")
    if wish is None:
        return ["cpu", *usable]
    if wish not in ("cpu", *usable):
        problem = devices[0]["problem"] if devices else build_info()["cuda_problem"] or build_info()["cuda_unavailable"]
        raise pytest.UsageError(f"expected PATCHCORE_EXT_TEST_DEVICE to be cpu, or cuda where the kernels run, got {wish!r}: {problem}")
    return [wish]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``device`` run on each."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices())


@pytest.fixture(autouse=True)
def _restore_torch_settings() -> Iterator[None]:
    """No test leaves a thread count, default dtype or default device behind."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def magnetic_tiles() -> Path:
    """The magnetic-tile images in MVTec layout, named by PATCHCORE_EXT_DATA; skips when they are not there."""
    folder = os.environ.get("PATCHCORE_EXT_DATA")
    if not folder or not (Path(folder) / "mtd").is_dir():
        pytest.skip("PATCHCORE_EXT_DATA does not name a folder with mtd/: the magnetic-tile tests did not run")
    return Path(folder) / "mtd"


@pytest.fixture(scope="session")
def resnet18_weights() -> Path:
    """A state dict of torchvision's ResNet18, named by PATCHCORE_EXT_RESNET18; skips when it is not there."""
    path = os.environ.get("PATCHCORE_EXT_RESNET18")
    if not path or not Path(path).is_file():
        pytest.skip("PATCHCORE_EXT_RESNET18 does not name a file: the tests on real ImageNet weights did not run")
    return Path(path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
