"""The model that `kgraph demo` compiles: a plain 50-layer residual network with BatchNorm and ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

INPUT_SHAPE = (2, 3, 32, 32)


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, a shortcut, ReLU: He et al. 2016, figure 2."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DemoNet(nn.Module):
    """50 layers with weights: a stem, three stages of eight blocks and a linear head, for 32x32 images."""

    def __init__(self, width: int = 16, blocks: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, 2 * width, 4 * width]
        self.stages = nn.ModuleList()
        for before, after in zip([width, *widths], widths, strict=False):
            stride = 1 if before == after else 2
            stage = [Block(before, after, stride), *(Block(after, after, 1) for _ in range(blocks - 1))]
            self.stages.append(nn.Sequential(*stage))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(dim=(2, 3)))


def model_and_input(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and an example input. Drawing the weights leaves the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DemoNet(), (torch.randn(INPUT_SHAPE),)
