"""The modified ResNets of the DKS and TAT papers as ordinary torch modules: no norms, plain sums.

v2 blocks are act-conv chains whose projected shortcut is taken after the first activation; v1 blocks are
conv-act-...-conv, sum, act. Basic blocks project in groups 2 to 4, bottlenecks in all four.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 200: (3, 24, 36, 3)}


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, preact: bool, project: bool) -> None:
        super().__init__()
        out = width * 4 if bottleneck else width
        plan = (
            [(inputs, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride), (width, out, 3, 1)]
        )
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2) for i, o, k, s in plan)
        self.acts = nn.ModuleList(nn.ReLU() for _ in plan)
        self.projection = nn.Conv2d(inputs, out, 1, stride) if project else None
        self.preact = preact

    def forward(self, x: Tensor) -> Tensor:
        if self.preact:
            h = self.acts[0](x)
            shortcut = self.projection(h) if self.projection is not None else x
            for i, conv in enumerate(self.convs):
                h = conv(h if i == 0 else self.acts[i](h))
            return shortcut + h
        shortcut = self.projection(x) if self.projection is not None else x
        h = x
        for i, conv in enumerate(self.convs):
            h = conv(h) if i == 0 else conv(self.acts[i - 1](h))
        return self.acts[-1](shortcut + h)


class ModifiedResNet(nn.Module):
    def __init__(self, depth: int, version: int, width: int = 4) -> None:
        super().__init__()
        bottleneck, preact = depth >= 50, version == 2
        self.stem = nn.Conv2d(3, width, 7, 2, 3)
        self.stem_act = None if preact else nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], width
        for group, count in enumerate(BLOCKS[depth]):
            for index in range(count):
                project = index == 0 and (bottleneck or group > 0)
                own = width * 2**group
                stride = 2 if index == 0 and group > 0 else 1
                blocks.append(Block(channels, own, stride, bottleneck, preact, project))
                channels = own * 4 if bottleneck else own
        self.blocks = nn.Sequential(*blocks)
        self.final_act = nn.ReLU() if preact else None
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.stem_act is not None:
            x = self.stem_act(x)
        x = self.blocks(self.pool(x))
        if self.final_act is not None:
            x = self.final_act(x)
        return self.head(x.mean((2, 3)))


def vanilla(depth: int, width: int = 4) -> nn.Module:
    """A plain chain with ``depth`` activations."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, width))


def build(arch: str) -> tuple[nn.Module, float]:
    """``modresnet50_v2_w0.8`` or ``vanilla100`` -> (model, shortcut weight)."""
    if arch.startswith("vanilla"):
        return vanilla(int(arch[7:])), 0.0
    name, version, weight = arch.split("_")
    return ModifiedResNet(int(name[9:]), int(version[1:])), float(weight[1:])


def example(arch: str) -> Tensor:
    return torch.zeros(2, 4) if arch.startswith("vanilla") else torch.zeros(2, 3, 32, 32)
