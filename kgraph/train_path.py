"""A forward that takes another path in train mode: what of it an eval-mode capture keeps, and what it loses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from kgraph.canonical import operation_name
from kgraph.modes import mode_argument
from kgraph.site import Site, site_of

_MOST = 4


def adopt_modes(evaluated: fx.Graph, trained: fx.Graph) -> None:
    """Let what both captures have follow the mode: dropout and norms of the eval capture."""
    waiting: dict[tuple[object, Site], list[fx.Node]] = defaultdict(list)
    for node in trained.nodes:
        if mode_argument(node) is not None:
            waiting[node.target, _place(node)].append(node)
    for node in evaluated.nodes:
        same = waiting.get((node.target, _place(node)))
        argument = mode_argument(same.pop(0)) if same else None
        if argument is not None:
            node.update_arg(argument.place, argument.train)


def note_noise(evaluated: fx.Graph) -> None:
    """Mark the noise that an eval capture has: its forward asks for it in either mode."""
    for node in evaluated.nodes:
        if _is_noise(node):
            node.meta["always"] = True


def adopt_noise(trained: fx.Graph, evaluated: fx.Graph) -> bool:
    """Let the noise of the train capture that the eval capture has too be there in both modes; whether there is any."""
    waiting: dict[tuple[object, Site], list[fx.Node]] = defaultdict(list)
    for node in evaluated.nodes:
        waiting[node.target, _place(node)].append(node)
    found = []
    for node in trained.nodes:  # in order: one line may hold several
        same = waiting.get((node.target, _place(node)))
        if same and same.pop(0).meta.get("always") and _is_noise(node):
            found.append(node)
    for node in found:
        node.meta["always"] = True
    return bool(found)


def _is_noise(node: fx.Node) -> bool:
    return mode_argument(node) is not None and "norm" not in operation_name(node)


def lost_in_eval(trained: fx.Graph, evaluated: fx.Graph) -> str:
    """What only the train capture has: random numbers, modules, outputs; in words."""
    kept = {(node.target, _place(node)) for node in evaluated.nodes}
    extra = [n for n in trained.nodes if n.op == "call_function" and (n.target, _place(n)) not in kept]
    found = []
    draws = [f"{operation_name(n)}{_at(n)}" for n in extra if _draws(n)]
    if draws:
        found.append(f"random numbers of {_some(draws)}")
    own, theirs = _modules(trained), _modules(evaluated)
    if own - theirs:
        found.append(f"calls of {_some(sorted(own - theirs))}")
    many, few = _outputs(trained), _outputs(evaluated)
    if many != few:
        found.append(f"{many} output tensors for {few}")
    if not found:
        other = _some([f"{operation_name(n)}{_at(n)}" for n in extra]) or "other arguments, or another order"
        found.append(f"other operations: {other}")
    return "; ".join(found)


def _place(node: fx.Node) -> Site:
    """The module call and line; the shape may differ."""
    site = site_of(node)
    return Site(site.path, site.call, (), site.source)


def _draws(node: fx.Node) -> bool:
    tagged = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return tagged or _is_noise(node)


def _modules(graph: fx.Graph) -> set[str]:
    return {site_of(node).path for node in graph.nodes if node.op == "call_function"} - {""}


def _outputs(graph: fx.Graph) -> int:
    output = next(node for node in graph.nodes if node.op == "output")
    leaves: list[fx.Node] = []
    fx.map_arg(output.args, leaves.append)
    return sum(isinstance(leaf.meta.get("val"), Tensor) for leaf in leaves)


def _at(node: fx.Node) -> str:
    source = site_of(node).source
    return f" ({source})" if source else ""


def _some(names: Iterable[str]) -> str:
    listed = list(dict.fromkeys(names))
    return ", ".join(listed[:_MOST]) + (f" and {len(listed) - _MOST} more" if len(listed) > _MOST else "")


__all__ = ["adopt_modes", "adopt_noise", "lost_in_eval", "note_noise"]
