"""A stand-in for anomalib with its module tree and names, for tests where it is not installed: same seams, none of its code."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

COMPONENTS = "anomalib.models.components"
SAMPLER = f"{COMPONENTS}.sampling.k_center_greedy"
PATCHCORE = "anomalib.models.image.patchcore.torch_model"
ANOMALY_DINO = "anomalib.models.image.anomaly_dino.torch_model"


class SparseRandomProjection:
    """Projects to eight dimensions."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def fit(self, embedding: Tensor) -> SparseRandomProjection:
        self.matrix = torch.randint(-1, 2, (8, embedding.shape[1])).float()
        return self

    def transform(self, embedding: Tensor) -> Tensor:
        return embedding @ self.matrix.T.to(embedding.dtype)


class StockSampler:
    """What is replaced."""


class StockModel(nn.Module):
    """A memory bank and a search in it that tells how often it was used."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.register_buffer("memory_bank", torch.empty(0))
        self.num_neighbors = 9

    def nearest_neighbors(self, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        distances, indices = torch.cdist(embedding, self.memory_bank).topk(n_neighbors, largest=False)
        return (distances[:, 0], indices[:, 0]) if n_neighbors == 1 else (distances, indices)


def install(monkeypatch: Any) -> None:
    """Puts the modules into sys.modules until the test ends."""
    tree = ["anomalib", "anomalib.models", COMPONENTS, f"{COMPONENTS}.sampling", SAMPLER, f"{COMPONENTS}.dimensionality_reduction"]
    tree += ["anomalib.models.image", "anomalib.models.image.patchcore", PATCHCORE, "anomalib.models.image.anomaly_dino", ANOMALY_DINO]
    for name in tree:
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sampler: Any = type("KCenterGreedy", (StockSampler,), {})
    model: Any = type("PatchcoreModel", (StockModel,), {"nearest_neighbors": StockModel.nearest_neighbors})
    for name in (SAMPLER, f"{COMPONENTS}.sampling", COMPONENTS, PATCHCORE, ANOMALY_DINO):
        sys.modules[name].KCenterGreedy = sampler  # type: ignore[attr-defined]
    sys.modules[PATCHCORE].PatchcoreModel = model  # type: ignore[attr-defined]
    sys.modules[f"{COMPONENTS}.dimensionality_reduction"].SparseRandomProjection = SparseRandomProjection  # type: ignore[attr-defined]
