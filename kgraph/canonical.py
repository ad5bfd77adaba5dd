"""One vocabulary: rewrite an exported graph into functional ATen overloads without export's own noise.

Dropped: metadata assertions, guards, aliases and casts that change nothing. Inlined: grad-mode regions. Where
gradients are stopped is remembered (`kgraph.gradient_stops`).
Made functional: in-place operations (a later reader of the overwritten value reads the new one).
Recognized: norms in other spellings (`kgraph.written_norms`) and stochastic depth (`kgraph.drop_path`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from kgraph.drop_path import fuse_drop_paths
from kgraph.gradient_stops import DETACHES, note_detaches, read_instead, stop, stopped, without_stops
from kgraph.written_norms import fuse_norms

aten = torch.ops.aten

DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
"""All take (x, probability, train)."""

_NOISE = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}
_COPIES = {aten.alias.default, aten.lift_fresh_copy.default, *DETACHES}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "select", "slice", "narrow", "transpose", "t", "numpy_T", "permute"),
    *("expand", "unsqueeze", "squeeze", "contiguous", "getitem", "unbind", "chunk", "split", "split_with_sizes"),
}
_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}
"""What puts a changed view back into its base."""


_LOGICAL = {
    aten.bitwise_not.default: aten.logical_not.default,
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.bitwise_xor.Tensor: aten.logical_xor.default,
    aten.__and__.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.__xor__.Tensor: aten.logical_xor.default,
}
"""Of truth values the same, and defined for numbers too."""

_LIKE = {
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
}
"""Operations that read their second tensor for its shape alone, and the operation on sizes that each is."""


def canonicalize(module: fx.GraphModule, line: Callable[[fx.Node], str], *, by_mode: bool = True) -> None:
    """Rewrite ``module.graph`` in place into the canonical vocabulary; ``line`` says where a node is written.

    Args:
        by_mode: whether masks that are drawn by hand are dropout, which eval mode leaves out.
    """
    _inline_grad_mode(module)
    canonicalize_graph(module.graph, line, by_mode=by_mode)


def canonicalize_graph(graph: fx.Graph, line: Callable[[fx.Node], str], *, by_mode: bool = True) -> None:
    """The same for a graph without grad-mode regions, which are submodules."""
    for node in list(graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in _NOISE:
            graph.erase_node(node)
    note_detaches(graph, line)
    _use_types(graph)
    _drop_no_op_copies(graph)
    _functionalize(graph)
    _use_sizes(graph)
    _use_logic(graph)
    _drop_whole_copies(graph)
    _inline_numbers(graph)
    if by_mode:
        fuse_drop_paths(graph)
    fuse_norms(graph)
    graph.eliminate_dead_code(is_impure_node=is_effect)
    _contiguous_views(graph)


def _use_sizes(graph: fx.Graph) -> None:
    """``x.expand_as(y)`` is an expand to the sizes of y: it reads y for its shape alone."""
    for node in [n for n in graph.nodes if n.target in _LIKE]:
        x, other = cast(tuple[fx.Node, fx.Node], node.args)
        line = stopped(node, x)
        with graph.inserting_before(node):
            sizes = [_size(graph, node, other, dim, size) for dim, size in enumerate(other.meta["val"].shape)]
        node.target, node.args, node.meta = _LIKE[node.target], (x, sizes), without_stops(node.meta)
        if line is not None:
            stop(node, x, line)


def _use_types(graph: fx.Graph) -> None:
    """``x.to(y)`` is a cast to the type of y: it reads y for that alone."""
    for node in [n for n in graph.nodes if n.target is aten.to.other]:
        x, other = cast(tuple[fx.Node, fx.Node], node.args[:2])
        line = stopped(node, x)
        node.target, node.args, node.kwargs = aten.to.dtype, (x, other.meta["val"].dtype), {}
        node.meta = without_stops(node.meta)
        if line is not None:
            stop(node, x, line)


def _size(graph: fx.Graph, node: fx.Node, tensor: fx.Node, dim: int, size: int | torch.SymInt) -> int | fx.Node:
    """A size as a number, or as a node where it may change: that of the batch."""
    if isinstance(size, int):
        return size
    result = graph.call_function(aten.sym_size.int, (tensor, dim))
    result.meta = {**without_stops(node.meta), "val": size}
    return result


def _use_logic(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target in _LOGICAL and isinstance(value, Tensor) and value.dtype == torch.bool:
            node.target = _LOGICAL[node.target]


def _inline_grad_mode(module: fx.GraphModule) -> None:
    """Replace ``wrap_with_set_grad_enabled(flag, submodule, *args)`` by the submodule's own nodes."""
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        body = module.get_submodule(str(node.args[1].target))
        assert isinstance(body, fx.GraphModule)
        inputs = iter(node.args[2:])
        copies: dict[fx.Node, Any] = {n: next(inputs) for n in body.graph.nodes if n.op == "placeholder"}
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(body.graph, copies)
            if node.args[0] is False:
                inside = {copy for old, copy in copies.items() if old.op != "placeholder"}
                results = [_detached(graph, result) if result in inside else result for result in results]
        stack = node.meta.get("nn_module_stack")
        for copy in copies.values():
            if isinstance(copy, fx.Node) and stack is not None:
                copy.meta.setdefault("nn_module_stack", stack)
        for user in list(node.users):
            assert user.target is operator.getitem
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
        submodule = node.args[1]
        graph.erase_node(node)
        if not submodule.users:
            graph.erase_node(submodule)


def _detached(graph: fx.Graph, result: fx.Node) -> fx.Node:
    """What leaves a region without gradients: the value, detached."""
    new = graph.call_function(aten.detach.default, (result,))
    new.meta = dict(result.meta)
    return new


def _same_tensor_type(node: fx.Node, source: fx.Node) -> bool:
    new, old = node.meta.get("val"), source.meta.get("val")
    return isinstance(new, Tensor) and isinstance(old, Tensor) and new.dtype == old.dtype


def _drop_no_op_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in _COPIES and node.target not in _CASTS:
            continue
        source = node.args[0]
        if node.target in _COPIES or _same_tensor_type(node, source):
            read_instead(node, source, stopped(node, source))
            graph.erase_node(node)


def _inline_numbers(graph: fx.Graph) -> None:
    """``full([], v) + alpha * x`` and ``full([], v) * x`` become operations with the number v.

    A tensor of one known entry hides that the operation is a function of x alone.
    """
    for node in [n for n in graph.nodes if n.target is aten.full.default and list(n.args[0]) == []]:
        value = node.args[1]
        for user in list(node.users) if isinstance(value, (int, float)) else []:
            if user.target is aten.mul.Tensor and user.args[0] is not user.args[1]:
                _with_number(user, user.args[1] if user.args[0] is node else user.args[0], value)
            elif user.target is aten.add.Tensor and user.args[0] is not user.args[1]:
                _add_number(graph, user, node, value)


def _add_number(graph: fx.Graph, user: fx.Node, node: fx.Node, value: float) -> None:
    alpha = user.kwargs.get("alpha", 1)
    if user.args[0] is not node:
        _with_number(user, user.args[0], value * alpha)  # type: ignore[operator, arg-type]
        return
    term = user.args[1]
    if alpha != 1:
        with graph.inserting_before(user):
            product = graph.call_function(aten.mul.Tensor, (term, alpha))
        product.meta = without_stops(user.meta)
        if isinstance(term, fx.Node) and (line := stopped(user, term)) is not None:
            stop(product, term, line)
        term = product
    _with_number(user, term, value)


def _with_number(node: fx.Node, x: Any, value: float) -> None:
    """Make ``node`` read one tensor and a number."""
    line = stopped(node, x) if isinstance(x, fx.Node) else None
    node.args, node.kwargs, node.meta = (x, value), {}, without_stops(node.meta)
    if line is not None:
        stop(node, x, line)


def _functional_overload(target: OpOverload) -> OpOverload | None:
    name = target._schema.name.split("::")[-1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _functionalize(graph: fx.Graph) -> None:
    """Replace ``x.op_(y)`` by ``op(x, y)``; whoever read ``x`` afterwards reads the result.

    A write through ``x[...]`` becomes a scatter into ``x``. Left alone: counters and other buffers (a write to a
    ``get_attr`` is meant), and writes that other views of the same memory read, which run in order.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        functional, source = _functional_overload(target), node.args[0]
        if functional is None or memory_of(source).op == "get_attr":
            continue
        chain = _scattered(source) if _bases_read(source, node, order) else [source]
        if chain is None or any(_views_read(tensor, node, order, chain) for tensor in chain):
            continue
        node.target = functional
        result = node
        for index, tensor in enumerate(chain):
            if index:
                result = _scatter(graph, chain[index - 1], result)
            for user in [u for u in tensor.users if u is not node and order.get(u, 0) > order[node]]:
                user.replace_input_with(tensor, result)


def memory_of(node: fx.Node) -> fx.Node:
    """Whose memory a node's value is: what an operation in place returns is the tensor it wrote to."""
    while isinstance(node.target, OpOverload) and _functional_overload(node.target) is not None:
        node = cast(fx.Node, node.args[0])
    return node


def _drop_whole_copies(graph: fx.Graph) -> None:
    """``copy(x, y)`` is ``y`` where both are of one shape and type."""
    for node in [n for n in graph.nodes if n.target is aten.copy.default]:
        old, new = node.args[:2]
        if _same_tensor_type(old, new) and str(old.meta["val"].shape) == str(new.meta["val"].shape):
            read_instead(node, new, stopped(node, new))
            graph.erase_node(node)


def _scatter(graph: fx.Graph, view: fx.Node, changed: fx.Node) -> fx.Node:
    """``view``'s base with ``changed`` in the place of the view."""
    base, operation = cast(fx.Node, view.args[0]), cast(OpOverload, view.target)
    with graph.inserting_after(changed):
        result = graph.call_function(_SCATTERS[operation], (base, changed, *view.args[1:]))
    result.meta = {**without_stops(changed.meta), "val": base.meta.get("val")}
    return result


def _scattered(source: fx.Node) -> list[fx.Node] | None:
    """A view and the tensors it is a part of, innermost first, if scatters lead back to memory of its own."""
    chain = [source]
    while chain[-1].target in _SCATTERS:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain if not _is_view(chain[-1]) and chain[-1].op != "get_attr" else None


def _bases_read(view: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether memory that ``view`` shares with the tensor it was taken from is read after ``node``."""
    while _is_view(view):
        base: Any = view.args[0]
        if base.op == "get_attr":
            return True
        later = any(u is not view and order.get(u, 0) > order[node] for u in base.users)
        if later or _views_read(base, node, order, [view]):
            return True
        view = base
    return False


def _views_read(tensor: fx.Node, node: fx.Node, order: dict[fx.Node, int], chain: list[fx.Node]) -> bool:
    """Whether a view taken before ``node``, none of ``chain``, is read after it."""
    views = [u for u in tensor.users if u not in chain and _is_view(u) and order.get(u, 0) < order[node]]
    return any(
        any(order.get(u, 0) > order[node] for u in view.users) or _views_read(view, node, order, chain)
        for view in views
    )


def _is_view(node: fx.Node) -> bool:
    return operation_name(node) in _VIEWS and bool(node.args) and isinstance(node.args[0], fx.Node)


def operation_name(node: fx.Node) -> str:
    """Plain name of what a node does: ``conv2d``, ``relu``, ``getitem``, or the called module's class."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        return type(owner.get_submodule(str(node.target))).__name__
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.split("::")[-1]
    if isinstance(node.target, Callable):  # type: ignore[arg-type]
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def is_effect(node: fx.Node) -> bool:
    """Whether a node without readers must stay: inputs, outputs, and writes to buffers."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _contiguous_views(graph: fx.Graph) -> None:
    """``view`` needs contiguous memory, which rewriting does not preserve: use ``reshape``."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
