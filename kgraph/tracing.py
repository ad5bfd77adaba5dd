"""The fast front end: symbolic tracing of very deep plain models, straight into the export path's vocabulary.

torch.export spends 10 to 15 ms on a layer. Here the model's forward runs once on proxies that know their shapes;
every call is replaced at once by its ATen nodes (see `kgraph.lowering`), so a layer costs what its nodes cost.
Whatever proxies cannot follow is refused, and torch.export captures the model.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from kgraph.canonical import aten, canonicalize_graph
from kgraph.inputs import Inputs, batch_size
from kgraph.lowering import Lowering, Template, Untraceable, expression
from kgraph.site import Site, concrete_shape, is_library_file

_OF_AUTOGRAD = ("requires_grad", "grad", "grad_fn", "is_leaf", "data")


def trace(model: nn.Module, inputs: Inputs, names: list[str]) -> fx.GraphModule:
    """Trace ``model`` in its present mode into a flat graph of ATen operations over the model's own tensors.

    Args:
        model: left as it was, whatever its forward assigns.
        inputs: example inputs; dimensions 0 of the batch size become symbolic.
        names: parameter names of ``forward`` for the positional inputs.

    Raises:
        Untraceable: proxies cannot follow the forward.
    """
    tracer = _Tracer(inputs, names)
    with _attributes_kept(model), torch.random.fork_rng(devices=[]):
        try:
            graph = tracer.trace(model)
        except Untraceable:
            raise
        except Exception as error:  # user code on proxies raises anything; torch.export says what it means
            raise Untraceable(f"{type(error).__name__}: {error}") from error
    if tracer.lowering.specialized:
        raise Untraceable("an operation fixed the batch size")
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # of a call of a function under fx.wrap; the node here is one operation of it
    canonicalize_graph(graph, lambda node: node.meta["site"].source)
    graph._tracer_cls = None  # as a graph made by torch.export
    tensors = dict(_named_tensors(model))
    return fx.GraphModule({str(n.target): tensors[str(n.target)] for n in graph.nodes if n.op == "get_attr"}, graph)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """A forward that stores tensors on its modules would leave proxies there: put back, and refused."""
    modules = list(model.modules())
    spaces: list[dict[str, Any]] = [vars(m) for m in modules]
    spaces += [cast(dict[str, Any], s) for m in modules for s in (m._parameters, m._buffers, m._modules)]
    before = [(space, dict(space)) for space in spaces]
    changed = False
    try:
        yield
    finally:
        for space, kept in before:
            if space.keys() != kept.keys() or any(space[key] is not kept[key] for key in kept):
                space.clear()
                space.update(kept)
                changed = True
    if changed:
        raise Untraceable("the forward assigns to its modules")


class _Value(fx.Proxy):
    """A proxy whose properties (shape, dtype, device, ...) are those of its fake tensor."""

    def __getattr__(self, name: str) -> Any:
        if name in _OF_AUTOGRAD:
            raise Untraceable(f"the forward reads {name}")
        if callable(getattr(torch.Tensor, name, None)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_name}__", _in_place(_name))  # fx would record the operation out of place


class _Tracer(fx.Tracer):
    """Runs the forward on proxies; every call becomes the nodes of its template."""

    proxy_buffer_attributes = True

    def __init__(self, inputs: Inputs, names: list[str]) -> None:
        super().__init__()
        self.inputs, self.argument_names, self.gradients = inputs, names, torch.is_grad_enabled()
        self.lowering = Lowering()
        self._sizes: dict[Any, fx.Node] = {}
        self._tensors: dict[int, _Value] = {}
        self._paths = _Paths()
        self._stack: list[Site] = []

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Nodes for the model's tensors, then for the inputs; and the function that runs the model on them."""
        self._paths = _Paths(self.root)
        last = {id(tensor): name for name, tensor in _named_tensors(self.root)}
        for name, tensor in _named_tensors(self.root):
            if last[id(tensor)] == name:
                node = self._node("get_attr", name, self.lowering.shared(tensor, name))
                self._tensors[id(tensor)] = _Value(node, self)
        leaves, structure = pytree.tree_flatten(tuple(self.inputs))
        names = _leaf_names(self.inputs, self.argument_names)
        values = [self._input(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        self._batch_node(values)

        def run(*flat: Any):  # not annotated: fx would write the annotation into the graph's code
            args, kwargs = pytree.tree_unflatten(flat, structure)
            out, spec = pytree.tree_flatten(self.root(*args, **kwargs))
            info = _PyTreeInfo([*self.argument_names, *kwargs], structure, spec)
            self.graph._codegen = _PyTreeCodeGen(info)
            return tuple(out)

        return run, values

    def _input(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            self._node("placeholder", name, value)
            return value  # a constant of this graph, as for torch.export
        fake = self.lowering.fake(value, name, batch=batch_size(self.inputs))
        return _Value(self._node("placeholder", name, fake), self)

    def _batch_node(self, values: list[Any]) -> None:
        """One node for the batch size; removed when nobody reads it."""
        for value in reversed([v for v in values if isinstance(v, _Value)]):
            fake = value.node.meta["val"]
            if fake.ndim and isinstance(fake.shape[0], torch.SymInt):
                self._remember(self.graph.call_function(aten.sym_size.int, (value.node, 0)), fake.shape[0], Site())
                return

    def _node(self, kind: str, target: str, value: Any) -> fx.Node:
        node = self.graph.create_node(kind, target, (), {})
        return self._remember(node, value, Site(shape=concrete_shape(value)))

    def _remember(self, node: fx.Node, value: Any, site: Site) -> fx.Node:
        node.meta = {"val": value, "site": site}
        self.lowering.remember(node, value)
        if isinstance(value, torch.SymInt):
            self._sizes.setdefault(expression(value), node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Proxies in place of parameters and buffers."""
        if isinstance(attr_val, nn.Module):
            self._paths.accessed(attr_val, self._stack[-1].path, attr)
        return self._tensors.get(id(attr_val), attr_val) if isinstance(attr_val, Tensor) else attr_val

    def create_arg(self, a: Any) -> Any:
        """Refuse tensors that are no part of the model's state: they would become constants of the model."""
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                raise Untraceable("the forward uses a tensor that is neither a parameter nor a buffer")
            return self._tensors[id(a)].node
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into every module and remember the calls around each node."""
        outer = self._stack[-1] if self._stack else None
        path, call = self._paths.enter(m, outer.path if outer else "")
        ancestors = (*outer.ancestors, outer.path) if outer else ()
        self._stack.append(Site(path, call, ancestors))
        try:
            return forward(*args, **kwargs)
        finally:
            self._stack.pop()

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Replace a call by the nodes of its template; the result holds proxies and plain constants."""
        if torch._C._is_any_autocast_enabled():
            raise Untraceable("autocast")
        if torch.is_grad_enabled() != self.gradients:
            raise Untraceable("a region with or without gradients")
        method = kind == "call_method"
        template, inputs = self.lowering.template(method, target, self.create_arg(args), self.create_arg(kwargs))
        return self._replay(template, inputs)

    def _replay(self, template: Template, inputs: list[fx.Node]) -> Any:
        known = dict(zip(template.inputs, inputs, strict=True))
        for node in template.nodes:
            known[node] = self._copy(node, known)

        def leaf(value: Any) -> Any:
            return _Value(known[value], self) if isinstance(value, fx.Node) else value

        return template.result(leaf)

    def _copy(self, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and expression(value) in self._sizes:
            return self._sizes[expression(value)]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
        copy = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        inner = self._stack[-1]
        site = Site(inner.path, inner.call, inner.ancestors, _source(), concrete_shape(value))
        return self._remember(copy, value, site)


class _Paths:
    """Names of module calls: a module reachable under several names is called by one of them at a time."""

    def __init__(self, root: nn.Module | None = None) -> None:
        self._names: dict[int, list[str]] = {}
        self._accessed: dict[tuple[int, str], list[str]] = {}
        self._calls: dict[str, int] = {}
        self._turn: dict[tuple[int, str], int] = {}
        for name, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            self._names.setdefault(id(module), []).append(name)

    def accessed(self, module: nn.Module, outer: str, attribute: str) -> None:
        """The forward of the module at ``outer`` looked ``module`` up as an attribute."""
        if len(self._names.get(id(module), ())) > 1:
            self._accessed.setdefault((id(module), outer), []).append(attribute)

    def enter(self, module: nn.Module, outer: str) -> tuple[str, int]:
        """Path and call index of a call of ``module`` inside the call of the module at ``outer``."""
        names = self._names.get(id(module))
        if names is None:
            raise Untraceable("the forward calls a module that is no submodule")
        path = names[0] if len(names) == 1 else self._choose(module, names, outer)
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        return path, index

    def _choose(self, module: nn.Module, names: list[str], outer: str) -> str:
        key, prefix = (id(module), outer), f"{outer}." if outer else ""
        inside = [name for name in names if name.startswith(prefix)]
        while self._accessed.get(key):
            attribute = prefix + self._accessed[key].pop()
            if attribute in inside:
                return attribute
        if len(inside) != 1 and any("." in name[len(prefix) :] for name in inside):
            raise Untraceable("a module under several names")
        turn = self._turn.get(key, 0)  # a container calls its children in order
        self._turn[key] = turn + 1
        return inside[turn % len(inside)]


def _leaf_names(inputs: Inputs, names: list[str]) -> list[str]:
    """Placeholder names: the forward's parameter, with the place inside it where that is a structure."""
    named = dict(zip(names, inputs.args, strict=True)) | inputs.kwargs
    paths = [path for path, _ in pytree.tree_flatten_with_path(named)[0]]
    keys = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in path] for path in paths]
    return ["_".join(parts) for parts in keys]


def _source() -> str:
    """``file.py:line`` of the innermost forward that is not PyTorch's own; of PyTorch's where there is no other."""
    frame: FrameType | None = sys._getframe(1)
    innermost = ""
    while frame is not None and frame.f_code is not _RUN:
        file = frame.f_code.co_filename
        if frame.f_code.co_name == "forward" and file != __file__ and not file.startswith(_GENERATED):
            line = f"{os.path.basename(file)}:{frame.f_lineno}"
            if not is_library_file(file):
                return line
            innermost = innermost or line
        frame = frame.f_back
    return innermost


_RUN = fx.Tracer.trace.__code__
_GENERATED = "<eval_with_key>"
"""File name of the code of a GraphModule."""
