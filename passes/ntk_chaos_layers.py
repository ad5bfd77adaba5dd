"""The affine layers of a graph as the NTK form sees them: parameters, fan-in at a bulk pixel, strides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from kgraph.canonical import operation_name
from kgraph.nonlinear import find_regions
from kgraph.passes.base import Workspace
from kgraph.passes.graph_parametrize import argument, bulk_parents, is_convolution, is_transposed
from kgraph.passes.reinitialize import runtime_scale

SAME_CHANNELS = ("dropout", "reshape", "view", "flatten", "permute", "transpose", "contiguous", "clone")
"""Operations that keep values and channels."""
_SAME_VALUES = (*SAME_CHANNELS, "pad", "constant_pad_nd", "ParentScale", "parent_scale")
_Q_TOLERANCE = 0.1
_PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm", "einsum", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class AffineLayer:
    """An affine layer of a graph.

    Attributes:
        weight_node, bias_node: nodes of its parameters.
        fan_in: inputs of one output unit; of a convolution at a bulk pixel.
        strides: product of a convolution's strides, 1 for a linear layer.
        transposed: whether its strides enlarge the image.
        factor: number that the forward multiplies the weight by.
    """

    weight_node: fx.Node
    bias_node: fx.Node | None
    fan_in: int
    strides: int = 1
    transposed: bool = False
    factor: float = 1.0

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
        if not work.is_random(node.args[source]) or (weighed := _weight(work, node, weight)) is None:
            return None
        found, factor = weighed
        fan_in = work.tensor(found).shape[1 if name == "linear" else 0]
        return AffineLayer(found, _parameter(work, node, bias), fan_in, factor=factor)
    if not is_convolution(node) or not work.is_random(node.args[0]) or (weighed := _weight(work, node, 1)) is None:
        return None
    found, factor = weighed
    shape, transposed = work.tensor(found).shape, is_transposed(node)
    channels = shape[0] // int(argument(node, "groups") or 1) if transposed else shape[1]
    stride = argument(node, "stride")
    strides = [stride] if isinstance(stride, int) else list(stride or [1])
    product = math.prod(strides * (len(shape) - 2) if len(strides) == 1 else strides)
    return AffineLayer(found, _bias(work, node), channels * bulk_parents(node), product, transposed, factor)


def undrawable(work: Workspace, node: fx.Node) -> bool:
    """Whether a node multiplies by parameters that are not its own weight: transposed, split, computed, or a cell's."""
    name = operation_name(node)
    convolution = name.startswith("conv")
    if node.op != "call_function" or not (name in _PRODUCTS or convolution) or not work.carries_random(node):
        return False
    bias = node.args[:1] if name == "addmm" else node.args[2:3] if name == "linear" or convolution else ()
    operands = [n for n in node.all_input_nodes if not work.carries_random(n) and n not in bias]
    return any(_of_parameters(work, operand) for operand in operands)


def _of_parameters(work: Workspace, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(work.tensor(node), nn.Parameter)
    return any(_of_parameters(work, before) for before in node.all_input_nodes)


def _bias(work: Workspace, node: fx.Node) -> fx.Node | None:
    """Of a convolution: its own, or the one its parent scale adds."""
    own = _parameter(work, node, 2)
    readers = list(node.users)
    if own is not None or len(readers) != 1 or operation_name(readers[0]) not in ("ParentScale", "parent_scale"):
        return own
    return _parameter(work, readers[0], 2)


def _parameter(work: Workspace, node: fx.Node, at: int) -> fx.Node | None:
    value = node.args[at] if at < len(node.args) else None
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return value if isinstance(work.tensor(value), nn.Parameter) else None  # a buffer is no weight: never drawn


def _weight(work: Workspace, node: fx.Node, at: int) -> tuple[fx.Node, float] | None:
    """A layer's parameter, and the number that the forward multiplies it by (an equalized learning rate)."""
    found = _parameter(work, node, at)
    return (found, 1.0) if found is not None else runtime_scale(work, node.args[at])


def note_variances(work: Workspace) -> None:
    """Say where q is not 1 at an activation or a layer: sums of branches, poolings and attention change it."""
    kernels, known = work.kernels(), set[fx.Node]()
    for region in find_regions(work.graph.module, work.is_random):
        known |= {region.end, _origin(region.source)}
        if not region.gate and region.source in kernels:
            _note(work, float(kernels[region.source].merged.q), region.end, "its r is another one there")
    for node in work.nodes:
        source = next((n for n in node.all_input_nodes if n in kernels), None)
        if source is None or affine_layer(work, node) is None:
            continue
        source = _origin(source)
        if not known & {source, node}:  # q at the activation in front or behind says it already
            _note(work, float(kernels[source].merged.q), node, "nor is it at its output")


def _origin(node: fx.Node) -> fx.Node:
    """The node whose values another shows, reshaped, padded or scaled by its parents."""
    while operation_name(node) in _SAME_VALUES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _note(work: Workspace, q: float, node: fx.Node, consequence: str) -> None:
    if abs(q - 1) > _Q_TOLERANCE:
        work.unmet.append(f"q = {q:.4g}, not 1, at the input of {node.name}: {consequence}")
