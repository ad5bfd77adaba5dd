"""Random graphs of everything that folding knows, on features [2, 6, 7, 7]: what reads what is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kgraph.modules import Scale, ShapedActivation, WeightedSum

aten = torch.ops.aten
SHAPE = (2, 6, 7, 7)
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "add": (2, aten.add.Tensor),
    "sub": (2, lambda a, b: aten.sub.Tensor(a, b, alpha=0.7)),
    "mul": (2, aten.mul.Tensor),
    "maximum": (2, aten.maximum.default),
    "concat": (2, lambda a, b: aten.slice.Tensor(aten.cat.default([a, b], 1), 1, 3, 9)),
    "max pool": (1, lambda a: aten.max_pool2d.default(a, [3, 3], [1, 1], [1, 1])),
    "average pool": (1, lambda a: aten.avg_pool2d.default(a, [3, 3], [1, 1], [1, 1])),
    "mean": (1, lambda a: aten.expand.default(aten.mean.dim(a, [2, 3], True), list(SHAPE))),
    "relu": (1, aten.relu.default),
    "tanh": (1, aten.tanh.default),
    "numbers": (1, lambda a: aten.add.Tensor(aten.mul.Tensor(a, 1.7), 0.3)),
    "view": (1, lambda a: aten.reshape.default(a, list(SHAPE))),
}
LAYERS: tuple[Callable[[random.Random], nn.Module], ...] = (
    lambda r: nn.Conv2d(6, 6, 3, padding=1, bias=r.random() < 0.5, padding_mode=r.choice(["zeros", "reflect"])),
    lambda r: nn.Conv2d(6, 6, 3, padding=1, groups=r.choice([2, 3, 6]), bias=r.random() < 0.5),
    lambda r: nn.Conv2d(6, 6, 1, bias=r.random() < 0.5),
    lambda r: nn.ConvTranspose2d(6, 6, 3, padding=1, groups=r.choice([1, 2]), bias=r.random() < 0.5),
)
ACTIVATIONS: tuple[Callable[[], Any], ...] = (
    nn.Tanh,
    nn.Softplus,
    nn.ReLU,
    nn.PReLU,
    lambda: nn.LeakyReLU(0.0),
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: torch.relu,
)


class RandomGraph(nn.Module):
    """A step makes a new value of earlier ones: a module, perhaps one that was called before, a function, a weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw, self.steps = random.Random(seed), list[tuple[Callable[..., Tensor], list[int]]]()
        self.parts, self.tensors = nn.ModuleList(), nn.ParameterList()
        for _ in range(self.draw.randint(4, 14)):
            getattr(
                self, self.draw.choice(["layer", "layer", "shaped", "shaped", "total", "scale", "function", "weight"])
            )()
        ends = self.draw.sample(range(len(self.steps)), 1) if self.draw.random() < 0.3 else []
        self.ends = [len(self.steps), *ends]

    def read(self, number: int) -> list[int]:
        count = len(self.steps) + 1
        return [self.draw.randrange(max(0, count - 4), count) for _ in range(number)]

    def call(self, module: nn.Module, number: int = 1) -> None:
        self.parts.append(module)
        self.steps.append((module, self.read(number)))

    def number(self, usual: float, low: float, high: float, sign: bool = False) -> float:
        value = self.draw.choice([usual, self.draw.uniform(low, high)])
        return -value if sign and self.draw.random() < 0.2 else value

    def layer(self) -> None:
        known = [part for part in self.parts if isinstance(part, (nn.Conv2d, ShapedActivation))]
        if known and self.draw.random() < 0.3:
            self.steps.append((self.draw.choice(known), self.read(1)))
        else:
            self.call(self.draw.choice(LAYERS)(self.draw))

    def shaped(self) -> None:
        scales = [self.number(1.0, 0.4, 2.0, sign=True) for _ in range(2)]
        before, after = (self.number(0.0, -1.0, 1.0) for _ in range(2))
        self.call(ShapedActivation(self.draw.choice(ACTIVATIONS)(), scales[0], before, after, scales[1]))

    def total(self) -> None:
        self.call(WeightedSum([self.number(1.0, 0.3, 1.0, sign=True) for _ in range(2)]), 2)

    def scale(self) -> None:
        self.call(Scale(self.number(1.0, 0.3, 2.0, sign=True), self.number(0.0, -1.0, 1.0)))

    def function(self) -> None:
        number, function = FUNCTIONS[self.draw.choice(list(FUNCTIONS))]
        self.steps.append((function, self.read(number)))

    def weight(self) -> None:
        """A parameter as a factor, a term or a kernel, perhaps one that is read elsewhere as well."""
        kind = self.draw.choice(["factor", "term", "kernel"])
        shape = (6, 6, 1, 1) if kind == "kernel" else (6, 1, 1)
        known = [i for i, tensor in enumerate(self.tensors) if tensor.shape == shape]
        if not known or self.draw.random() < 0.6:
            known = [len(self.tensors)]
            self.tensors.append(
                nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(self.steps))))
            )
        place = self.draw.choice(known)
        functions: dict[str, Callable[..., Tensor]] = {
            "factor": lambda x: aten.mul.Tensor(x, self.tensors[place]),
            "term": lambda x: aten.add.Tensor(x, self.tensors[place]),
            "kernel": lambda x: aten.conv2d.default(x, self.tensors[place]),
        }
        self.steps.append((functions[kind], self.read(1)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for function, read in self.steps:
            values.append(function(*(values[i] for i in read)))
        return tuple(values[i] for i in self.ends)
