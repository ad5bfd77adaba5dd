"""Read a captured model as a chain; what is none is refused at the first node that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.capture import Graph
from kgraph.checks import choice, not_negative
from kgraph.errors import RuleError
from kgraph.maps import Pointwise, pointwise
from kgraph.nonlinear import is_pointwise_node, known_value
from kgraph.rules.conv import each_axis, paddings_of, tap_counts
from kgraph.rules.pointwise import is_pointwise
from kgraph.rules.weights import mean_square
from kgraph.site import shape_of, site_of
from kgraph.studies.finite_width.chain import Chain, ChainLayer, Distribution, law_of

_LINEAR = {"linear", "addmm", "mm", "matmul"}
_CONV = {"conv1d", "conv2d", "conv3d"}
_DROPOUT = {"dropout", "feature_dropout"}
_VIEWS = {"reshape", "view", "flatten", "unsqueeze", "squeeze", "to", "clone", "contiguous", *_DROPOUT}
_IDENTITY = pointwise("identity")


@dataclass(frozen=True)
class _Value:
    """An argument of a step: the result of step ``index`` (0 is the layer before)."""

    index: int


@dataclass(frozen=True)
class _Number:
    """An argument of a step that is a tensor of one known number."""

    value: float


@dataclass(frozen=True)
class _Step:
    """One operation of a pointwise function."""

    name: str
    call: Callable[..., Tensor]
    args: Any
    kwargs: Any


def read_chain(
    graph: Graph,
    distribution: Distribution = "measured",
    weight_variance: float | None = None,
    bias_variance: float | None = None,
) -> Chain:
    """The chain that a captured model is.

    Args:
        graph: the captured model.
        distribution: law of all matrices, or "measured" on the tensors.
        weight_variance, bias_variance: C_W and C_b of all layers; measured on the tensors when None.

    Raises:
        RuleError: the model is none; names the first node that breaks it, and its source line.
        InputError: an unknown distribution, or a variance that is negative.
    """
    choice("distribution", distribution, ("measured", "orthogonal", "gaussian"))
    for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        if value is not None:
            not_negative(name, value)
    return _Reader(graph, distribution, weight_variance, bias_variance).read()


class _Reader:
    def __init__(self, graph: Graph, distribution: Distribution, C_W: float | None, C_b: float | None) -> None:
        self.graph, self.C_W, self.C_b = graph, C_W, C_b
        self.distribution: Distribution = distribution
        self.module = graph.module
        self.random: set[fx.Node] = set()
        self.members: dict[fx.Node, int] = {}
        """The last layer's node and all pointwise functions of it, by step (0 is the layer)."""
        self.steps: list[_Step] = []
        self.layers: list[ChainLayer] = []
        self.used: set[int] = set()
        self.known: dict[str, Pointwise] = {"[]": _IDENTITY}
        self.notes = list(graph.notes)

    def read(self) -> Chain:
        for node in self.module.graph.nodes:
            arriving = [n for n in node.all_input_nodes if n in self.random]
            if node.op == "placeholder":
                self.members = self.members or {node: 0}
                self.random.add(node)
            elif arriving and not isinstance(node.meta.get("val"), (int, torch.SymInt)):  # sizes hold no random number
                self.random.add(node)
                self._visit(node, arriving)
        if not self.layers:
            raise RuleError("the model has no linear layer", hint="A chain has at least one")
        return Chain(self.graph.name, tuple(self.layers), tuple(self.notes))

    def _visit(self, node: fx.Node, arriving: list[fx.Node]) -> None:
        if any(n not in self.members for n in arriving):
            self._broken(node, "it reads a second input, or values from before the last linear layer")
        name = operation_name(node)
        if node.op == "output":
            return
        if name in _LINEAR | _CONV and len(arriving) == 1:
            self._add_layer(node, arriving[0], name)
            self.members, self.steps = {node: 0}, []
        elif name in _VIEWS:
            self._check_view(node, arriving[0], name)
            self.members[node] = self.members[arriving[0]]
        elif not self.layers:
            self._broken(node, "it acts on the input, before the first linear layer")
        elif self._acts_alike(node, arriving):
            self.steps.append(self._step(node))
            self.members[node] = len(self.steps)
        else:
            self._broken(node, "it is neither a linear layer nor one pointwise function for all units")

    def _broken(self, node: fx.Node, why: str) -> NoReturn:
        raise RuleError(
            f"the model is no chain of linear layers and pointwise functions: {operation_name(node)} breaks it, {why}",
            node=node.name,
            source=site_of(node).source or None,
            hint="The finite-width recursions hold for chains: pass one, such as the model up to this node",
        )

    def _check_view(self, node: fx.Node, before: fx.Node, name: str) -> None:
        old, new = (tuple(size for size in shape_of(n)[1:] if size > 1) for n in (before, node))
        if self.layers and old != new:
            self._broken(node, "it mixes units and positions")
        note = "dropout is left out, as in eval mode"
        if name in _DROPOUT and note not in self.notes:
            self.notes.append(note)

    def _acts_alike(self, node: fx.Node, arriving: list[fx.Node]) -> bool:
        """Whether a node is one pointwise function for all units; what else it reads is one number (no gain a unit)."""
        others = [known_value(n, self.module) for n in node.all_input_nodes if n not in arriving]
        if any(value.is_meta or value.unique().numel() != 1 for value in others):
            return False
        return is_pointwise_node(node) or (node.op == "call_function" and is_pointwise(node.target))

    def _step(self, node: fx.Node) -> _Step:
        def argument(n: fx.Node) -> Any:
            if n in self.members:
                return _Value(self.members[n])
            return _Number(float(known_value(n, self.module).flatten()[0]))

        args, kwargs = map_arg((node.args, node.kwargs), argument)  # type: ignore[misc]
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return _Step(f"{type(module).__name__} {node.target}", module, args, kwargs)
        return _Step(operation_name(node), node.target, args, kwargs)  # type: ignore[arg-type]

    def _function(self, end: int) -> tuple[Pointwise, str]:
        """The map from the last layer's value to step ``end``, made once for equal steps, and its name."""
        needed = {end}
        for index in range(end, 0, -1):
            if index in needed:
                step = self.steps[index - 1]
                needed |= {a.index for a in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(a, _Value)}
        steps = [(index, self.steps[index - 1]) for index in sorted(needed - {0})]
        key = repr([(index, step.name, step.args, step.kwargs) for index, step in steps])
        if key not in self.known:
            self.known[key] = Pointwise(lambda u: _run(steps, u))
        return self.known[key], "+".join(step.name.split()[0] for _, step in steps)

    def _add_layer(self, node: fx.Node, x: fx.Node, name: str) -> None:
        matrix, bias = self._parameters(node, x, name)
        phi, activation = self._function(self.members[x])
        law, law_how = law_of(matrix, self.distribution)
        layer = ChainLayer(
            name=node.name,
            module=site_of(node).path,
            op=name,
            source=site_of(node).source,
            activation=activation,
            phi=phi,
            width_in=matrix.shape[1],
            width_out=matrix.shape[0],
            C_W=matrix.shape[1] * mean_square(matrix) if self.C_W is None else self.C_W,
            C_b=self._bias_variance(bias),
            has_bias=bias is not None,
            law=law,
            law_how=law_how,
        )
        self.layers.append(layer)

    def _bias_variance(self, bias: Tensor | None) -> float:
        if bias is None:
            return 0.0
        if self.C_b is not None:
            return self.C_b
        return 0.0 if bias.is_meta else mean_square(bias)

    def _parameters(self, node: fx.Node, x: fx.Node, name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix [out, in] and the bias; refuses weights that are random, shared, or not one matrix a position."""
        args: list[Any] = list(node.args)
        if name == "addmm":
            args = [args[1], args[2], args[0]]
        if args[0] is not x or not isinstance(args[1], fx.Node) or node.kwargs:
            self._broken(node, "it is no layer with a weight of its own")
        own = self._roots(args[1])
        if own & self.used:
            self._broken(node, "its weight is used before, and the layers of a chain are independent")
        self.used |= own
        weight = known_value(args[1], self.module)
        bias = known_value(args[2], self.module) if len(args) > 2 and args[2] is not None else None
        if name in _CONV:
            return self._tap(node, weight, args), bias
        if weight.ndim != 2:
            self._broken(node, "its weight is no matrix")
        return (weight if name == "linear" else weight.T), bias

    def _roots(self, node: fx.Node) -> set[int]:
        """Identities of the tensors that a weight is made of."""
        if node.op != "get_attr":
            return set().union(*(self._roots(n) for n in node.all_input_nodes))
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return {id(value)}

    def _tap(self, node: fx.Node, weight: Tensor, args: list[Any]) -> Tensor:
        """The matrix of a convolution's one nonzero tap, if every position sees it."""
        stride, padding, dilation, groups = (*args[3:], *[1, 0, 1, 1][len(args[3:]) :])
        taps, flat = weight.shape[2:], weight.flatten(2)
        used = [0] if flat.shape[2] == 1 or weight.is_meta else flat.square().sum((0, 1)).nonzero().flatten().tolist()
        if groups != 1 or len(used) != 1:
            self._broken(node, "only one group with one nonzero tap is the same matrix at every position")
        dims, dilations = len(taps), each_axis(dilation, len(taps))
        paddings, strides = paddings_of(padding, taps, dilations), each_axis(stride, dims)
        places = torch.unravel_index(torch.tensor(used[0]), taps)
        old, new = shape_of(args[0])[-dims:], shape_of(node)[-dims:]
        for axis, place in enumerate(places):
            own = (old[axis], new[axis], taps[axis], strides[axis], paddings[axis], dilations[axis])
            if float(tap_counts(*own, transposed=False)[int(place)]) < 1:
                self._broken(node, "its tap reads padding at some positions")
        return flat[:, :, used[0]]


def _run(steps: list[tuple[int, _Step]], u: Tensor) -> Tensor:
    """Run the steps of a pointwise function."""
    values = {0: u}

    def argument(a: Any) -> Any:
        if isinstance(a, _Value):
            return values[a.index]
        return u.new_tensor(a.value) if isinstance(a, _Number) else a

    result = u
    for index, step in steps:
        args, kwargs = map_aggregate((step.args, step.kwargs), argument)  # type: ignore[misc]
        values[index] = result = step.call(*args, **kwargs)
    return result
