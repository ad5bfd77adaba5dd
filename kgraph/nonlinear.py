"""Find the nonlinear layers of a graph: pointwise regions of one source, activations and gates apart.

A region is a set of pointwise nodes that are functions of one and the same tensor (x * sigmoid(x),
relu6(x + 3) * x / 6, a single relu). Its end is the node that others read. A region whose end only multiplies
another tensor, and which is bounded like a sigmoid, is a gate: it scales, it does not shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from kgraph.canonical import aten
from kgraph.maps import Pointwise
from kgraph.modules import ShapedActivation
from kgraph.rules.pointwise import function_of, is_pointwise, pointwise_of_module, shaped_map

_LINEAR = {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.neg.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
}
_GATES = {aten.sigmoid.default, aten.hardsigmoid.default}
_NOT_FLOATING = ("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "bitwise_not", "isnan", "to", "_to_copy")


@dataclass(frozen=True, eq=False)
class Region:
    """A pointwise region of one source.

    Attributes:
        source: the node it is a function of.
        end: the node whose value is the function's.
        nodes: all nodes, in order; the last is ``end``.
        module: the graph module, for activations that are modules.
        gate: whether it only scales another tensor.
    """

    source: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    module: fx.GraphModule
    gate: bool

    @cached_property
    def fn(self) -> Pointwise:
        """The region as a pointwise map, with a closed form where it is a single known function."""
        node = self.end
        if len(self.nodes) == 1 and node.op == "call_module":
            activation = self.module.get_submodule(str(node.target))
            return (
                shaped_map(activation) if isinstance(activation, ShapedActivation) else pointwise_of_module(activation)
            )
        if len(self.nodes) == 1:
            index = node.args.index(self.source)
            return function_of(node.target, node.args, dict(node.kwargs), index)  # type: ignore[arg-type]
        return Pointwise(self.evaluate)

    def evaluate(self, u: Tensor) -> Tensor:
        """Run the region's own nodes on ``u``."""
        known: dict[fx.Node, Any] = {self.source: u}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
            if node.op == "call_module":
                known[node] = self.module.get_submodule(str(node.target))(*args, **kwargs)
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[self.end]


def is_activation(node: fx.Node) -> bool:
    """Whether a single node is a nonlinear pointwise function of one tensor (used to count depth)."""
    if node.op == "call_module":
        return isinstance(_submodule(node), (ShapedActivation, *_ACTIVATION_MODULES))
    if not is_pointwise(node.target) or node.target in _LINEAR or not _is_floating(node):
        return False
    return len(node.all_input_nodes) == 1


_ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def _submodule(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    name = getattr(node.target, "_schema", None)
    plain = name.name.split("::")[-1] if name is not None else ""
    return plain not in _NOT_FLOATING and not (isinstance(value, Tensor) and not value.is_floating_point())


def find_regions(module: fx.GraphModule, random: Callable[[fx.Node], bool]) -> list[Region]:
    """All nonlinear regions, in graph order.

    Args:
        module: the flat graph.
        random: whether a node's value is random (depends on the input), as the propagation found.
    """
    source: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        root = _source_of(node, source, random)
        if root is not None:
            source[node] = root
            members.setdefault(root, []).append(node)
    regions = []
    for root, nodes in members.items():
        regions += [_region(module, root, end, nodes) for end in _ends(nodes)]
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    nonlinear = [r for r in regions if any(not _is_linear(n) for n in r.nodes)]
    return sorted(nonlinear, key=lambda region: order[region.end])


def _is_linear(node: fx.Node) -> bool:
    """Linear as a node: adds and scales (a product of two members of the region is not)."""
    if node.target not in _LINEAR:
        return False
    products = (aten.mul.Tensor, aten.div.Tensor)
    return not (node.target in products and len(node.all_input_nodes) + _repeats(node) > 1)


def _repeats(node: fx.Node) -> int:
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return len(tensors) - len(set(tensors))


def _source_of(node: fx.Node, source: dict[fx.Node, fx.Node], random: Callable[[fx.Node], bool]) -> fx.Node | None:
    if not random(node) or not _pointwise_node(node):
        return None
    inputs = node.all_input_nodes
    if not inputs or not all(random(n) for n in inputs):
        return None
    roots = {source.get(n, n) for n in inputs}
    if len(roots) == 1:
        return roots.pop()
    direct = set(inputs)
    return direct.pop() if len(direct) == 1 else None


def _pointwise_node(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_submodule(node), (ShapedActivation, *_ACTIVATION_MODULES))
    return node.op == "call_function" and is_pointwise(node.target) and _is_floating(node)


def _ends(nodes: list[fx.Node]) -> list[fx.Node]:
    """Members that somebody outside reads."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _region(module: fx.GraphModule, root: fx.Node, end: fx.Node, nodes: list[fx.Node]) -> Region:
    needed, queue = {end}, [end]
    inside = set(nodes)
    while queue:
        for before in queue.pop().all_input_nodes:
            if before in inside and before not in needed:
                needed.add(before)
                queue.append(before)
    kept = tuple(n for n in nodes if n in needed)
    return Region(root, end, kept, module, _is_gate(end, kept))


def _is_gate(end: fx.Node, nodes: tuple[fx.Node, ...]) -> bool:
    multiplies = [u for u in end.users if u.target in (aten.mul.Tensor,) and u not in nodes]
    views = [u for u in end.users if u not in multiplies]
    return bool(multiplies) and not views and any(n.target in _GATES for n in nodes) and _bounded(nodes)


def _bounded(nodes: tuple[fx.Node, ...]) -> bool:
    """A gate's region is a sigmoid of something, perhaps shifted or scaled; x * sigmoid(x) is an activation."""
    return all(n.target in _GATES or _is_linear(n) for n in nodes)
