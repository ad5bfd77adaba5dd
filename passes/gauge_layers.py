"""Affine layers, as modules and as functions: where their weights are, and how a constant passes through them."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import operation_name

_MODULES: dict[str, str] = {
    "Linear": "linear",
    "NonDynamicallyQuantizableLinear": "linear",
    **{f"Conv{d}d": "conv" for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": "transposed" for d in (1, 2, 3)},
    "Embedding": "table",
    "Conv1D": "linear, transposed",
}
_FUNCTIONS = {
    "linear": "linear",
    **{f"conv{d}d": "conv" for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": "transposed" for d in (1, 2, 3)},
}
_EMPTY = torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Layer:
    """``W x + b`` at one node.

    Attributes:
        node: where it is called.
        x: what it reads.
        kind: how W is laid out.
        weight, bias: its tensors.
        owner: path of the module, whose missing bias can be made; "" for a function.
        border: why a constant in x does not become one in the output ("" where it does).
    """

    node: fx.Node
    x: fx.Node
    kind: str
    weight: Tensor
    bias: Tensor | None
    owner: str
    border: str

    @property
    def spot(self) -> Hashable:
        """Where its bias is, or will be."""
        return id(self.bias) if self.bias is not None else self.owner or self.node

    def of(self, weight: Tensor, bias: Tensor | None) -> Layer:
        return replace(self, weight=weight, bias=bias)

    def response(self) -> Tensor:
        """``W 1``, which a constant 1 in x adds to every output: [outputs], float64."""
        weight = self.weight.detach().double()
        return weight.sum(0) if self.kind == "linear, transposed" else weight.flatten(1).sum(1)


def layer_of(node: fx.Node, module: nn.Module | None) -> Layer | None:
    """The affine layer that a node is; None for another, and for a module whose weight is computed."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return None
    if module is None:
        kind = _FUNCTIONS.get(operation_name(node), "")
        return Layer(node, x, kind, _EMPTY, None, "", _border(kind, _padding(node))) if kind else None
    kind = _kind(module)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not kind or weight is None or getattr(module, "max_norm", None) is not None:
        return None
    mode = getattr(module, "padding_mode", "zeros")
    border = _border(kind, getattr(module, "padding", 0) if mode == "zeros" else 0)
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding == "same" and set(module.kernel_size) == {1}:
        border = ""
    return Layer(node, x, kind, weight, bias, str(node.target), border)


def _kind(module: nn.Module) -> str:
    """How the weight of a layer is laid out; "" for what is none.

    Known are torch's own layers, the Conv1D of transformers (a linear layer with its weight transposed), and
    subclasses that compute the same as torch's.
    """
    for base in type(module).__mro__:
        if base.__module__.startswith(("torch.nn.modules", "transformers.pytorch_utils")):
            kind = _MODULES.get(base.__name__, "")
            return kind if base is type(module) or (kind and _computes_as(module, base)) else ""
    return ""


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass of a layer is that layer, for its weights and for others."""
    x, weight = _probe(module), module._parameters.get("weight")
    if x is None or weight is None or weight.is_meta:
        return False
    plain = copy.copy(module)
    plain.__class__ = base
    x = x.to(weight)
    with torch.no_grad():
        for factor in (1.0, 1.5):
            scaled = {"weight": weight * factor}
            results = [torch.func.functional_call(one, scaled, (x,)) for one in (module, plain)]
            if results[0].shape != results[1].shape or not torch.allclose(*results):
                return False
    return True


def _probe(module: nn.Module) -> Tensor | None:
    """Something that a layer can read."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        return torch.randn(2, module.in_features, generator=generator)
    if isinstance(module, nn.modules.conv._ConvNd):
        steps = zip(module.dilation, module.kernel_size, module.stride, strict=True)
        size = [dilation * (kernel - 1) + 1 + 2 * stride for dilation, kernel, stride in steps]
        return torch.randn(2, module.in_channels, *size, generator=generator)
    return None


def _padding(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)


def _border(kind: str, padding: Any) -> str:
    if kind == "transposed":
        return "is a transposed convolution, to which not all positions of its input give alike"
    if kind == "table":
        return "reads it as an index"
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding not in (0, "valid")
    return "pads it with zeros" if kind == "conv" and padded else ""


__all__ = ["Layer", "layer_of"]
