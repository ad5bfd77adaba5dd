"""Find the nonlinear layers of a graph: pointwise regions of one source, activations and gates apart.

A region is a set of pointwise nodes that are functions of one and the same tensor (x * sigmoid(x),
relu6(x + 3) * x / 6, a single relu). Its end is the node that others read. A region whose end only multiplies
another tensor, and which is bounded like a sigmoid, is a gate: it scales, it does not shape. A learnable slope
(PReLU) counts as the numbers that it holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import aten
from kgraph.maps import Pointwise
from kgraph.modules import ShapedActivation
from kgraph.multiples import Multiples
from kgraph.rules.pointwise import function_of, is_pointwise, leaky, pointwise_of_module, shaped_map
from kgraph.rules.prelu import average, spread

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
_RANDOM = {aten.rrelu.default}
"""Tagged pointwise, but no function: drawn anew at every call."""
_GATES = {aten.sigmoid.default, aten.hardsigmoid.default}
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
_NOT_FLOATING = ("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "bitwise_not", "isnan", "to", "_to_copy")


@dataclass(frozen=True)
class _Slot:
    """Stands for the value of a step: 0 is the argument."""

    index: int


@lru_cache(maxsize=256)
def _function_of(steps: tuple[tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]) -> Pointwise:
    def run(u: Tensor) -> Tensor:
        known = [u]
        for target, args, kwargs in steps:
            given = [known[a.index] if isinstance(a, _Slot) else a for a in args]
            if target in _CASTS:  # of masks, to the type that the model has there
                known.append(given[0].to(u.dtype))
                continue
            known.append(target(*given, **{k: known[a.index] if isinstance(a, _Slot) else a for k, a in kwargs}))
        return known[-1]

    return Pointwise(run)


@dataclass(frozen=True, eq=False)
class Region:
    """A pointwise region of one source.

    Attributes:
        source: the node it is a function of.
        end: the node whose value is the function's.
        nodes: all nodes, in order; the last is ``end``.
        module: the graph module, for activations that are modules.
        gate: whether it only scales another tensor.
        getters: of every parameter of the graph, the nodes that stand for it.
        of_source: all regions of the same source, this one among them.
    """

    source: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    module: fx.GraphModule
    gate: bool
    getters: dict[str, list[fx.Node]] = field(default_factory=dict, repr=False)
    of_source: list[Region] = field(default_factory=list, repr=False)

    @cached_property
    def learnable(self) -> tuple[fx.Node, ...]:
        """The nodes of its learnable slopes, in order."""
        return tuple(weight for node in self.nodes for weight in _slopes_of(node))

    @cached_property
    def slopes(self) -> dict[fx.Node, tuple[float, float]]:
        """Mean and standard deviation over channels of every learnable slope."""
        return {weight: spread(known_value(weight, self.module)) for weight in self.learnable}

    @cached_property
    def fn(self) -> Pointwise:
        """The region as a pointwise map, with a closed form where it is a single known function.

        Slopes that differ from channel to channel are averaged over: see `kgraph.rules.prelu`.
        """
        middle = self._map(0.0)
        if not any(deviation for _, deviation in self.slopes.values()):
            return middle
        return average(self._map(-1.0), self._map(1.0), middle)

    @cached_property
    def everywhere(self) -> bool:
        """Whether it is a function of every number; log and sqrt are not, and have no Gaussian integral."""
        return not bool(self.fn(torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)).isnan().any())

    def _map(self, at: float) -> Pointwise:
        """The map whose slopes lie ``at`` standard deviations from their mean."""
        node = self.end
        if len(self.nodes) > 1 or node.args.count(self.source) > 1:
            return self._shared() or Pointwise(partial(self._run, at))
        own = tuple(self._slope(weight, at) for weight in self.learnable)
        if node.op != "call_module":
            if own:
                return leaky(own[0])
            index = node.args.index(self.source)
            return function_of(node.target, node.args, dict(node.kwargs), index)  # type: ignore[arg-type]
        activation = self.module.get_submodule(str(node.target))
        if isinstance(activation, ShapedActivation):
            return shaped_map(activation, own)
        return pointwise_of_module(activation)

    def _shared(self) -> Pointwise | None:
        """One map for all regions of the same operations: a network has many copies of few functions."""
        if self.learnable or any(node.op != "call_function" for node in self.nodes):
            return None
        place = {self.source: _Slot(0)} | {node: _Slot(i + 1) for i, node in enumerate(self.nodes)}
        steps = []
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), place.__getitem__)  # type: ignore[misc]
            steps.append((node.target, args, tuple(kwargs.items())))
        try:
            return _function_of(tuple(steps))
        except TypeError:  # a list among the arguments
            return None

    def _slope(self, weight: fx.Node, at: float) -> float:
        mean, deviation = self.slopes[weight]
        return mean + at * deviation

    def _run(self, at: float, u: Tensor) -> Tensor:
        """Run the region's own nodes on ``u``."""
        known: dict[fx.Node, Any] = {self.source: u}
        known |= {weight: u.new_tensor([self._slope(weight, at)]) for weight in self.learnable}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
            if node.op == "call_module":
                known[node] = self.module.get_submodule(str(node.target))(*args, **kwargs)
            elif node.target in _CASTS:
                known[node] = args[0].to(u.dtype)
            elif node.target is aten.prelu.default:
                known[node] = torch.where(args[0] > 0, args[0], args[1] * args[0])
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[self.end]


def known_value(node: fx.Node, module: fx.GraphModule) -> Tensor:
    """Value of a node that depends on no input: a parameter, or computed from parameters."""
    if node.op != "get_attr":
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known_value(n, module))  # type: ignore[misc]
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach()


def _slopes_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a node takes besides its input: the slope of a prelu, those of a shaped activation."""
    if node.target is aten.prelu.default or node.op == "call_module":
        return tuple(weight for weight in node.args[1:] if isinstance(weight, fx.Node))
    return ()


def is_activation(node: fx.Node) -> bool:
    """Whether a single node is a nonlinear pointwise function of one tensor (used to count depth)."""
    if node.op == "call_module":
        return isinstance(_submodule(node), (ShapedActivation, *_ACTIVATION_MODULES))
    if node.target is aten.prelu.default:
        return True
    if not is_pointwise(node.target) or node.target in _LINEAR or not _is_floating(node):
        return False
    return len(node.all_input_nodes) == 1


_ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def _submodule(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _is_floating(node: fx.Node) -> bool:
    if any(_is_complex(n) for n in node.all_input_nodes):  # the absolute value of a complex number, say
        return False
    value = node.meta.get("val")
    name = getattr(node.target, "_schema", None)
    plain = name.name.split("::")[-1] if name is not None else ""
    return plain not in _NOT_FLOATING and not (isinstance(value, Tensor) and not value.is_floating_point())


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def find_regions(module: fx.GraphModule, random: Callable[[fx.Node], bool]) -> list[Region]:
    """All nonlinear regions, in graph order.

    None goes through a sum of multiples of one tensor that stops a gradient: its value is linear, and its gradient,
    which is what it was written for, would be lost in a function of the region's source.

    Args:
        module: the flat graph.
        random: whether a node's value is random (depends on the input), as the propagation found.
    """
    source: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    sums = Multiples(module.graph, random).stopped()
    for node in module.graph.nodes:
        root = _source_of(module, node, source, random) if node not in sums else None
        if root is not None:
            source[node] = root
            members.setdefault(root, []).append(node)
    getters: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            getters.setdefault(str(node.target), []).append(node)
    regions = []
    for root, nodes in members.items():
        own: list[Region] = []
        own += [_region(module, root, end, nodes, getters, own) for end in _ends(nodes)]
        regions += own
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    nonlinear = [r for r in regions if any(not _is_linear(n) for n in r.nodes) and not _is_affine(r)]
    return sorted(nonlinear, key=lambda region: order[region.end])


def _is_affine(region: Region) -> bool:
    """Whether a region is ``a u + b`` by what it computes (a clone, a lerp, a clamp far out), however it is written."""
    if region.learnable or any(node.op != "call_function" for node in region.nodes) or region.fn.closed is not None:
        return False
    if region.fn not in _affine:
        u = torch.cat([torch.linspace(-7.3, 6.1, 41), torch.linspace(-1003.7, 996.1, 41)]).double()
        values = region.fn(u).double()
        line = values[0] + (values[-1] - values[0]) * ((u - u[0]) / (u[-1] - u[0]))
        _affine[region.fn] = bool(((values - line).abs() <= _ROUNDING * values.abs().max()).all())
    return _affine[region.fn]


_affine: weakref.WeakKeyDictionary[Pointwise, bool] = weakref.WeakKeyDictionary()
_ROUNDING = 1e-9


def _is_linear(node: fx.Node) -> bool:
    """Linear as a node: adds and scales (a product of two members of the region is not)."""
    if node.target not in _LINEAR:
        return False
    products = (aten.mul.Tensor, aten.div.Tensor)
    return not (node.target in products and len(node.all_input_nodes) + _repeats(node) > 1)


def _repeats(node: fx.Node) -> int:
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return len(tensors) - len(set(tensors))


def _source_of(
    module: fx.GraphModule, node: fx.Node, source: dict[fx.Node, fx.Node], random: Callable[[fx.Node], bool]
) -> fx.Node | None:
    if not random(node) or not is_pointwise_node(node):
        return None
    weights = _slopes_of(node)
    inputs = [n for n in node.all_input_nodes if n not in weights]
    if not inputs or not all(random(n) for n in inputs) or not all(_is_known(weight, random) for weight in weights):
        return None
    if any(spread(known_value(weight, module))[1] for weight in weights):
        return inputs[0]  # channels differ from here on: what came before is one function for all of them
    roots = {source.get(n, n) for n in inputs}
    if len(roots) == 1:
        return roots.pop()
    direct = set(inputs)
    return direct.pop() if len(direct) == 1 else None


def _is_known(node: fx.Node, random: Callable[[fx.Node], bool]) -> bool:
    """Whether a slope depends on no input and can be read off the graph."""
    inward = node.op == "call_function" and all(_is_known(n, random) for n in node.all_input_nodes)
    return not random(node) and (node.op == "get_attr" or inward)


def is_pointwise_node(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_submodule(node), (ShapedActivation, *_ACTIVATION_MODULES))
    named = (is_pointwise(node.target) and node.target not in _RANDOM) or node.target is aten.prelu.default
    return node.op == "call_function" and ((named and _is_floating(node)) or _is_mask(node))


def _is_mask(node: fx.Node) -> bool:
    """Whether a node is a comparison, or one as a number: a part of where(x > 0, x, f(x)), not a function by itself."""
    if _is_truth(node):
        return is_pointwise(node.target) and not any(_is_complex(n) for n in node.all_input_nodes)
    return node.target in _CASTS and isinstance(node.args[0], fx.Node) and _is_truth(node.args[0])


def _is_truth(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _ends(nodes: list[fx.Node]) -> list[fx.Node]:
    """Members that somebody outside reads, masks apart."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users) and not _is_mask(node)]


def _region(
    module: fx.GraphModule,
    root: fx.Node,
    end: fx.Node,
    nodes: list[fx.Node],
    getters: dict[str, list[fx.Node]],
    of_source: list[Region],
) -> Region:
    needed, queue = {end}, [end]
    inside = set(nodes)
    while queue:
        for before in queue.pop().all_input_nodes:
            if before in inside and before not in needed:
                needed.add(before)
                queue.append(before)
    kept = tuple(n for n in nodes if n in needed)
    return Region(root, end, kept, module, _is_gate(end, kept), getters, of_source)


def _is_gate(end: fx.Node, nodes: tuple[fx.Node, ...]) -> bool:
    multiplies = [u for u in end.users if u.target in (aten.mul.Tensor,) and u not in nodes]
    views = [u for u in end.users if u not in multiplies]
    return bool(multiplies) and not views and any(n.target in _GATES for n in nodes) and _bounded(nodes)


def _bounded(nodes: tuple[fx.Node, ...]) -> bool:
    """A gate's region is a sigmoid of something, perhaps shifted or scaled; x * sigmoid(x) is an activation."""
    return all(n.target in _GATES or _is_linear(n) for n in nodes)
