"""A fitted PatchCore as one ONNX graph: backbone, patch features, search of the bank, image score and anomaly map; nothing of this package is needed to run it.

The exported formulas are plain float32 ones, so the graph is *near*, not exact (docs/exactness.md does not hold for it): features, distances, scores and maps
differ from ``PatchCore.predict`` by about 1e-6 of their size, and the neighbour of a patch may be another one where two rows are that close. What keeps it so
near: features are centred on the bank's mean before |a - b|^2 is expanded, the expansion only proposes the nearest few rows, and of these the distances are
sums of squared differences; N_b(m*) of Eq. (7) comes from a table made by the exact search when exporting.

Needs ``pip install "patchcore-ext[onnx]"`` (onnx and onnxscript; onnxruntime to run the file).
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..features import FeatureExtractor
from ..memory_bank import atomic_write, check_output_path
from ..patchcore import PatchCore
from ..scoring import _axis_operator

__all__ = ["ExportableModel", "export_onnx"]

_CANDIDATES = 8  # rows that the expanded square proposes for each patch
_MOST_BYTES = 1 << 30  # of weights and bank: a file of protobuf holds 2 GiB


class ExportableModel(nn.Module):
    """A fitted model in plain torch operations with fixed image size, ready for torch.export and torch.onnx.

    Args:
        model: A fitted ``PatchCore`` with ``precision="float32"``.
        size: (height, width) of the network's input; None: what the model's resize and crop say.

    Raises:
        ValueError: The model is not fitted, its backbone does not run in float32, or the size is left open (``resize`` is an int or None and there is no crop).
    """

    mean: Tensor
    std: Tensor
    center: Tensor
    bank: Tensor
    squared_norms: Tensor
    neighborhoods: Tensor
    vertical: Tensor
    horizontal: Tensor
    threshold: Tensor

    def __init__(self, model: PatchCore, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        op = "export_onnx"
        extractor = model.extractor
        weight = next((parameter for parameter in extractor.network.parameters() if parameter.is_floating_point()), torch.zeros(()))
        if extractor.precision != "float32" or weight.dtype != torch.float32:
            got = extractor.precision if weight.dtype == torch.float32 else str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: expected model to have a float32 backbone, got {got}; fit one with precision='float32'.")
        self.size = _input_size(model) if size is None else (int(size[0]), int(size[1]))
        self.score = model.settings["score"]
        self.features = _PatchFeatures(extractor, self.size, weight.device)
        bank = model.bank.features.to("cpu")  # [M, D]
        center = bank.double().mean(0).float()
        rows = bank.float() - center
        self.register_buffer("mean", torch.tensor(model.transform.mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.transform.std, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("center", center)
        self.register_buffer("bank", rows)
        self.register_buffer("squared_norms", rows.double().square().sum(1).float())
        self.register_buffer("neighborhoods", _neighborhoods(bank, model.settings["num_neighbors"], self.score))
        grid = self.features.grid
        self.register_buffer("vertical", _axis_operator(grid[0], self.size[0], 4.0, False).clone())
        self.register_buffer("horizontal", _axis_operator(grid[1], self.size[1], 4.0, False).T.contiguous())
        self.register_buffer("threshold", torch.tensor(model.threshold, dtype=torch.float32))
        self.eval()
        self.to(weight.device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores images.

        Args:
            images: float32 ``[B, 3, H, W]``, RGB in 0..1, resized and cropped to ``size``; not normalised.

        Returns:
            Image scores ``[B]``, anomaly maps ``[B, H, W]`` and bool ``[B]``, whether the score is above the model's threshold.
        """
        patches = self.features((images - self.mean) / self.std) - self.center  # [B, P, D]
        squared, nearest = self._nearest(patches)  # [B, P]
        scores = self._image_scores(patches, squared, nearest)
        values = squared if self.score == "amazon" else squared.sqrt()
        maps = values.reshape(-1, *self.features.grid)  # [B, rows, columns]
        return scores, self.vertical @ maps @ self.horizontal, scores > self.threshold

    def _nearest(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to the nearest bank row, and that row, ``[B, P]`` each."""
        queries = patches.flatten(0, 1)  # [Q, D]
        proposals = (self.squared_norms - 2 * (queries @ self.bank.T)).topk(min(_CANDIDATES, self.bank.shape[0]), largest=False).indices  # [Q, c]
        squared = (queries[:, None] - self.bank[proposals]).square().sum(2)  # [Q, c]
        smallest = squared.amin(1, keepdim=True)
        lowest = torch.where(squared == smallest, proposals, self.bank.shape[0]).amin(1)  # ties to the lowest row
        return smallest.reshape(patches.shape[:2]), lowest.reshape(patches.shape[:2])

    def _image_scores(self, patches: Tensor, squared: Tensor, nearest: Tensor) -> Tensor:
        largest, patch = squared.max(1, keepdim=True)  # [B, 1], Eq. (6)
        if self.score == "amazon":
            return largest[:, 0]
        largest = largest.sqrt()
        if self.neighborhoods.shape[1] == 1:
            return largest[:, 0]
        worst = patches.gather(1, patch[..., None].expand(-1, -1, patches.shape[2]))  # [B, 1, D]
        support = self.bank[self.neighborhoods[nearest.gather(1, patch)[:, 0]]]  # [B, b, D]
        weights = (worst - support).square().sum(2).sqrt().softmax(1)  # [B, b]
        return (1 - weights[:, 0]) * largest[:, 0]  # Eq. (7)


class _PatchFeatures(nn.Module):
    """What FeatureExtractor computes, without in-place writes and loops over the batch."""

    def __init__(self, extractor: FeatureExtractor, size: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.network = extractor.network
        self.layers, self.nhwc = extractor.layers, extractor._nhwc_layers
        self.patch_size, self.stride = extractor.patch_size, extractor.stride
        self.in_paper = extractor.aggregation == "paper"
        self.feature_dim = extractor.feature_dim
        with torch.inference_mode():
            example = torch.zeros(1, 3, *size, device=device)
            self.grid = extractor(example).grid
            maps = self._maps(example)
        self.finest = max((tuple(feature_map.shape[2:]) for feature_map in maps), key=lambda shape: shape[0] * shape[1])
        if self.in_paper:
            for index, feature_map in enumerate(maps):
                self.register_buffer(f"pool{index}", _pooling_kernel(feature_map.shape[1], self.patch_size, self.feature_dim))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, P, D]``."""
        parts = []
        for index, feature_map in enumerate(self._maps(images)):
            if self.in_paper:
                pooled = F.conv2d(feature_map, self.get_buffer(f"pool{index}"), padding=self.patch_size // 2)
            else:
                pooled = F.avg_pool2d(feature_map, self.patch_size, 1, self.patch_size // 2, count_include_pad=True)
            if tuple(pooled.shape[2:]) != self.finest:
                pooled = F.interpolate(pooled, size=self.finest, mode="bilinear", align_corners=False)
            parts.append(pooled[:, :, :: self.stride, :: self.stride].permute(0, 2, 3, 1).flatten(1, 2))  # [B, P, D of the layer]
        merged = torch.cat(parts, 2)
        # Adaptive pooling of L * d values to d: the mean of L neighbours.
        return merged.reshape(*merged.shape[:2], self.feature_dim, len(parts)).mean(3) if self.in_paper else merged

    def _maps(self, images: Tensor) -> list[Tensor]:
        outputs = self.network.forward(images)  # not __call__, which torch.compile may have taken over
        return [outputs[layer].permute(0, 3, 1, 2) if layer in self.nhwc else outputs[layer] for layer in self.layers]


def export_onnx(model: PatchCore, path: str | os.PathLike[str], *, size: tuple[int, int] | None = None) -> None:
    """Writes a fitted model to one ONNX file that onnxruntime runs without this package.

    Input ``images``: float32 ``[batch, 3, H, W]``, RGB in 0..1, resized and cropped as ``model.transform`` does, without its normalisation, which is in the
    graph (``ImageTransform(resize, crop, mean=(0, 0, 0), std=(1, 1, 1))`` gives such images). Outputs: ``image_scores`` ``[batch]``, ``anomaly_maps``
    ``[batch, H, W]`` in the pixels of the input, ``is_anomalous`` ``[batch]``. The metadata entry ``patchcore_ext`` is JSON with threshold, size, settings.

    Args:
        model: A fitted ``PatchCore`` with a float32 backbone.
        path: The file; written whole or not at all.
        size: (height, width) of the input where the model's settings leave it open.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: See ``ExportableModel``; or the weights and the bank take more than 1 GiB: a smaller coreset_ratio is needed.
        OSError: The file cannot be written.
        torch.onnx.OnnxExporterError: torch.export cannot trace a backbone of your own.

    Note:
        Exactness: float32, within 1e-4 of ``predict`` in the tests, usually within 1e-5; see the module. Memory when running: for the proposals
        ``4 * batch * patches * bank rows`` bytes, so feed few images at a time to large banks. aggregation="paper" pools neighbourhoods by a dense convolution,
        which may take as long as the backbone.
    """
    op = "export_onnx"
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"{op}: needs {package}, which cannot be imported ({error}); run: pip install onnx onnxscript onnxruntime") from error
    check_output_path(path)
    exportable = ExportableModel(model, size)
    held = sum(tensor.nbytes for tensor in [*exportable.parameters(), *exportable.buffers()])
    if held > _MOST_BYTES:
        raise ValueError(f"{op}: expected model to hold at most {_MOST_BYTES} bytes of weights and bank, got {held}; fit with a smaller coreset_ratio.")
    device = exportable.center.device
    examples = torch.zeros(2, 3, *exportable.size, device=device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program: Any = torch.onnx.export(
            exportable,
            (examples,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["image_scores", "anomaly_maps", "is_anomalous"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )
    about = {"threshold": model.threshold, "size": exportable.size, "settings": model.settings, "backbone": model.extractor.backbone_name}
    program.model.metadata_props["patchcore_ext"] = json.dumps(about, sort_keys=True)
    with atomic_write(path) as temporary:
        program.save(str(temporary), external_data=False)


def _input_size(model: PatchCore) -> tuple[int, int]:
    resize, crop = model.transform.resize, model.transform.crop
    sides = crop if crop is not None else resize if isinstance(resize, tuple) else None
    if sides is None:
        raise ValueError(f"export_onnx: expected size to be given for a model with resize={resize!r} and no crop, whose input has no fixed size, got None.")
    return (sides, sides) if isinstance(sides, int) else sides


def _neighborhoods(bank: Tensor, num_neighbors: int, score: str) -> Tensor:
    """N_b of each bank row, int64 ``[M, b]``: the row itself first ("anomalib": the first of the nearest, whichever it is)."""
    count = min(num_neighbors, bank.shape[0]) if score in ("paper", "anomalib") else 1
    nearest = ops.nearest_neighbors(bank, bank, count)[1]
    if score == "anomalib":
        return nearest
    own = torch.arange(bank.shape[0])[:, None]
    # The row itself to the front, the others in their order; among many duplicates it may not be found at all, and the last one goes.
    order = torch.where(nearest == own, -1, torch.arange(count)).sort(stable=True, dim=1).indices
    others = nearest.gather(1, order)
    found = (nearest == own).any(1, keepdim=True)
    return torch.where(found, others, torch.cat((own, nearest[:, :-1]), 1))


def _pooling_kernel(channels: int, patch_size: int, feature_dim: int) -> Tensor:
    """Adaptive average pooling of flattened neighbourhoods [C * p * p] to d, as the weights of a convolution, ``[d, C, p, p]``."""
    length = channels * patch_size**2
    kernel = torch.zeros(feature_dim, length)
    for i in range(feature_dim):
        first, end = i * length // feature_dim, -(-(i + 1) * length // feature_dim)
        kernel[i, first:end] = 1 / (end - first)
    return kernel.view(feature_dim, channels, patch_size, patch_size)
