"""How many images go through the network at once: as many as fit into the memory that is free, at most 16."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from .features import FeatureExtractor
from .images import ImageTransform

MAX_BATCH_SIZE = 16
"""More gains nothing on a CPU and little on a GPU; and with enough memory the batches, and so the last bits of features, are the same everywhere."""

_SHARE = 0.25  # of the free memory: features, bank and the other processes want some, too
_PROBE_SIDE = 64  # pixels
# Input and output of a layer, what a skip connection holds, and what the convolution needs for itself.
_MAPS_AT_ONCE = 4
# The pooled maps and the merged features.
_FEATURE_COPIES = 2


def choose_batch_size(extractor: FeatureExtractor, transform: ImageTransform, source: Any, device: torch.device) -> int:
    """The batch size for a source: free memory * 1/4 / (pixels of the largest network input * bytes a pixel), between 1 and 16.

    Args:
        extractor: on ``device``.
        transform: decides the network's input size. Where that depends on the image, the headers of the files are looked at; images of
            Datasets and loaders are not known beforehand, and the batch size is 16.
        source: what resolve_source gave.
        device: where the network runs.

    Returns:
        A power of two from 1 to 16; 16 as well where the free memory or the network's need cannot be found out.
    """
    pixels = _largest_input(transform, source)
    free = available_memory(device)
    if pixels is None or free is None:
        return MAX_BATCH_SIZE
    need = bytes_per_pixel(extractor, device)
    if need is None:
        return MAX_BATCH_SIZE
    fitting = int(_SHARE * free / (need * pixels))
    return min(MAX_BATCH_SIZE, 1 << max(0, fitting.bit_length() - 1))


def bytes_per_pixel(extractor: FeatureExtractor, device: torch.device) -> float | None:
    """Bytes that a forward pass holds at its peak for each pixel of its input, estimated from the shapes in a pass of a 64 x 64 image.

    Four times the largest output of a module, and twice the patch features. None for a network that refuses an image of this size.
    """
    largest = 0

    def measure(_module: nn.Module, _arguments: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(measure) for module in extractor.network.modules()]
    try:
        with torch.inference_mode():
            features = extractor(torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE, device=device)).features
    except Exception:  # a module of the user's own may raise anything on a size that is not its own
        return None
    finally:
        for hook in hooks:
            hook.remove()
    held = _MAPS_AT_ONCE * largest + _FEATURE_COPIES * features.numel() * features.element_size()
    return float(held) / _PROBE_SIDE**2


def available_memory(device: torch.device) -> int | None:
    """Free bytes of the device; on the CPU what Linux calls available, or, if less, what the control group leaves. None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [limit for limit in (_meminfo_available(), _cgroup_available()) if limit is not None]
    return min(limits, default=None)


def _meminfo_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _cgroup_available() -> int | None:
    try:
        limit, used = (_number_in(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
    return max(0, limit - used)


def _number_in(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _largest_input(transform: ImageTransform, source: Any) -> int | None:
    """Pixels of the largest network input; None where it is not known."""
    if isinstance(source, Tensor) and source.ndim == 4:
        sizes: Sequence[tuple[int, int]] = [(int(source.shape[2]), int(source.shape[3]))]
    elif isinstance(transform.resize, tuple):
        sizes = [transform.resize]
    elif isinstance(source, list) and all(isinstance(path, str) for path in source):
        sizes = [size for size in map(_size_in_header, source) if size is not None]
    else:
        return None
    windows = []
    for height, width in sizes:
        try:
            windows.append(transform.window(height, width).size)
        except ValueError:  # a crop that does not fit; reading the image tells
            continue
    return max((height * width for height, width in windows), default=None)


def _size_in_header(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        with PIL.Image.open(path) as image:
            return image.height, image.width
    except Exception:  # whatever is wrong with the file, reading it tells
        return None
