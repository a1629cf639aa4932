"""Patch features against Eq. (1)-(3) written as loops in float64, and the running of backbones and errors around them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from feature_networks import BranchingNet, SmallNet, random_images, resnet18, small_net
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcore_ext.features import FeatureExtractor, pool_maps

Array = NDArray[np.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- Eq. (1)-(3), naively -------------------------------------------------------------------------------------------------------


def neighbourhood(feature_map: Array, row: int, column: int, patch_size: int) -> Array:
    """Eq. (1): [C, p, p], zeros outside the map."""
    channels, height, width = feature_map.shape
    reach = patch_size // 2
    values = np.zeros((channels, patch_size, patch_size))
    for a in range(row - reach, row + reach + 1):
        for b in range(column - reach, column + reach + 1):
            if 0 <= a < height and 0 <= b < width:
                values[:, a - row + reach, b - column + reach] = feature_map[:, a, b]
    return values


def adaptive_average(vector: Array, dim: int) -> Array:
    n = len(vector)
    return np.array([vector[math.floor(i * n / dim) : math.ceil((i + 1) * n / dim)].mean() for i in range(dim)])


def local_features(feature_map: Array, patch_size: int, dim: int | None) -> Array:
    """Eq. (2): [h, w, D]; the mean per channel, or adaptive pooling to dim."""
    _, height, width = feature_map.shape
    rows = []
    for row in range(height):
        for column in range(width):
            values = neighbourhood(feature_map, row, column, patch_size)
            rows.append(values.mean((1, 2)) if dim is None else adaptive_average(values.reshape(-1), dim))
    return np.array(rows).reshape(height, width, -1)


def bilinear(features: Array, height: int, width: int) -> Array:
    """Upsampling of [h, w, D] with half-pixel centres (align_corners=False)."""
    old_height, old_width, dim = features.shape
    result = np.zeros((height, width, dim))
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * old_height / height - 0.5, 0)
            x = max((column + 0.5) * old_width / width - 0.5, 0)
            top, left = int(y), int(x)
            below, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            upper = features[top, left] * (1 - (x - left)) + features[top, right] * (x - left)
            lower = features[below, left] * (1 - (x - left)) + features[below, right] * (x - left)
            result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


def naive_features(maps: list[Array], aggregation: str, patch_size: int, stride: int, dim: int) -> Array:
    height, width = max((feature_map.shape[1:] for feature_map in maps), key=lambda size: size[0] * size[1])
    layers = [bilinear(local_features(feature_map, patch_size, None if aggregation == "concat" else dim), height, width) for feature_map in maps]
    merged = np.concatenate(layers, axis=2)
    kept = [merged[h, w] for h in range(height) for w in range(width) if h % stride == 0 and w % stride == 0]
    return np.array(kept if aggregation == "concat" else [adaptive_average(vector, dim) for vector in kept])


@pytest.mark.parametrize("aggregation", ["concat", "paper"])
@pytest.mark.parametrize("patch_size", [1, 3, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layers", [("fine", "middle"), ("middle",), ("fine", "middle", "coarse"), ("coarse", "fine")])
def test_features_equal_loops(aggregation: str, patch_size: int, stride: int, layers: tuple[str, ...]) -> None:
    net, images = small_net(), random_images(2, 7, 10)
    extractor = FeatureExtractor(net, layers, aggregation=aggregation, patch_size=patch_size, stride=stride, feature_dim=11)
    with torch.inference_mode():
        features, grid = extractor(images)
        maps = net.maps(images)
    size = maps["fine" if "fine" in layers else "middle"].shape[2:]
    assert grid == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert features.dtype == torch.float32
    assert features.is_contiguous()
    for index in range(2):
        expected = naive_features([maps[layer][index].numpy() for layer in layers], aggregation, patch_size, stride, 11)
        assert features.shape[1:] == expected.shape
        np.testing.assert_allclose(features[index].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [3, 36, 45, 64])  # fewer than, as many as and more than the 4 * 3 * 3 entries there are
def test_features_paper_pools_to_any_dim(dim: int) -> None:
    net, images = small_net(), random_images(1, 5, 4)
    extractor = FeatureExtractor(net, ("fine", "coarse"), aggregation="paper", feature_dim=dim)
    with torch.inference_mode():
        features, _ = extractor(images)
        maps = [net.maps(images)[layer][0].numpy() for layer in ("fine", "coarse")]
    np.testing.assert_allclose(features[0].numpy(), naive_features(maps, "paper", 3, 1, dim), rtol=1e-5, atol=1e-5)


def test_features_paper_unfolds_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, images = FeatureExtractor(small_net(), ("fine", "coarse"), aggregation="paper", feature_dim=16), random_images(5, 8, 8)
    with torch.inference_mode():
        whole = extractor(images).features
        monkeypatch.setattr("patchcore_ext.features._UNFOLD_BYTES", 2 * 4 * 4 * 9 * 64)  # two images of the fine map
        assert torch.equal(extractor(images).features, whole)


@pytest.mark.parametrize("aggregation", ["concat", "paper"])
def test_features_of_a_batch_equal_those_of_each_image(aggregation: str) -> None:
    extractor = FeatureExtractor(small_net(), ("fine", "coarse"), aggregation=aggregation, feature_dim=16)
    images = random_images(5, 9, 6)
    with torch.inference_mode():
        together = extractor(images)
        apart = [extractor(images[index : index + 1]) for index in range(5)]
    assert together.features.shape == (5, 54, 11 if aggregation == "concat" else 16)
    assert {single.grid for single in apart} == {together.grid}
    torch.testing.assert_close(torch.cat([single.features for single in apart]), together.features, rtol=1e-6, atol=1e-6)


def test_features_concat_keeps_the_order_of_layers() -> None:
    net, images = small_net(), random_images(1, 8, 8)
    with torch.inference_mode():
        first = FeatureExtractor(net, ("fine", "coarse"))(images)
        second = FeatureExtractor(net, ("coarse", "fine"))(images)
    assert first.grid == second.grid == (8, 8)
    assert torch.equal(first.features, torch.cat([second.features[..., 7:], second.features[..., :7]], dim=2))


def test_features_rows_are_row_major() -> None:
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images)

    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    features, grid = FeatureExtractor(Identity(), ("layer",), patch_size=1)(images)
    assert grid == (4, 5)
    assert torch.equal(features[1, 2 * 5 + 3], images[1, :, 2, 3])


# --- running the backbone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "layers", "dim"),
    [
        ("resnet18", ("layer2", "layer3"), 128 + 256),
        ("resnet18", ("layer1", "layer2", "layer3"), 64 + 128 + 256),
        ("wide_resnet50_2", ("layer2", "layer3"), 512 + 1024),
        ("resnext101_32x8d", ("layer2", "layer3"), 512 + 1024),
        ("densenet201", ("features.denseblock2", "features.denseblock3"), 512 + 1792),
        ("efficientnet_b0", ("features.3", "features.5"), 40 + 112),
        ("swin_t", ("features.1", "features.3"), 96 + 192),
    ],
)
def test_features_backbone_gives_what_its_modules_give(backbone: str, layers: tuple[str, ...], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **options: built.append(get_model(*args, **options)) or built[-1])
    extractor = FeatureExtractor(backbone, layers, weights=None, patch_size=1)
    network = built[0]  # as torchvision made it, nothing cut off
    seen: list[Tensor] = []
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    images = random_images(1, 64, 64, torch.float32)
    with torch.inference_mode():
        features, grid = extractor(images)
        network(images)
    finest = seen[0].permute(0, 3, 1, 2) if backbone == "swin_t" else seen[0]
    assert features.shape == (1, grid[0] * grid[1], dim)
    assert grid == tuple(finest.shape[2:])
    torch.testing.assert_close(features[..., : finest.shape[1]], finest.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_features_backbone_is_cut_behind_the_last_layer() -> None:
    extractor = FeatureExtractor("resnet18", ("layer2", "layer3"), weights=None)
    names = extractor.backbone_state()
    assert any(name.startswith("layer3.1") for name in names)
    assert not any(name.startswith(("layer4", "fc")) for name in names)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_features_do_not_depend_on_the_other_layers() -> None:
    # bn1 is followed by ReLU(inplace=True), which would overwrite its map once something behind it is asked for.
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    images = random_images(1, 32, 32, torch.float32)
    with torch.inference_mode():
        alone = FeatureExtractor(network, ("bn1",))(images).features
        beside = FeatureExtractor(network, ("bn1", "layer1"))(images).features
    assert alone.min() < 0
    assert torch.equal(beside[..., :64], alone)


def test_features_take_the_output_of_a_block_not_its_last_operation() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            output = self.conv(images)
            output.relu_()  # without a user of its result
            self.mean = output.mean()
            return output

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, images: Tensor) -> Tensor:
            return self.block(images).neg()

    net, images = Net(), random_images(1, 4, 4, torch.float32)
    extractor = FeatureExtractor(net, ("block",), patch_size=1)
    with torch.no_grad():
        assert torch.equal(extractor(images).features, net.block.conv(images).relu().flatten(2).transpose(1, 2))


class RepeatingNet(nn.Module):
    """Calls a layer twice and writes over what it gave, in a way that torch.fx can or cannot trace."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.layer = nn.Conv2d(3, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        output = self.layer(images)
        again = self.layer(F.dropout(output.mul_(0), 0.5, training=self.training))
        return self.head(again if self.traceable or images.sum() < 1e30 else images)


@pytest.mark.parametrize("traceable", [True, False])
def test_features_are_those_of_a_layers_first_call(traceable: bool) -> None:
    net, images = RepeatingNet(traceable), random_images(1, 4, 4, torch.float32)
    extractor = FeatureExtractor(net, ("layer", "head"), patch_size=1)
    assert isinstance(extractor.network, torch.fx.GraphModule) == traceable
    with torch.no_grad():
        features = extractor(images).features
        assert torch.equal(features[..., :3], net.layer(images).flatten(2).transpose(1, 2))
        assert torch.equal(features[..., 3:], net.head(net.layer(images * 0)).flatten(2).transpose(1, 2))


def test_features_of_a_module_in_training_mode_are_those_of_eval_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(F.dropout(images, 0.5, training=self.training))

    net, images = Net().train(), random_images(1, 4, 4, torch.float32)
    with torch.no_grad():
        assert torch.equal(FeatureExtractor(net, ("layer",), patch_size=1)(images).features, net.layer(images).flatten(2).transpose(1, 2))


def test_features_fall_back_to_hooks() -> None:
    images = random_images(2, 7, 10)
    traced = FeatureExtractor(small_net(), ("fine", "coarse"))
    net = small_net(BranchingNet)
    hooked = FeatureExtractor(net, ("fine", "coarse"))  # BranchingNet's tail would raise
    with torch.inference_mode():
        assert torch.equal(hooked(images).features, traced(images).features)
    assert not any(module._forward_hooks for module in net.modules())
    assert hooked.backbone_state().keys() == net.state_dict().keys()
    hooked.load_backbone_state(traced.backbone_state() | {name: tensor for name, tensor in net.state_dict().items() if name.startswith("fc")})


def test_features_hooks_report_a_layer_that_never_runs() -> None:
    class Net(BranchingNet):
        def forward(self, images: Tensor) -> Tensor:
            return self.fine(images) if images.sum() < 1e30 else images

    extractor = FeatureExtractor(small_net(Net), ("fine", "coarse"))
    with pytest.raises(ValueError, match=r"forward calls, got \['coarse'\]"):
        extractor(random_images(1, 8, 8))


def test_features_stay_in_eval_mode() -> None:
    net = small_net().train()
    extractor = FeatureExtractor(net, ("middle",))
    images = random_images(2, 8, 8)
    before = net.middle[1].running_mean.clone()
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    with torch.no_grad():
        first, second = extractor(images).features, extractor(images).features
    assert torch.equal(first, second)
    assert torch.equal(net.middle[1].running_mean, before)


def test_features_share_the_weights_of_a_module() -> None:
    net = small_net()
    extractor = FeatureExtractor(net, ("fine",), patch_size=1)
    with torch.no_grad():
        net.fine.bias += 1
        features = extractor(random_images(1, 4, 4)).features
        expected = net.fine(random_images(1, 4, 4)).float()
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2))
    assert (extractor.backbone_name, extractor.weights_name, extractor.is_custom) == ("SmallNet", None, True)


def test_features_half_precision_keeps_its_dtype() -> None:
    extractor = FeatureExtractor(small_net().float(), ("fine", "coarse"))
    images = random_images(1, 8, 8, torch.float32)
    with torch.inference_mode():
        exact = extractor(images).features
        rounded = extractor.bfloat16()(images).features
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@pytest.fixture
def odd_defaults() -> Iterator[None]:
    """Defaults under which any tensor made without a device and dtype would show."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("odd_defaults")
@pytest.mark.parametrize("aggregation", ["concat", "paper"])
def test_features_ignore_default_device_and_dtype(aggregation: str) -> None:
    with torch.inference_mode():
        extractor = FeatureExtractor("resnet18", ("layer1", "layer2"), weights=None, aggregation=aggregation)
        features, _ = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.float32, device="cpu"))
    assert {(weight.dtype, weight.device.type) for weight in extractor.parameters()} == {(torch.float32, "cpu")}
    assert features.device.type == "cpu"
    assert features.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float64
    extractor.load_backbone_state(extractor.backbone_state())  # weights made under inference_mode can still be written
    assert extractor.digest().startswith("sha256:")


# --- errors ---------------------------------------------------------------------------------------------------------------------


def test_layer_unknown_lists_layers() -> None:
    with pytest.raises(ValueError, match=r"got 'layer9'.*Did you mean 'layer\d'.*There are: conv1, bn1, .*layer1, layer2, layer3, layer4\."):
        resnet18(None, ("layer2", "layer9"))
    with pytest.raises(ValueError, match=r"There are: .*features\.denseblock1, features\.transition1"):
        FeatureExtractor("densenet121", ("layer2",), weights=None)
    with pytest.raises(ValueError, match=r"modules of SmallNet.*There are: fine, middle, middle\.0, middle\.1, coarse"):
        FeatureExtractor(small_net(), ("layer2",))


def test_layer_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'fc' of SmallNet to give a map \[B, C, h, w\], got \[1, 2\]"):
        FeatureExtractor(small_net(), ("fc",))(random_images(1, 8, 8))

    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(ValueError, match=r"to give a map.*got tuple"):
        FeatureExtractor(nn.Sequential(Pair()), ("0",))(random_images(1, 8, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "resnet19"}, ValueError, r"got 'resnet19'. Close names: .*resnet18"),
        ({"backbone": "fcn_resnet50"}, ValueError, "torchvision classification network"),
        ({"backbone": 18}, TypeError, r"backbone to be a name or a torch\.nn\.Module, got int"),
        ({"backbone": nn.Conv2d(3, 3, 1), "weights": "IMAGENET1K_V1"}, ValueError, "weights to be left alone"),
        ({"layers": "layer2"}, TypeError, "layers to be a sequence of module names, got 'layer2'"),
        ({"layers": ()}, ValueError, "one or more different"),
        ({"layers": ("layer2", "layer2")}, ValueError, "one or more different"),
        ({"aggregation": "mean"}, ValueError, "aggregation to be one of .*'concat', 'paper'.*got 'mean'"),
        ({"patch_size": 4}, ValueError, "patch_size to be odd, got 4. Use 3 or 5"),
        ({"patch_size": 0}, ValueError, "patch_size to be at least 1"),
        ({"patch_size": 3.0}, TypeError, "patch_size to be an int"),
        ({"stride": 0}, ValueError, "stride to be at least 1"),
        ({"stride": True}, TypeError, "stride to be an int"),
        ({"feature_dim": 0}, ValueError, "feature_dim to be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureExtractor(**{"backbone": "resnet18", "weights": "DEFAULT" if "backbone" in options else None, **options})


def test_images_that_cannot_be_are_refused() -> None:
    extractor = resnet18(None, ("layer1",))
    for images in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images to be a float tensor \[B, 3, H, W\], got torch\..* \[.*32, 32\]"):
            extractor(images)


def test_bfloat16_is_near_and_the_features_stay_float32() -> None:
    net = small_net().float()
    layers = tuple(name for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d))[:2]
    images = random_images(2, 64, 48, torch.float32)
    exact, near = (FeatureExtractor(net, layers, precision=precision) for precision in ("float32", "bfloat16"))
    with torch.inference_mode():
        expected, found = exact(images).features, near(images).features
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    with pytest.raises(ValueError, match=r"expected precision to be one of \('float32', 'bfloat16'\), got 'float16'"):
        FeatureExtractor(net, layers, precision="float16")


def test_a_compiled_network_gives_nearly_the_same() -> None:
    net = small_net().float()
    layers = tuple(name for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d))[:1]
    images = random_images(1, 32, 32, torch.float32)
    with torch.inference_mode():
        found, expected = (FeatureExtractor(net, layers, compile=compiled)(images).features for compiled in (True, False))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_extractor_pickles() -> None:
    """torch.fx made its tracer without arguments on reading, which ours refused."""
    extractor = FeatureExtractor(SmallNet(), ("fine", "coarse"))
    images = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(pickle.loads(pickle.dumps(extractor))(images).features, extractor(images).features)


@pytest.mark.parametrize("aggregation", ["concat", "paper"])
def test_pooling_kept_maps_gives_the_features(aggregation: str) -> None:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    backbone = torchvision.models.resnet18(weights=None)
    with torch.inference_mode():
        maps = FeatureExtractor(backbone, ("layer1", "layer2", "layer3")).maps(images)
        expected = FeatureExtractor(backbone, ("layer2", "layer3"), aggregation=aggregation, patch_size=5, stride=2, feature_dim=100)(images)
        pooled = pool_maps([maps["layer2"], maps["layer3"]], aggregation, 5, 2, 100)
    assert list(maps) == ["layer1", "layer2", "layer3"]
    assert torch.equal(pooled.features, expected.features)
    assert pooled.grid == expected.grid


def test_pooling_refuses_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="expected patch_size to be odd, got 4"):
        pool_maps([torch.zeros(1, 2, 4, 4)], "concat", 4, 1, 8)
