"""Emission: turn the flat graph back into a module built from the user's own submodules.

A group of nodes that came from one call of a leaf module, still untouched, with one tensor in and one out,
becomes a call of that module. What stays functional and depended on ``training`` is driven by a small flag
module, so that ``train()`` and ``eval()`` work. State-dict keys of surviving parameters do not change.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import aten, is_effect, memory_of
from kgraph.emitted import NAMES, EmittedModule, EmittedTracer, Layout
from kgraph.gradient_stops import STOPS, insert_detaches, stop, stopped_between, stops_of, without_stops
from kgraph.modes import mode_argument
from kgraph.norm_chain import restore
from kgraph.site import site_of
from kgraph.switches import DeviceAnchor, TrainingSwitch, TypeAnchor

SWITCH, ANCHOR = "_kgraph_switch", "_kgraph_anchor"
FOLLOWS = "kgraph_follows"
"""Key in a node's ``meta``: the type that it says is the model's, and follows when that is cast (`kgraph.casts`)."""


def emit(flat: fx.GraphModule, root: nn.Module, *, name: str | None = None, lift: bool = True) -> EmittedModule:
    """Emit ``flat`` (whose parameters are ``root``'s) as a standard module.

    Args:
        flat: a captured, perhaps rewritten graph.
        root: the module that owns the parameters and submodules the graph names.
        name: class name of the result; that of ``root`` by default.
        lift: put the user's leaf modules back; False leaves every operation functional.
    """
    graph = _bare_copy(flat.graph)
    names: dict[str, str] = {}
    if lift:
        for nodes in _groups(graph).values():
            names |= _lift_group(graph, nodes, root)
    restore(graph)
    insert_detaches(graph)
    _stop_at_buffers(graph, root)
    helpers: dict[str, nn.Module] = {}
    _drive_training_flags(graph, helpers)
    _follow_device(graph, helpers)
    _follow_type(graph)
    _follow_model(graph, helpers)
    graph.eliminate_dead_code(is_impure_node=is_effect)
    _drop_orphan_counters(graph)
    graph.lint()
    for node in graph.nodes:
        node.meta = {}
    module = EmittedModule(_attributes(graph, flat, root, helpers), graph, name or type(root).__name__)
    layout = Layout.of(root)
    own = dict(root.named_buffers(remove_duplicate=False))
    constants = [name for name, _ in module.named_buffers(remove_duplicate=False) if name not in own]
    # no part of the model's state: a state dict of the model has no such keys
    layout._replace(transient=(*layout.transient, *constants)).apply(module)
    module.meta[NAMES] = names
    return module


def _attributes(graph: fx.Graph, flat: nn.Module, root: nn.Module, helpers: dict[str, nn.Module]) -> dict[str, Any]:
    """The object behind every name in the graph: a helper, the user's own, or a constant of the graph."""
    targets = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    return {target: helpers.get(target) or _find(root, target, flat) for target in targets}


def _find(root: nn.Module, target: str, flat: nn.Module) -> Any:
    for owner in (root, flat):
        value: Any = owner
        for part in target.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return value
    raise AttributeError(target)


def _add_helper(helpers: dict[str, nn.Module], prefix: str, module: nn.Module) -> str:
    name = f"{prefix}_{len(helpers)}"
    helpers[name] = module
    return name


def _bare_copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=EmittedTracer)  # not export's tracer class, which does not unpickle
    copies: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, copies)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    last = copy.output(output)
    last.meta = {STOPS: stops_of(next(reversed(graph.nodes)))}
    copy._codegen = graph._codegen
    return copy


def _groups(graph: fx.Graph) -> dict[tuple[str, int], list[fx.Node]]:
    """Nodes of each leaf-module call: nobody else's site lies inside that module call."""
    groups: dict[tuple[str, int], list[fx.Node]] = defaultdict(list)
    containers: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_function" and "site" in node.meta:
            site = site_of(node)
            groups[site.key].append(node)
            containers.update(site.ancestors)
    return {key: nodes for key, nodes in groups.items() if key[0] and key[0] not in containers}


def _lift_group(graph: fx.Graph, nodes: list[fx.Node], root: nn.Module) -> dict[str, str]:
    """Put one module call back where it can be; the name of the node whose value it returns, and its own."""
    site = site_of(nodes[0])
    module = root.get_submodule(site.path)
    inside = set(nodes)
    if not _calls_with_one_tensor(module) or any(n.meta.get("group_size") != len(nodes) for n in nodes):
        return {}
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    own = {f"{site.path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    own |= {f"{site.path}.{name}" for name, _ in module.named_buffers(recurse=False)}
    inputs = {arg for n in nodes for arg in n.all_input_nodes if arg not in inside}
    foreign = [n for n in inputs if not (n.op == "get_attr" and n.target in own) and not _is_size(n)]
    if len(outputs) != 1 or len(foreign) != 1 or foreign[0].op == "get_attr":
        return {}
    if outputs[0].target is operator.getitem:  # the module itself returns a tuple (LSTM)
        return {}
    with graph.inserting_before(outputs[0]):
        call = graph.call_module(site.path, (foreign[0],))
    call.meta = without_stops(outputs[0].meta)
    if (line := stopped_between(foreign[0], outputs[0], nodes)) is not None:
        stop(call, foreign[0], line)
    name = outputs[0].name
    outputs[0].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    return {name: call.name}


def _stop_at_buffers(graph: fx.Graph, root: nn.Module) -> None:
    """What is written to a buffer is detached: a buffer with a gradient behind it can be copied and trained no more."""
    buffers = dict(root.named_buffers(remove_duplicate=False))
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_effect(node) or not node.args:
            continue
        held = memory_of(node)
        if held.op != "get_attr" or held.target not in buffers:
            continue
        for value in node.all_input_nodes:
            floating = isinstance(kind := value.meta.get("val"), Tensor) and kind.is_floating_point()
            if value is not node.args[0] and floating and value.op != "get_attr":
                with graph.inserting_before(node):
                    stopped = graph.call_function(aten.detach.default, (value,))
                stopped.meta = dict(value.meta)
                node.replace_input_with(value, stopped)


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor) and node.op == "call_function"


def _calls_with_one_tensor(module: nn.Module) -> bool:
    if next(module.children(), None) is not None:
        return False
    if inspect.ismethod(module.forward):
        return _required_arguments(module.forward.__func__) == 2  # itself and one more
    return _required_arguments(module.forward) == 1


@cache
def _required_arguments(forward: Callable[..., Any]) -> int:
    """Number of positional parameters without a default; reading a signature is slow, and classes are few."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


def _drive_training_flags(graph: fx.Graph, helpers: dict[str, nn.Module]) -> None:
    """Functional dropout, random relus, norms, recurrent and attention dropout follow ``module.training``."""
    for node in list(graph.nodes):
        argument = mode_argument(node)
        if argument is not None:
            _switch(graph, node, *argument, helpers)


def _switch(
    graph: fx.Graph, node: fx.Node, index: int, train: Any, evaluate: Any, helpers: dict[str, nn.Module]
) -> None:
    name = _add_helper(helpers, SWITCH, TrainingSwitch(train, evaluate))
    with graph.inserting_before(node):
        flag = graph.call_module(name)
    node.update_arg(index, flag)


def _follow_device(graph: fx.Graph, helpers: dict[str, nn.Module]) -> None:
    """A baked ``device=`` constant would keep part of the model behind when it moves."""
    baked = [n for n in graph.nodes if isinstance(n.kwargs.get("device"), torch.device)]
    if not baked:
        return
    name = _add_helper(helpers, ANCHOR, DeviceAnchor(baked[0].kwargs["device"]))
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        device = graph.call_module(name)
    for node in baked:
        node.kwargs = {**node.kwargs, "device": device}


def _follow_model(graph: fx.Graph, helpers: dict[str, nn.Module]) -> None:
    """The types that are the model's own (``zeros(n, dtype=x.dtype)``) are read off the emitted module."""
    anchors: dict[torch.dtype, fx.Node] = {}
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in [n for n in graph.nodes if FOLLOWS in n.meta]:
        own: torch.dtype = node.meta[FOLLOWS]
        if own not in anchors:
            with graph.inserting_before(first):
                anchors[own] = graph.call_module(_add_helper(helpers, ANCHOR, TypeAnchor(own)))
        said = own in (*node.args, *node.kwargs.values())
        if said:
            node.args = tuple(anchors[own] if one is own else one for one in node.args)
            node.kwargs = {key: anchors[own] if one is own else one for key, one in node.kwargs.items()}
        elif node.target is not aten.to.other:
            node.kwargs = {**node.kwargs, "dtype": anchors[own]}


def _follow_type(graph: fx.Graph) -> None:
    """A baked type of truth values or counts (``(x > 0).to(x.dtype)``) would stay when the model is cast."""
    known: dict[torch.dtype, fx.Node] = {}
    for node in list(graph.nodes):
        made = _cast_to(node)
        if made is not None and made.is_floating_point and _type_of(node.args[0]) is None:
            like = _of_type(node, made) or known.get(made)
            if like is not None:
                node.target, node.args, node.kwargs = aten.to.other, (node.args[0], like), {}
        elif (dtype := _type_of(node)) is not None:
            known.setdefault(dtype, node)


def _cast_to(node: fx.Node) -> torch.dtype | None:
    """The type that a node casts to; None for another operation."""
    place = {aten.to.dtype: 1, aten.to.device: 2}.get(node.target)  # type: ignore[call-overload]
    if place is not None:
        return node.args[place]  # type: ignore[return-value]
    return node.kwargs.get("dtype") if node.target is aten.to.dtype_layout else None  # type: ignore[return-value]


def _type_of(node: Any) -> torch.dtype | None:
    """The type of a node's fractions; None where it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) else None


def _of_type(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The nearest node of that type among those that a node is made of."""
    seen, queue = {node}, [node]
    for at in queue:
        if at is not node and _type_of(at) == dtype:
            return at
        new = [before for before in at.all_input_nodes if before not in seen]
        seen.update(new)
        queue += new
    return None


def _drop_orphan_counters(graph: fx.Graph) -> None:
    """A batch norm's step counter means nothing once its batch norm is gone."""
    live = {site_of(n).key for n in graph.nodes if n.target is aten.batch_norm.default}
    for node in list(graph.nodes):
        target = node.args[0] if node.target is aten.add_.Tensor else None
        counter = isinstance(target, fx.Node) and str(target.target).endswith("num_batches_tracked")
        if counter and site_of(node).key not in live:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=is_effect)
