"""Lowering: what one traced call is in ATen, found once for every distinct call and replayed after that.

Calls are alike when function, constants, and shapes, strides, types and devices of the tensors agree. Each is run
once on fake tensors under the tracer that torch.export itself uses; a chain of 10,000 equal layers costs that once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree


class Untraceable(Exception):
    """The model cannot be traced symbolically; torch.export decides."""


@dataclass(frozen=True)
class Template:
    """The ATen nodes of one kind of call.

    Attributes:
        inputs: placeholders, one for every node among the call's arguments, in order.
        nodes: the operations, in order.
        outputs: leaves of the result: nodes, or constants.
        structure: of the result.
    """

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    structure: pytree.TreeSpec

    def result(self, leaf: Callable[[Any], Any]) -> Any:
        """The call's result with every leaf mapped."""
        return pytree.tree_unflatten([leaf(value) for value in self.outputs], self.structure)


class Lowering:
    """Fake values of one trace and the templates found for it."""

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)
        self._templates: dict[Any, Template] = {}
        self._shared: dict[Any, Tensor] = {}
        self._looks: dict[Any, int] = {}
        self._kinds: dict[int, tuple[Any, int]] = {}  # by identity, which the value kept here preserves
        self._kind_of: dict[fx.Node, int] = {}

    def fake(self, tensor: Tensor, name: str, *, batch: int | None = None) -> Tensor:
        """A fake of ``tensor``; its first dimension is symbolic where it has the size ``batch``."""
        dynamic = batch is not None and tensor.ndim > 0 and tensor.shape[0] == batch
        sizes = [DimDynamic.DUCK if dynamic and i == 0 else DimDynamic.STATIC for i in range(tensor.ndim)]
        context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * tensor.ndim)
        return self.mode.from_tensor(tensor, source=ConstantSource(name), symbolic_context=context)

    def shared(self, tensor: Tensor, name: str) -> Tensor:
        """One fake for all parameters that look alike."""
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._shared:
            self._shared[key] = self.fake(tensor.detach(), name)
        return self._shared[key]

    def remember(self, node: fx.Node, value: Any) -> None:
        """Note what a node's value looks like to the calls that read it."""
        if not isinstance(value, (Tensor, torch.SymInt)):
            return  # several tensors, read one by one
        kind = self._kinds.get(id(value))
        if kind is None:
            kind = self._kinds[id(value)] = value, self._looks.setdefault(_look(value), len(self._looks))
        self._kind_of[node] = kind[1]

    @property
    def specialized(self) -> bool:
        """Whether an operation fixed the batch size."""
        return bool(self.shapes.replacements)

    def template(self, method: bool, target: Any, args: Any, kwargs: Any) -> tuple[Template, list[fx.Node]]:
        """Template of a call whose arguments hold nodes, and those nodes in order."""
        inputs: list[fx.Node] = []
        key = (method, target, self._key(args, inputs), self._key(kwargs, inputs))
        found = self._templates.get(key)
        if found is None:
            found = self._templates[key] = self._lower(method, target, args, kwargs, inputs)
        return found, inputs

    def _key(self, value: Any, inputs: list[fx.Node]) -> Any:
        """What decides the template, as something hashable; collects the nodes on the way."""
        if isinstance(value, fx.Node):
            inputs.append(value)
            return fx.Node, self._kind_of[value]
        if isinstance(value, (tuple, list)):
            return type(value), *[self._key(item, inputs) for item in value]
        if isinstance(value, dict):
            return dict, *[(name, self._key(item, inputs)) for name, item in value.items()]
        if isinstance(value, slice):
            return slice, *[self._key(item, inputs) for item in (value.start, value.stop, value.step)]
        return type(value), value  # 1, 1.0 and True are equal, yet not the same argument

    def _lower(self, method: bool, target: Any, args: Any, kwargs: Any, inputs: list[fx.Node]) -> Template:
        structure: list[tuple[list[Any], pytree.TreeSpec]] = []

        def call(*values: Any) -> list[Any]:
            given = iter(values)
            own_args, own_kwargs = fx.node.map_arg((args, kwargs), lambda _: next(given))  # type: ignore[misc]
            function = getattr(own_args[0], target) if method else target
            result = function(*(own_args[1:] if method else own_args), **own_kwargs)
            leaves, spec = pytree.tree_flatten(tuple(result) if isinstance(result, torch.Size) else result)
            structure.append((leaves, spec))
            return [leaf for leaf in leaves if _is_traced(leaf)]

        with self.mode, torch.backends.cudnn.flags(enabled=False):  # as torch.export: some operations record the flag
            module = make_fx(call, pre_dispatch=True)(*(self._fresh(node.meta["val"]) for node in inputs))
        return _template(module.graph, *structure[-1])

    def _fresh(self, value: Any) -> Any:
        """Fakes are shared between nodes; the tracer tells tensors apart by identity."""
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def expression(size: Any) -> Any:
    """A size as something hashable: an int, or the expression of a symbolic size."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _look(value: Any) -> Any:
    """What operations can tell a value by, except the entries of a tensor."""
    if not isinstance(value, Tensor):
        return type(value), expression(value)
    return tuple(map(expression, value.shape)), tuple(map(expression, value.stride())), value.dtype, value.device


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def _template(graph: fx.Graph, leaves: list[Any], structure: pytree.TreeSpec) -> Template:
    nodes = tuple(node for node in graph.nodes if node.op not in ("placeholder", "output"))
    if any(node.op != "call_function" for node in nodes):
        raise Untraceable("the forward makes a tensor from constants")
    output = next(node for node in graph.nodes if node.op == "output")
    traced = iter(output.args[0])
    outputs = tuple(next(traced) if _is_traced(leaf) else leaf for leaf in leaves)
    for leaf in outputs:
        _check_output(leaf)
    return Template(tuple(n for n in graph.nodes if n.op == "placeholder"), nodes, outputs, structure)


def _check_output(leaf: Any) -> None:
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
    if isinstance(value, (torch.SymFloat, torch.SymBool)) or (isinstance(value, torch.SymInt) and not _known(value)):
        raise Untraceable("the forward turns a tensor's value or the batch size into a number")


def _known(size: torch.SymInt) -> bool:
    return size.node.hint is not None
