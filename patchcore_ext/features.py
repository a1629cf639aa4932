"""Patch features: the feature maps of an ImageNet network, gathered into one vector per patch (Eq. (1)-(3), Roth et al. 2022)."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ._backbone import (
    BUILD_OPTIONS,
    HookedNetwork,
    checked_backbone_name,
    checked_layers,
    is_nhwc,
    plain_defaults,
    plain_keys,
    prune,
    resolve_weights,
    shortened,
)

__all__ = ["FeatureExtractor", "PatchFeatures", "pool_maps"]

logger = logging.getLogger(__name__)

AGGREGATIONS = ("concat", "paper")
PRECISIONS = ("float32", "bfloat16")
# "paper" aggregation unfolds this many bytes of neighbourhoods at a time.
_UNFOLD_BYTES = 32 << 20


class PatchFeatures(NamedTuple):
    """Patch features of a batch of images.

    Attributes:
        features: Float tensor [B, P, D], contiguous; P = rows * columns of the patch grid, row-major.
        grid: (rows, columns) of the patch grid.
    """

    features: Tensor
    grid: tuple[int, int]


class FeatureExtractor(nn.Module):
    """Patch features of images from the intermediate layers of a pretrained network.

    Each named layer's map is averaged over the p x p neighbourhood of every position (Eq. (1)-(2), Roth et al. 2022,
    arXiv:2106.08265) with zero padding, coarser maps are brought to the size of the finest one by bilinear interpolation
    (align_corners=False), and the positions with h mod stride = w mod stride = 0 are kept (Eq. (3)).

    - ``aggregation="concat"``: average over the neighbourhood per channel (the zeros of the padding count), then the layers
      concatenated in the order of ``layers``: D = sum of their channels.
    - ``aggregation="paper"``: the flattened neighbourhood [C * p * p] of each layer goes through adaptive average pooling to
      ``feature_dim``, the layers are stacked, and [L * feature_dim] is pooled to ``feature_dim`` = D.

    The part of the network behind the last layer is cut off: it is neither run, nor moved to a device, nor in `digest`.
    The module is always in eval mode, whatever `train` is told.

    Args:
        backbone: Name of a torchvision classification network, or a module of your own that maps [B, C, H, W] to anything. Your
            module is used as it is: its weights are shared, put into eval mode, and moved along with the extractor.
        layers: Names of the modules whose output maps [B, C, h, w] are taken, as in ``backbone.named_modules()``.
        weights: A torchvision weights name ("DEFAULT", "IMAGENET1K_V1", ...), the path of a local state dict (.pth read with
            ``torch.load(weights_only=True)``, or .safetensors), or None for random weights. Ignored for a module of your own.
        aggregation: "concat" or "paper".
        patch_size: p, odd.
        stride: Distance between the patches that are kept, in positions of the finest map.
        feature_dim: D of "paper"; unused by "concat".
        precision: "float32"; or "bfloat16": the network runs under autocast, which is faster where the processor has the instructions and changes the features
            by about 1% (the README has measurements). Pooling and features stay float32.
        compile: Run the network through torch.compile: the first batch of each shape takes half a minute longer, the others less; features may change in their
            last bits.

    Attributes:
        backbone_name: The torchvision name in lower case, or the class name of your module.
        weights_name: The resolved weights name ("DEFAULT" becomes the name it stands for), the path as given, or None.
        is_custom: True when the backbone is a module of your own.
        network: The pruned network: images to a dict of layer name and map.

    Raises:
        ValueError: Unknown backbone, layer, weights or option, each with what there is; a weights file that does not fit.
        TypeError: An argument of the wrong kind.
        OSError: torchvision could not download the weights.

    Note:
        A layer's map is copied the moment the layer returns it. A ReLU(inplace=True) that follows does not change it, so
        a layer's features do not depend on which other layers are asked for (torchvision's create_feature_extractor lets
        them, and drops in-place operations without users, so it is not used here). Where torch.fx cannot trace a module
        of your own, hooks take the maps and stop the network early; the features are the same, but nothing is pruned and
        `digest` covers the whole network.

    Example:
        >>> extractor = FeatureExtractor("resnet18", ("layer2", "layer3"), weights=None)
        >>> with torch.inference_mode():
        ...     features, grid = extractor(torch.zeros(1, 3, 64, 64))
        >>> features.shape, grid
        (torch.Size([1, 64, 384]), (8, 8))
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        aggregation: str = "concat",
        patch_size: int = 3,
        stride: int = 1,
        feature_dim: int = 1024,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_options(aggregation, patch_size, stride, feature_dim)
        if precision not in PRECISIONS:
            raise ValueError(f"FeatureExtractor: expected precision to be one of {PRECISIONS}, got {precision!r}.")
        self.precision = precision
        self.layers = checked_layers(layers)
        self.aggregation = aggregation
        self.patch_size = patch_size
        self.stride = stride
        self.feature_dim = feature_dim
        self.weights_name: str | None = None
        self.is_custom = isinstance(backbone, nn.Module)
        if isinstance(backbone, nn.Module):
            if weights not in ("DEFAULT", None):
                raise ValueError(
                    f"FeatureExtractor: expected weights to be left alone when backbone is a module, got {weights!r}. "
                    "Load them into the module before passing it."
                )
            self.backbone_name = type(backbone).__name__
            module = backbone
            self.network = prune(module, self.layers)
        elif isinstance(backbone, str):
            self.backbone_name = checked_backbone_name(backbone)
            self.weights_name, load_state = resolve_weights(self.backbone_name, weights)
            with plain_defaults(keep_random_state=load_state is not None):
                module = torchvision.models.get_model(self.backbone_name, weights=None, **BUILD_OPTIONS.get(self.backbone_name, {})).requires_grad_(False)
                self.network = prune(module, self.layers)
                if load_state is None:
                    logger.warning("FeatureExtractor: %s has random weights (weights=None).", self.backbone_name)
                else:
                    self.load_backbone_state(load_state(), source=f"weights {self.weights_name!r}")
        else:
            raise TypeError(f"FeatureExtractor: expected backbone to be a name or a torch.nn.Module, got {type(backbone).__name__}.")
        self._nhwc_layers = frozenset(layer for layer in self.layers if is_nhwc(module, layer))
        # Convolutions are faster in this layout; the features are the same up to their last bits.
        self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()
        self.train(False)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Keep eval mode whatever `mode` says: features must not depend on the batch."""
        return super().train(False)

    def forward(self, images: Tensor) -> PatchFeatures:
        """Return the patch features of a batch of normalised images.

        Args:
            images: Float tensor [B, 3, H, W], normalised as the network wants it; brought to the network's device and dtype.

        Returns:
            PatchFeatures with features [B, P, D], float32 (the network's dtype where that is float16 or bfloat16).

        Raises:
            ValueError: Images of another shape or dtype, or a layer that does not give a map [B, C, h, w].

        Note:
            Gradients are recorded unless the caller turns them off: wrap the call in ``torch.inference_mode()``.
        """
        return pool_maps(list(self.maps(images).values()), self.aggregation, self.patch_size, self.stride, self.feature_dim)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of the layers as the network gives them, for whoever keeps them: `pool_maps` makes patch features of them.

        Args:
            images: As for `forward`.

        Returns:
            For each layer, in the order of `layers`, its map [B, C, h, w]. A layer's map does not depend on the other layers asked for, nor on the options of
            the neighbourhood.

        Raises:
            ValueError: As for `forward`.
        """
        if images.ndim != 4 or not images.is_floating_point() or (images.shape[1] != 3 and not self.is_custom):
            raise ValueError(
                "FeatureExtractor: expected images to be a float tensor [B, 3, H, W], "
                f"got {images.dtype} {list(images.shape)}. ImageTransform makes one from an image or a batch."
            )
        weight = next((parameter for parameter in self.network.parameters() if parameter.is_floating_point()), images)
        images = images.to(device=weight.device, dtype=weight.dtype, memory_format=torch.channels_last)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.network(images)
        return {layer: self._checked_map(layer, outputs[layer], len(images)) for layer in self.layers}

    def digest(self) -> str:
        """Return "sha256:<hex>" over the weights that the layers use.

        Hashed are the sorted names, dtypes, shapes and bytes of the pruned network's parameters and buffers, so neither the
        device nor a change behind the last layer matters. num_batches_tracked is left out: eval mode never reads it.
        """
        digest = hashlib.sha256()
        tensors: dict[str, Tensor] = dict(self._owner.named_parameters()) | dict(self._owner.named_buffers())
        for name in sorted(tensors):
            if name.endswith("num_batches_tracked"):
                continue
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def backbone_state(self) -> dict[str, Tensor]:
        """Return the weights that the layers use, by the names they have in the backbone; `load_backbone_state` takes them."""
        return {name: tensor.detach() for name, tensor in self._owner.state_dict().items()}

    def load_backbone_state(self, state: Mapping[str, Tensor], *, source: str = "state") -> None:
        """Copy weights into the network; keys of parts that the layers do not use are ignored.

        Args:
            state: A state dict; "module.", "_orig_mod.", "model." or "backbone." in front of every key is dropped.
            source: What to call the state in errors.

        Raises:
            ValueError: A weight that the layers use is missing or has another shape.
        """
        used = {name: tensor for name, tensor in self._owner.state_dict().items() if not name.endswith("num_batches_tracked")}
        state = plain_keys(state, used)
        missing = [name for name in used if name not in state]
        if missing:
            raise ValueError(
                f"FeatureExtractor: expected {source} to hold every weight that layers {list(self.layers)} of {self.backbone_name} use, "
                f"got none for {shortened(missing, 4)}. Use a state dict of the same network, or layers that it covers."
            )
        for name, tensor in used.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"FeatureExtractor: expected {source} to hold {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}. "
                    f"Use a state dict of {self.backbone_name}."
                )
        with torch.no_grad():
            self._owner.load_state_dict({name: state[name] for name in self._owner.state_dict() if name in state}, strict=False)

    def extra_repr(self) -> str:
        """Return the settings for print()."""
        dimension = f", feature_dim={self.feature_dim}" if self.aggregation == "paper" else ""
        return (
            f"{self.backbone_name}, layers={self.layers}, weights={self.weights_name!r}, aggregation={self.aggregation!r}, "
            f"patch_size={self.patch_size}, stride={self.stride}{dimension}"
        )

    @property
    def _owner(self) -> nn.Module:
        """The module in which the weights have the names they have in the backbone."""
        return self.network.backbone if isinstance(self.network, HookedNetwork) else self.network

    def _checked_map(self, layer: str, output: Any, batch: int) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[0] != batch:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"FeatureExtractor: expected layer {layer!r} of {self.backbone_name} to give a map [B, C, h, w], got {got}. "
                "Choose a layer whose output is a feature map."
            )
        feature_map: Tensor = output.float() if self.precision == "bfloat16" else output
        return feature_map.permute(0, 3, 1, 2) if layer in self._nhwc_layers else feature_map


def pool_maps(maps: list[Tensor], aggregation: str, patch_size: int, stride: int, feature_dim: int) -> PatchFeatures:
    """Return the patch features of the layers' maps (Eq. (1)-(3)): the second half of FeatureExtractor, which needs no network.

    Args:
        maps: Of each layer, [B, C, h, w]; see `FeatureExtractor.maps`. They may be of different sizes.
        aggregation: As for FeatureExtractor, and so are patch_size, stride and feature_dim.
        patch_size: p, odd.
        stride: Of the patches that are kept.
        feature_dim: D of "paper".

    Raises:
        ValueError, TypeError: An option is out of its range.
    """
    _check_options(aggregation, patch_size, stride, feature_dim)
    if aggregation == "concat":
        return _concatenate(maps, patch_size, stride)
    return _pool_as_in_paper(maps, patch_size, stride, feature_dim)


def _concatenate(maps: list[Tensor], patch_size: int, stride: int) -> PatchFeatures:
    """The average over the neighbourhood per channel, layers side by side."""
    size = _finest_size(maps)
    grid = _grid(size, stride)
    channels = sum(feature_map.shape[1] for feature_map in maps)
    # Each layer is written to its place in the result: no concatenated copy beside it.
    merged = maps[0].new_empty((maps[0].shape[0], *grid, channels), dtype=_output_dtype(maps))  # [B, rows, columns, D]
    start = 0
    for feature_map in maps:
        # The result is channels-last; working that way throughout takes a quarter of the time on a CPU, to the same bits.
        pooled = F.avg_pool2d(_channels_last(feature_map), patch_size, 1, patch_size // 2, count_include_pad=True)  # [B, C, h, w]
        stop = start + pooled.shape[1]
        merged[..., start:stop] = _upsample(pooled, size)[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
        start = stop
    return PatchFeatures(merged.flatten(1, 2), grid)  # [B, P, D]


def _pool_as_in_paper(maps: list[Tensor], patch_size: int, stride: int, dim: int) -> PatchFeatures:
    """Eq. (1)-(3) with f_agg = adaptive average pooling, as amazon-science/patchcore-inspection reads them."""
    size = _finest_size(maps)
    grid = _grid(size, stride)
    stacked = maps[0].new_empty((maps[0].shape[0], *grid, len(maps) * dim), dtype=torch.float32)  # [B, rows, columns, L * D]
    for index, feature_map in enumerate(maps):
        # Both steps are linear and act on different axes, so pooling first gives the same and upsamples less.
        pooled = _pool_neighbourhoods(feature_map, patch_size, dim)  # [B, D, h, w]
        resized = _upsample(_channels_last(pooled), size)[:, :, ::stride, ::stride]  # [B, D, rows, columns]
        stacked[..., index * dim : (index + 1) * dim] = resized.permute(0, 2, 3, 1)
    merged = F.adaptive_avg_pool1d(stacked.flatten(1, 2), dim)  # [B, P, D]
    return PatchFeatures(merged.to(_output_dtype(maps)), grid)


def _pool_neighbourhoods(feature_map: Tensor, patch_size: int, dim: int) -> Tensor:
    """Return [B, D, h, w]: each position's flattened neighbourhood [C * p * p] pooled to D = dim, a few images at a time.

    Bin i of the adaptive pooling averages entries floor(i * C * p * p / D) to ceil((i + 1) * C * p * p / D), the last excluded.
    """
    batch, channels, height, width = feature_map.shape
    pooled = feature_map.new_empty((batch, dim, height, width), dtype=torch.float32)
    images = max(1, _UNFOLD_BYTES // max(1, 4 * channels * patch_size**2 * height * width))
    for start in range(0, batch, images):
        neighbourhoods = F.unfold(feature_map[start : start + images].float(), patch_size, padding=patch_size // 2)  # [b, C * p * p, P]
        bins = F.adaptive_avg_pool2d(neighbourhoods.unsqueeze(1), (dim, height * width))  # [b, 1, D, P]
        pooled[start : start + images] = bins.view(-1, dim, height, width)
    return pooled


def _channels_last(feature_map: Tensor) -> Tensor:
    return feature_map.to(dtype=torch.float32, memory_format=torch.channels_last)


def _upsample(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    if feature_map.shape[2:] == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


def _finest_size(maps: list[Tensor]) -> tuple[int, int]:
    height, width = max((feature_map.shape[2:] for feature_map in maps), key=math.prod)
    return height, width


def _grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def _output_dtype(maps: list[Tensor]) -> torch.dtype:
    return maps[0].dtype if maps[0].dtype in (torch.float16, torch.bfloat16) else torch.float32


def _check_options(aggregation: str, patch_size: int, stride: int, feature_dim: int) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"FeatureExtractor: expected aggregation to be one of {AGGREGATIONS}, got {aggregation!r}.")
    for name, value in (("patch_size", patch_size), ("stride", stride), ("feature_dim", feature_dim)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"FeatureExtractor: expected {name} to be an int, got {value!r}.")
        if value < 1:
            raise ValueError(f"FeatureExtractor: expected {name} to be at least 1, got {value}.")
    if patch_size % 2 == 0:
        raise ValueError(f"FeatureExtractor: expected patch_size to be odd, got {patch_size}. Use {patch_size - 1} or {patch_size + 1}.")
