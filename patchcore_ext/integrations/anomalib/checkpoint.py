"""Memory banks out of anomalib's files, read without running anything that a file says."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...memory_bank import MemoryBank

_OP = "memory_bank_from_checkpoint"
# Whose classes anomalib's files name. None of them is imported; a file that names anything else is not one of anomalib's.
_PACKAGES = frozenset(
    {"anomalib", "collections", "enum", "kornia", "lightning", "lightning_fabric", "numpy", "omegaconf", "patchcore_ext", "pathlib", "pytorch_lightning"}
    | {"timm", "torch", "torchmetrics", "torchvision"}
)
_BUILTINS = frozenset({"builtins.getattr", "builtins.set", "builtins.frozenset", "builtins.slice", "builtins.object"})
_SETTINGS = ("backbone", "layers", "num_neighbors", "coreset_sampling_ratio", "precision")


class _Inert:
    """Stands for every class and function that a file names: takes whatever comes, does nothing, and keeps its state."""

    values: tuple[Any, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.values = values


def memory_bank_from_checkpoint(path: str | os.PathLike[str]) -> MemoryBank:
    """The memory bank of a fitted anomalib model.

    Reads checkpoints of anomalib's Engine (``.ckpt``), state dicts, and exports by ``to_torch`` (``.pt``, a pickle of the whole model). Of the file's pickle
    only tensors and plain values are made, by ``torch.load(weights_only=True)``; for classes and functions that it names an object stands in that does
    nothing, and anomalib need not be installed. A file that names anything that is not found in anomalib's files is refused.

    Args:
        path: The file.

    Returns:
        The bank, rows in the order and dtype of the file. ``metadata["anomalib"]`` holds what the file tells of backbone, layers, num_neighbors,
        coreset_sampling_ratio and precision. anomalib does not keep from which images rows came: there is no provenance. To score with it, features must be
        anomalib's: timm's backbone, average pooling, maps side by side.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not a file of torch.save, one that names foreign code, one without a memory bank or with several, or of a model that was not fitted.

    Example:
        bank = memory_bank_from_checkpoint("results/Patchcore/bottle/latest/weights/lightning/model.ckpt")
        PatchScorer(bank, num_neighbors=9, score="anomalib")
    """
    name = os.fspath(path)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{_OP}: expected path to be an existing file, got {name!r}.")
    content = _read(name)
    banks = {key: tensor for key, tensor in _tensors(content) if key.split(".")[-1] == "memory_bank"}
    if len(banks) != 1:
        raise ValueError(f"{_OP}: expected {name!r} to hold one memory bank, got {len(banks)}: {sorted(banks) or 'no entry is named memory_bank'}.")
    ((key, bank),) = banks.items()
    if bank.ndim != 2 or bank.shape[0] == 0:
        raise ValueError(f"{_OP}: expected {key} to be [rows, dim], got shape {list(bank.shape)}: the model was saved before it was fitted.")
    return MemoryBank(bank.detach().clone(), metadata={"anomalib": _settings(content)})  # a copy: the file's other tensors need not stay in memory


def _read(name: str) -> Any:
    """The file's content, with inert objects where it names classes or functions."""
    if not zipfile.is_zipfile(name):
        raise ValueError(f"{_OP}: expected {name!r} to be a file of torch.save (a zip archive), got another kind of file, or one that is cut off.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(name)
        foreign = sorted(entry for entry in names if entry.partition(".")[0] not in _PACKAGES and entry not in _BUILTINS)
        stand_ins: list[Any] = [(dict if entry.endswith(".AttributeDict") else _Inert, entry) for entry in names]  # items are set on plain dicts only
        with torch.serialization.safe_globals([] if foreign else stand_ins):
            content = None if foreign else torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make torch's reader fail in any way
        raise ValueError(f"{_OP}: expected {name!r} to be a whole file of anomalib, got one that cannot be read safely: {_reason(error)}.") from error
    if foreign:
        raise ValueError(f"{_OP}: expected {name!r} to name only what anomalib's files name, got {', '.join(foreign[:5])}; nothing of it was run.")
    return content


def _reason(error: Exception) -> str:
    """Torch's reason, without its advice to run the file's code."""
    text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in a checkpoint, a state dict, or an exported model, whose modules are inert objects."""
    if not isinstance(content, Mapping):
        return
    state = content.get("state_dict", content)
    if isinstance(state, Mapping):
        yield from ((str(key), value) for key, value in state.items() if isinstance(value, Tensor))
    if isinstance(content.get("model"), _Inert):
        yield from _buffers("model", content["model"])


def _buffers(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    held = getattr(module, "__dict__", {})
    yield from ((f"{prefix}.{key}", value) for key, value in _items(held.get("_buffers")) if isinstance(value, Tensor))
    for key, child in _items(held.get("_modules")):
        yield from _buffers(f"{prefix}.{key}", child)


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _settings(content: Any) -> dict[str, Any]:
    """What is told of the model, as plain JSON values."""
    told = content.get("hyper_parameters", getattr(content.get("model"), "_hparams", None))
    return {key: _plain(value) for key, value in _items(told) if key in _SETTINGS}


def _plain(value: Any) -> Any:
    if isinstance(value, _Inert):  # an enum: its value
        return _plain(value.values[0]) if value.values else None
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
