"""Where the constants are that folding removes: shaped activations, weighted sums, scales and numbers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from kgraph.canonical import aten, operation_name
from kgraph.modules import FunctionModule, ShapedActivation

_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity)
_RELUS = (torch.relu, F.relu, aten.relu.default)
_FUNCTIONS = (*_RELUS, F.leaky_relu, F.prelu, torch.prelu, aten.leaky_relu.default, aten.prelu.default)


@dataclass(frozen=True)
class Shaped:
    """``output_scale (phi(input_scale u + input_shift) + output_shift)`` at a node that reads x."""

    node: fx.Node
    x: Hashable
    module: ShapedActivation

    @property
    def homogeneous(self) -> bool:
        """Whether a factor passes through."""
        return self.module.input_scale > 0 and is_homogeneous(self.module.activation)

    @property
    def slope(self) -> float:
        """The factor k in ``k phi(u + c) + d``, which is the same function where phi is homogeneous."""
        return self.module.output_scale * self.module.input_scale

    @property
    def inner(self) -> float:
        """c, the shift of u."""
        return self.module.input_shift / self.module.input_scale

    @property
    def outer(self) -> float:
        """d, the shift of the output."""
        return self.module.output_scale * self.module.output_shift

    @property
    def is_relu(self) -> bool:
        return self.homogeneous and is_relu(self.module.activation)


@dataclass(frozen=True)
class Sum:
    """``sum_i weights[i] terms[i]``."""

    node: fx.Node
    terms: tuple[Hashable, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Constant:
    """``factor * x + shift``."""

    node: fx.Node
    x: Any
    factor: float
    shift: float


Place = Shaped | Sum | Constant


def is_homogeneous(activation: nn.Module) -> bool:
    """Whether phi(s u) = s phi(u) for every s > 0."""
    if isinstance(activation, FunctionModule):
        return activation.function in _FUNCTIONS
    return type(activation) in _HOMOGENEOUS


def is_relu(activation: nn.Module) -> bool:
    """Whether it is max(0, u), which a leaky ReLU without slope is as well."""
    if isinstance(activation, FunctionModule):
        return activation.function in _RELUS
    return type(activation) is nn.ReLU or (type(activation) is nn.LeakyReLU and activation.negative_slope == 0.0)


def constant_of(node: fx.Node) -> Constant | None:
    """``x * 2``, ``x / 2``, ``x + 2``, ``x - 2`` with numbers as what they are; None for another node."""
    name, args = operation_name(node), node.args[:2]
    if not isinstance(node.target, OpOverload):  # arithmetic of sizes
        return None
    if name not in ("add", "sub", "mul", "div") or len(args) != 2 or node.kwargs.keys() - {"alpha"}:
        return None
    x, number = (args[1], args[0]) if name in ("add", "mul") and not isinstance(args[0], fx.Node) else args
    alpha = node.kwargs.get("alpha", 1.0)
    if not isinstance(x, fx.Node) or not isinstance(number, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    if name in ("mul", "div"):
        if not number:
            return None
        return Constant(node, x, float(number) if name == "mul" else 1.0 / number, 0.0)
    if x is not args[0] and alpha != 1.0:
        return None
    return Constant(node, x, 1.0, float(number * alpha) * (-1.0 if name == "sub" else 1.0))


__all__ = ["Constant", "Place", "Shaped", "Sum", "constant_of", "is_homogeneous", "is_relu"]
