"""Where a backbone's weights come from, and the digest that names them."""

from __future__ import annotations

import os
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from feature_networks import BranchingNet, random_images, resnet18, small_net
from torch import Tensor

from patchcore_ext.features import FeatureExtractor

RESNET18_STATE = os.environ.get("PATCHCORE_EXT_RESNET18", "")
pytestmark = pytest.mark.usefixtures("one_thread")


# --- weights --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18_state() -> dict[str, Tensor]:
    torch.manual_seed(11)
    return torchvision.models.resnet18(weights=None).state_dict()


def test_weights_file_loads_every_common_form(tmp_path: Path, resnet18_state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    forms = {
        "plain.pth": resnet18_state,
        "module.pt": {f"module.{name}": tensor for name, tensor in resnet18_state.items()},
        "nested.ckpt": {"state_dict": {f"model.{name}": tensor for name, tensor in resnet18_state.items()}, "epoch": 3},
        "pruned.pth": {name: tensor for name, tensor in resnet18_state.items() if not name.startswith(("layer3", "layer4", "fc"))},
        "counterless.pth": {name: tensor for name, tensor in resnet18_state.items() if not name.endswith("num_batches_tracked")},
        "other_head.pth": resnet18_state | {"fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)},
    }
    for name, state in forms.items():
        torch.save(state, tmp_path / name)
    save_file(resnet18_state, tmp_path / "plain.safetensors")
    digests = {name: resnet18(tmp_path / name).digest() for name in [*forms, "plain.safetensors"]}
    assert len(set(digests.values())) == 1, digests
    extractor = resnet18(str(tmp_path / "plain.pth"))
    assert extractor.weights_name == str(tmp_path / "plain.pth")
    assert torch.equal(extractor.backbone_state()["layer2.0.conv1.weight"], resnet18_state["layer2.0.conv1.weight"])


def test_weights_file_of_a_densenet_may_have_the_old_names(tmp_path: Path) -> None:
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for part in ("norm1", "norm2", "conv1", "conv2"):
        old = {name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in name else name: old[name] for name in old}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    extractor = FeatureExtractor("densenet121", ("features.denseblock1",), weights=tmp_path / "densenet.pth")
    name = "features.denseblock1.denselayer2.conv1.weight"
    assert torch.equal(extractor.backbone_state()[name], state[name])


def test_weights_file_leaves_the_random_state_alone(tmp_path: Path, resnet18_state: dict[str, Tensor]) -> None:
    torch.save(resnet18_state, tmp_path / "plain.pth")
    before = torch.get_rng_state()
    resnet18(tmp_path / "plain.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_file_that_lacks_used_weights_is_refused(tmp_path: Path, resnet18_state: dict[str, Tensor]) -> None:
    torch.save({name: tensor for name, tensor in resnet18_state.items() if not name.startswith("layer2")}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"got none for layer2\.0\.conv1\.weight, .*in all"):
        resnet18(tmp_path / "short.pth")
    resnet18(tmp_path / "short.pth", layers=("layer1",))


def test_weights_file_of_other_shapes_is_refused(tmp_path: Path, resnet18_state: dict[str, Tensor]) -> None:
    torch.save(resnet18_state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"conv1\.weight of shape \[64, 3, 7, 7\], got \[64, 1, 7, 7\]"):
        resnet18(tmp_path / "grey.pth")


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_weights_file_is_never_unpickled(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1), "bomb": Bomb(tmp_path / "fired")}, tmp_path / "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "fired"), protocol=2))
    for name in ("bomb.pth", "raw.pth"):
        with pytest.raises(ValueError, match=r"state dict that torch\.load\(weights_only=True\)"):
            resnet18(tmp_path / name)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("content", [b"", b"not a state dict", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_file_that_is_broken_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"state dict.*broken\.{suffix}.*torch\.save"):
        resnet18(path)


def test_weights_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"names to tensors.*numbers\.pth"):
        resnet18(tmp_path / "numbers.pth")


def test_weights_name_unknown_lists_names() -> None:
    with pytest.raises(ValueError, match=r"got 'IMAGENET21K'.*IMAGENET1K_V1.*DEFAULT"):
        resnet18("IMAGENET21K")
    with pytest.raises(ValueError, match=r"got 'missing\.pth', and there is no such file"):
        resnet18("missing.pth")
    with pytest.raises(TypeError, match="weights to be a name, a path or None, got int"):
        resnet18(3)


def test_weights_by_name_are_resolved_and_read_safely(monkeypatch: pytest.MonkeyPatch, resnet18_state: dict[str, Tensor]) -> None:
    asked: list[dict[str, object]] = []

    def get_state_dict(self: object, **options: object) -> dict[str, Tensor]:
        asked.append(options)
        return resnet18_state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        extractor = resnet18(name)
        assert extractor.weights_name == "IMAGENET1K_V1"
        assert torch.equal(extractor.backbone_state()["conv1.weight"], resnet18_state["conv1.weight"])
    assert len(asked) == 3
    assert all(options["weights_only"] is True and options["check_hash"] is True for options in asked)


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_state_dict(self: object, **options: object) -> dict[str, Tensor]:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(OSError, match=r"could not be downloaded from https://.*no route to host.*pass its path as weights"):
        resnet18("DEFAULT")


def test_weights_none_warns_and_follows_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    first = resnet18(None)
    torch.manual_seed(1)
    second = resnet18(None)
    assert "resnet18 has random weights" in caplog.text
    assert first.weights_name is None
    assert first.digest() == second.digest() != resnet18(None).digest()


@pytest.mark.skipif(not RESNET18_STATE, reason="real ResNet18 weights not tested: PATCHCORE_EXT_RESNET18 names no state dict")
def test_weights_of_a_real_pruned_resnet18_load() -> None:
    extractor = FeatureExtractor("resnet18", ("layer2", "layer3"), weights=RESNET18_STATE)
    network = torchvision.models.resnet18(weights=None).eval()
    network.load_state_dict(torch.load(RESNET18_STATE, weights_only=True), strict=False)
    images = random_images(2, 224, 224, torch.float32)
    with torch.inference_mode():
        features, grid = extractor(images)
        stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        fine = network.layer2(network.layer1(stem))  # [B, 128, 28, 28]
        coarse = F.avg_pool2d(network.layer3(fine), 3, 1, 1)  # [B, 256, 14, 14]
        merged = torch.cat([F.avg_pool2d(fine, 3, 1, 1), F.interpolate(coarse, size=(28, 28), mode="bilinear")], dim=1)
    assert grid == (28, 28)
    torch.testing.assert_close(features, merged.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"got none for layer4"):
        FeatureExtractor("resnet18", ("layer4",), weights=RESNET18_STATE)


# --- digest ---------------------------------------------------------------------------------------------------------------------


def test_digest_covers_the_used_weights_only() -> None:
    network = torchvision.models.resnet18(weights=None)
    extractor = FeatureExtractor(network, ("layer1", "layer2"))
    digest = extractor.digest()
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    with torch.no_grad():
        network.layer3[0].conv1.weight.zero_()
        network.fc.bias += 1
        network.bn1.num_batches_tracked += 1
        assert extractor.digest() == digest
        network.layer2[1].bn2.running_var[3] += 1e-3
        changed = extractor.digest()
        assert changed != digest
        network.conv1.weight[0, 0, 0, 0] += 1e-3
    assert extractor.digest() not in (digest, changed)


def test_digest_depends_on_layers_shapes_and_dtypes() -> None:
    net = small_net()
    digests = {FeatureExtractor(net, layers).digest() for layers in (("fine",), ("middle",), ("coarse",))}
    with torch.no_grad():
        net.fine.weight.data = net.fine.weight.view(4, 3, 9, 1)
        digests.add(FeatureExtractor(net, ("fine",)).digest())
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()  # the same bytes in either dtype
        digests.update(FeatureExtractor(net.to(dtype), ("fine",)).digest() for dtype in (torch.float16, torch.bfloat16))
    assert len(digests) == 6


def test_digest_of_a_hooked_network_covers_all_of_it() -> None:
    net = small_net(BranchingNet)
    extractor = FeatureExtractor(net, ("fine",))
    digest = extractor.digest()
    assert FeatureExtractor(small_net(BranchingNet), ("fine",)).digest() == digest
    with torch.no_grad():
        net.coarse.bias += 1
    assert extractor.digest() != digest


def test_backbone_state_carries_over() -> None:
    torch.manual_seed(2)
    first = resnet18(None)
    second = resnet18(None)
    second.load_backbone_state(first.backbone_state())
    assert second.digest() == first.digest()
