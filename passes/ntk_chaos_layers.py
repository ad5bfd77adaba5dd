"""The affine layers of a graph as the NTK form sees them: parameters, fan-in at a bulk pixel, strides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from kgraph.canonical import operation_name
from kgraph.passes.base import Workspace
from kgraph.passes.graph_parametrize import argument, bulk_parents, is_convolution, is_transposed


@dataclass(frozen=True)
class AffineLayer:
    """An affine layer of a graph.

    Attributes:
        weight_node, bias_node: nodes of its parameters.
        fan_in: inputs of one output unit; of a convolution at a bulk pixel.
        strides: product of a convolution's strides, 1 for a linear layer.
        transposed: whether its strides enlarge the image.
    """

    weight_node: fx.Node
    bias_node: fx.Node | None
    fan_in: int
    strides: int = 1
    transposed: bool = False

    @property
    def weight(self) -> str:
        return str(self.weight_node.target)

    @property
    def bias(self) -> str | None:
        return None if self.bias_node is None else str(self.bias_node.target)

    def variance(self, beta: float) -> float:
        """c^2 = (1 - beta^2) / fan_in; without bias 1 / fan_in."""
        return (1.0 if self.bias_node is None else 1 - beta**2) / self.fan_in


def affine_layer(work: Workspace, node: fx.Node) -> AffineLayer | None:
    """The affine layer that a node is, where its weight is a parameter; its bias may stand in a `ParentScale`."""
    name = operation_name(node)
    if name in ("linear", "addmm", "mm", "matmul") and node.op == "call_function":
        source, weight, bias = (1, 2, 0) if name == "addmm" else (0, 1, 2 if name == "linear" else 99)
        if not work.is_random(node.args[source]) or (found := _parameter(work, node, weight)) is None:
            return None
        fan_in = work.tensor(found).shape[1 if name == "linear" else 0]
        return AffineLayer(found, _parameter(work, node, bias), fan_in)
    if not is_convolution(node) or not work.is_random(node.args[0]) or (found := _parameter(work, node, 1)) is None:
        return None
    shape, transposed = work.tensor(found).shape, is_transposed(node)
    channels = shape[0] // int(argument(node, "groups") or 1) if transposed else shape[1]
    stride = argument(node, "stride")
    strides = [stride] if isinstance(stride, int) else list(stride or [1])
    product = math.prod(strides * (len(shape) - 2) if len(strides) == 1 else strides)
    return AffineLayer(found, _bias(work, node), channels * bulk_parents(node), product, transposed)


def _bias(work: Workspace, node: fx.Node) -> fx.Node | None:
    """Of a convolution: its own, or the one its parent scale adds."""
    own = _parameter(work, node, 2)
    readers = list(node.users)
    if own is not None or len(readers) != 1 or operation_name(readers[0]) not in ("ParentScale", "parent_scale"):
        return own
    return _parameter(work, readers[0], 2)


def _parameter(work: Workspace, node: fx.Node, at: int) -> fx.Node | None:
    value = node.args[at] if at < len(node.args) else None
    is_parameter = isinstance(value, fx.Node) and value.op == "get_attr" and work.tensor(value).is_floating_point()
    return value if is_parameter and isinstance(value, fx.Node) else None
