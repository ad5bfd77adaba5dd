"""Transformed models, and what tests of a transform look at."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import zoo
from torch import Tensor, nn

import kgraph
from kgraph import TransformRecord
from kgraph.emitted import EmittedModule

QUICK = [
    "mlp",
    "cnn",
    "dcgan_generator",
    "unet",
    "siamese",
    "hand_written",
    "squeeze_excite",
    "swiglu",
    "two_inputs",
]


SLOW = ["resnet18", "convnext_atto", "nf_resnet50", "gpt2"]


@cache
def shaped(name: str, method: str = "dks") -> tuple[nn.Module, Any, EmittedModule]:
    model, inputs = zoo.build(name)
    return model, inputs, kgraph.transform(model, method, inputs)


def record(module: EmittedModule) -> TransformRecord:
    assert isinstance(module.kgraph, TransformRecord)
    return module.kgraph


def chain(*activations: Any, width: int = 16) -> nn.Module:
    """Linear layers with activations in between."""
    layers: list[nn.Module] = []
    for activation in activations:
        layers += [nn.Linear(width, width), activation]
    return nn.Sequential(*layers, nn.Linear(width, 4))


class Calls(nn.Module):
    """Two linear layers around any function."""

    def __init__(self, function: Any, width: int = 16) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.function(self.enter(x)))


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return {
        "tensors": {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in tensors.items()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": hooks,
        "modules": {name: id(m) for name, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, (identity, value, grad) in before["tensors"].items():
        assert identity == after["tensors"][name][0]
        assert torch.equal(value, after["tensors"][name][1])
        assert grad == after["tensors"][name][2]
    assert all(before[key] == after[key] for key in ("training", "hooks", "modules"))


def local_map(module: nn.Module) -> tuple[float, float, float, float]:
    """E[f^2], E[f], E[f'^2], E[f''^2] under N(0, 1) by the trapezoidal rule in float64."""
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64, requires_grad=True)
    weight = torch.exp(-z.detach().square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0]).detach()
    value = module(z)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
    moments = [value.square(), value, slope.square(), curvature.square()]
    return tuple(float((m.detach() * weight).sum()) for m in moments)  # type: ignore[return-value]
