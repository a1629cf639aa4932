"""What a PatchCore model file holds beside the memory bank, and how its backbone is found again."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .features import FeatureExtractor
from .memory_bank import MemoryBank, read_tensors

_RECORD_KEY = "model"
_BACKBONE_PREFIX = "backbone."


@dataclass(frozen=True)
class BackboneRecord:
    """Which backbone a model was fitted with.

    Attributes:
        name: torchvision name, or the class name of a custom module.
        weights: torchvision weights name or state-dict path; None for random weights and custom modules.
        digest: of the weights that the layers use.
        custom: a module of the user's own.
        included: whether the file holds its weights.
    """

    name: str
    weights: str | None
    digest: str
    custom: bool
    included: bool

    def described(self) -> str:
        """Name and weights for a sentence."""
        if self.custom:
            return f"a custom {self.name}"
        return f"{self.name} with {'random weights' if self.weights is None else f'weights {self.weights!r}'}"

    def source(
        self, path: str | os.PathLike[str], backbone: nn.Module | None, weights: str | os.PathLike[str] | None
    ) -> tuple[str | nn.Module, str | os.PathLike[str] | None]:
        """The arguments ``backbone`` and ``weights`` that make the extractor again, out of the file's record and what load was given.

        Raises:
            TypeError: ``backbone`` is no module.
            ValueError: neither the file nor the arguments have the weights.
        """
        name = os.fspath(path)
        if backbone is not None:
            if not isinstance(backbone, nn.Module):
                raise TypeError(f"PatchCore.load: expected backbone to be a torch.nn.Module, got {type(backbone).__name__}.")
            return backbone, "DEFAULT" if weights is None else weights
        if self.custom:
            raise ValueError(
                f"PatchCore.load: expected backbone to be the module that {name!r} was fitted with ({self.described()}), got none; pass backbone=."
            )
        if self.included:
            return self.name, None
        found = self.weights if weights is None else weights
        if found is None:
            raise ValueError(
                f"PatchCore.load: expected {name!r} to have a backbone that can be made again, got {self.described()}; save it with "
                "include_backbone=True, or pass weights=."
            )
        if weights is None and _looks_like_a_path(found) and not os.path.isfile(found):
            raise ValueError(
                f"PatchCore.load: expected the weights of {self.name} at {found!r}, where they were when {name!r} was fitted, got no such "
                "file; pass weights= with the file's path."
            )
        return self.name, found


@dataclass(frozen=True)
class ModelRecord:
    """The JSON part of a model file.

    Attributes:
        settings: keyword arguments of PatchCore, without the backbone's.
        backbone: which backbone.
        threshold: the decision threshold.
        fit: how the fit came to its threshold.
    """

    settings: dict[str, Any]
    backbone: BackboneRecord
    threshold: float
    fit: dict[str, Any]


def write_model(path: str | os.PathLike[str], bank: MemoryBank, record: ModelRecord, extractor: FeatureExtractor) -> None:
    """Writes bank and record, with the weights of the extractor if the record says that they are included."""
    tensors = {}
    if record.backbone.included:
        digest = extractor.digest()
        if digest != record.backbone.digest:
            raise ValueError(
                f"PatchCore.save: expected the backbone to be as it was in fit ({record.backbone.digest}), got other weights ({digest}); fit again."
            )
        tensors = {_BACKBONE_PREFIX + name: tensor for name, tensor in extractor.network.state_dict().items()}
    bank.save(path, {_RECORD_KEY: asdict(record)}, extra_tensors=tensors)


def read_model(path: str | os.PathLike[str]) -> tuple[MemoryBank, ModelRecord]:
    """The bank and the record of a model file; raises what MemoryBank.load raises, and ValueError for a file without a whole record."""
    bank = MemoryBank.load(path)
    name = os.fspath(path)
    stored = bank.metadata.get(_RECORD_KEY)
    if stored is None:
        raise ValueError(f"PatchCore.load: expected path to be a saved model, got {name!r}, a memory bank alone; use MemoryBank.load.")
    try:
        record = ModelRecord(**{**stored, "backbone": BackboneRecord(**stored["backbone"])})
        whole = isinstance(record.settings, Mapping) and isinstance(record.fit, Mapping) and math.isfinite(record.threshold)
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise ValueError(f"PatchCore.load: expected path to be a saved model, got {name!r}, whose settings are damaged.")
    return bank, record


def restore_backbone(path: str | os.PathLike[str], record: BackboneRecord, extractor: FeatureExtractor) -> None:
    """Copies included weights into the extractor and checks that its backbone is the one of the fit.

    Raises:
        ValueError: weights that do not fit into the backbone, or another digest.
    """
    name = os.fspath(path)
    if record.included:
        try:
            extractor.network.load_state_dict(read_tensors(path, _BACKBONE_PREFIX), strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"PatchCore.load: expected a backbone like the one in {name!r} ({record.described()}), got one whose weights differ in "
                f"name or shape ({reason})."
            ) from error
        extractor.weights_name = record.weights
    digest = extractor.digest()
    if digest != record.digest:
        raise ValueError(
            f"PatchCore.load: expected the backbone of {name!r} ({record.described()}) to have digest {record.digest}, got {digest}: the "
            "model was made with another backbone. Pass the one it was fitted with (backbone= or weights=), or fit again."
        )


@contextlib.contextmanager
def no_warning_about_random_weights(included: bool) -> Iterator[None]:
    """While a network is made whose weights are read from the model file right afterwards, a warning about random weights is wrong."""
    log = logging.getLogger(FeatureExtractor.__module__)

    def other_records(record: logging.LogRecord) -> bool:
        return "random weights" not in record.getMessage()

    if included:
        log.addFilter(other_records)
    try:
        yield
    finally:
        log.removeFilter(other_records)


def _looks_like_a_path(weights: str | os.PathLike[str]) -> bool:
    # Names of torchvision weights are words in capitals: IMAGENET1K_V1.
    return os.path.basename(weights) != os.fspath(weights) or not os.fspath(weights).isupper()
