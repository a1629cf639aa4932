"""For the tests of the features: a small network of three maps, one that cannot be traced, torchvision's ResNet18, and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchcore_ext.features import FeatureExtractor


class SmallNet(nn.Module):
    """Three maps of falling resolution; odd sizes come from odd images."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5))
        self.coarse = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.fc = nn.Linear(7, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.coarse(self.middle(self.fine(images))).mean((2, 3)))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images)
        middle = self.middle(fine)
        return {"fine": fine, "middle": middle, "coarse": self.coarse(middle)}


class BranchingNet(SmallNet):
    """The same network with a branch on the data, which torch.fx cannot trace, and a tail that must not run."""

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 1e30:
            return images
        self.coarse(self.middle(self.fine(images)))
        raise AssertionError("the network ran past its last named layer")


def small_net(net_class: type[SmallNet] = SmallNet) -> SmallNet:
    torch.manual_seed(5)
    net = net_class().double()
    nn.init.uniform_(net.middle[1].running_mean, -1, 1)
    nn.init.uniform_(net.middle[1].running_var, 0.5, 2)
    return net.eval()


def random_images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(7))


def resnet18(weights: object, layers: tuple[str, ...] = ("layer1", "layer2")) -> FeatureExtractor:
    return FeatureExtractor("resnet18", layers, weights=weights)
