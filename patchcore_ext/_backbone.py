"""The network in front of the features: found by name, given its weights, cut off behind the last layer that is used."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

logger = logging.getLogger(__name__)


_STATE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# torchvision's builders set these when they are given weights; the published weights are wrong without them.
BUILD_OPTIONS: dict[str, dict[str, bool]] = {
    name: {"transform_input": True, "aux_logits": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}
# What nobody takes patch features from: left out of the list of layers in error messages.
_NOT_A_LAYER = (nn.Linear, nn.Dropout, nn.Identity, nn.ReLU, nn.ReLU6, nn.AdaptiveAvgPool2d, nn.Flatten)
_HEADS = ("classifier", "head", "heads", "avgpool", "fc", "aux1", "aux2", "AuxLogits")


class _LayerTracer(fx.Tracer):
    """Symbolic tracer that copies each named layer's output the moment the layer returns it."""

    # Without layers: torch.fx makes a tracer of its own when a pickled network is read, in which the copies are there already.
    def __init__(self, layers: Sequence[str] = ()) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))  # type: ignore[arg-type]
        self.layers = layers
        self.outputs: dict[str, fx.Proxy] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        in_torchvision_ops = type(m).__module__.startswith("torchvision.ops.") and not isinstance(m, nn.Sequential)
        return in_torchvision_ops or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if name in self.layers and name not in self.outputs:
            self.outputs[name] = output.clone()
        return output


class HookedNetwork(nn.Module):
    """Runs a network that cannot be traced up to the last of its named layers."""

    class _LayersSeen(Exception):  # noqa: N818 - it stops the network, it is no error
        pass

    def __init__(self, backbone: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = tuple(layers)

    def forward(self, images: Tensor) -> dict[str, Any]:
        outputs: dict[str, Any] = {}

        def keep(layer: str, output: Any) -> None:
            outputs.setdefault(layer, output.clone() if isinstance(output, Tensor) else output)
            if len(outputs) == len(self.layers):
                raise self._LayersSeen

        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                module = self.backbone.get_submodule(layer)
                handle = module.register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
                hooks.callback(handle.remove)
            with contextlib.suppress(self._LayersSeen):
                self.backbone(images)
        unseen = [layer for layer in self.layers if layer not in outputs]
        if unseen:
            raise ValueError(f"FeatureExtractor: expected layers to be modules that the backbone's forward calls, got {unseen}.")
        return outputs


def prune(backbone: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Return a network that runs the backbone up to the last of the layers and returns their maps by name."""
    names = {name for name, _ in backbone.named_modules() if name}
    for layer in layers:
        if layer not in names:
            close = difflib.get_close_matches(layer, names, n=1, cutoff=0.8)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"FeatureExtractor: expected layers to be modules of {type(backbone).__name__}, got {layer!r}.{hint} "
                f"There are: {shortened(_layer_names(backbone), 40)}."
            )
    backbone.eval()
    tracer = _LayerTracer(layers)
    try:
        graph = tracer.trace(backbone)
        nodes = {layer: tracer.outputs[layer].node for layer in layers}
    except Exception as error:  # whatever a foreign forward raises when it is fed proxies
        logger.info("FeatureExtractor: %s is run with hooks, torch.fx cannot trace it: %s", type(backbone).__name__, error)
        return HookedNetwork(backbone, layers)
    copies = set(nodes.values())
    for node in reversed(list(graph.nodes)):
        if node in copies:
            break
        graph.erase_node(node)
    graph.output(nodes)
    return fx.GraphModule(backbone, graph)


def _layer_names(backbone: nn.Module) -> list[str]:
    """Return the module names a person would choose from: those of the shallowest depth that offers a choice."""
    names: list[str] = []
    for depth in (1, 2, 3):
        modules = {name: module for name, module in backbone.named_modules() if name and name.count(".") < depth}
        body = {name: module for name, module in modules.items() if name.partition(".")[0] not in _HEADS}
        names = [name for name, module in body.items() if not isinstance(module, _NOT_A_LAYER)]
        if len(modules) > 6:
            break
    return names


def is_nhwc(backbone: nn.Module, layer: str) -> bool:
    """Swin's blocks give [B, h, w, C]."""
    return isinstance(backbone, torchvision.models.SwinTransformer) and re.match(r"(features|norm)(\.|$)", layer) is not None and layer != "features.0.0"


@contextlib.contextmanager
def plain_defaults(keep_random_state: bool) -> Iterator[None]:
    """Build on the CPU, in float32 and outside inference mode, whatever the defaults are."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.random.fork_rng(devices=[], enabled=keep_random_state):
            yield
    finally:
        torch.set_default_dtype(default_dtype)


def resolve_weights(backbone: str, weights: str | os.PathLike[str] | None) -> tuple[str | None, Callable[[], Mapping[str, Tensor]] | None]:
    """Return the name to record and a function that reads the state dict; None, None for random weights."""
    if weights is None:
        return None, None
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"FeatureExtractor: expected weights to be a name, a path or None, got {type(weights).__name__}.")
    known = torchvision.models.get_model_weights(backbone)
    name = os.fspath(weights)
    entry = known.__members__.get(name.removeprefix(f"{known.__name__}.")) if isinstance(weights, str) else None
    if entry is not None:
        return entry.name, lambda: _download(backbone, entry)
    if not os.path.isfile(name):
        missing_file = isinstance(weights, os.PathLike) or name.lower().endswith(_STATE_SUFFIXES) or os.sep in name
        raise ValueError(
            f"FeatureExtractor: expected weights to be the path of a state dict or a weights name of {backbone}, "
            f"got {name!r}{', and there is no such file' if missing_file else ''}. Names: {', '.join(known.__members__) or 'none'}."
        )
    return name, lambda: _read_state(name)


def _download(backbone: str, entry: Any) -> Mapping[str, Tensor]:
    try:
        # torchvision would unpickle; weights_only forbids it.
        state: Mapping[str, Tensor] = entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise OSError(
            f"FeatureExtractor: the {entry.name} weights of {backbone} could not be downloaded from {entry.url} ({error}). "
            f"Fetch that file on a machine that can and pass its path as weights, or put it into {torch.hub.get_dir()}/checkpoints."
        ) from error
    return state


def _read_state(path: str) -> Mapping[str, Tensor]:
    try:
        if path.lower().endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path, device="cpu")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers and archive readers raise nearly anything on a bad file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"FeatureExtractor: expected weights to be a state dict that torch.load(weights_only=True) or safetensors reads, got {path!r} "
            f"({reason}). Write one with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"FeatureExtractor: expected weights to be a state dict (names to tensors), got {type(state).__name__} in {path!r}. "
            "Write one with torch.save(model.state_dict(), path)."
        )
    return state


def plain_keys(state: Mapping[str, Tensor], used: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names that `used` knows: wrappers' prefixes dropped, DenseNet's old names mended."""
    plain = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for prefix in ("module.", "_orig_mod.", "model.", "backbone."):
        if used.keys().isdisjoint(plain) and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): tensor for name, tensor in plain.items()}


def checked_backbone_name(backbone: str) -> str:
    names = torchvision.models.list_models(module=torchvision.models)
    name = backbone.lower()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or ["resnet18", "wide_resnet50_2"]
        raise ValueError(
            f"FeatureExtractor: expected backbone to be the name of a torchvision classification network, got {backbone!r}. "
            f"Close names: {', '.join(close)}. Any other network can be passed as a torch.nn.Module."
        )
    return name


def checked_layers(layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"FeatureExtractor: expected layers to be a sequence of module names, got {layers!r}. Write ('layer2', 'layer3').")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"FeatureExtractor: expected layers to be one or more different module names, got {list(layers)}.")
    return tuple(layers)


def shortened(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
