"""Regions of a forward that a captured graph holds as one operation: autocast, and torch's operators on functions.

No pass sees into them: what they hold stays as the model made it.
"""

from __future__ import annotations

from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.site import read_site, site_of

_AUTOCAST = "wrap_with_autocast"
_SHOWN = 4


def unseen(module: fx.GraphModule) -> list[str]:
    """A line for every operation of ``module``'s graph that has a graph of its own: where it is and what it holds."""
    nodes = [node for node in module.graph.nodes if isinstance(node.target, HigherOrderOperator)]
    return [_line(module, node, bodies) for node in nodes if (bodies := _bodies(module, node))]


def _bodies(module: nn.Module, node: fx.Node) -> list[fx.GraphModule]:
    named = [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node) and n.op == "get_attr"]
    children = dict(module.named_modules())
    found = [children.get(str(n.target)) for n in named]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def _line(module: fx.GraphModule, node: fx.Node, bodies: list[fx.GraphModule]) -> str:
    inside = [n for body in bodies for n in body.graph.nodes if n.op == "call_function"]
    sites = [site_of(node), *map(read_site, inside)]
    place = next((site.source for site in sites if site.source.partition(":")[0].endswith(".py")), "")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) in parameters]
    name = operation_name(node)
    what = "a region of torch.autocast" if name == _AUTOCAST else f"torch.ops.higher_order.{name}"
    held = f"of its operations ({_some([operation_name(n) for n in inside])}) none is changed"
    drawn = f", and {_some(weights)} not drawn" if weights else ""
    where = f"{node.name} ({place})" if place else node.name
    hint = "put it around the call of the model" if name == _AUTOCAST else "write it with plain operations"
    return f"{where}: {what} is not seen into: {held}{drawn}; {hint}"


def _some(names: list[str]) -> str:
    listed = [name for name in dict.fromkeys(names) if name != "getitem"]
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


__all__ = ["unseen"]
