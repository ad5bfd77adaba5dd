"""Activations as modules: the user's own, an operation, or a small graph; and what such a module loses."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch._ops import OpOverload

from kgraph.gradient_stops import STOPS, insert_detaches, stops_of
from kgraph.modules import FunctionModule
from kgraph.nonlinear import Region
from kgraph.passes.base import Workspace, find_module
from kgraph.site import site_of


def activation_of(work: Workspace, region: Region) -> nn.Module:
    """The region as a module: the user's own where it is one, an operation, or a small graph."""
    node = region.end
    own = find_module(work.graph.root, site_of(node).path)
    if own is not None and _is_whole_call(region, own):
        return copy.deepcopy(own)
    if len(region.nodes) == 1 and isinstance(node.target, OpOverload) and node.args[0] is region.source:
        return FunctionModule(node.target, *node.args[1:], **node.kwargs)
    return _as_graph(region)


def _is_whole_call(region: Region, own: nn.Module) -> bool:
    plain = next(own.children(), None) is None and next(own.parameters(recurse=False), None) is None
    keys = {site_of(n).key for n in region.nodes}
    untouched = all(n.meta.get("group_size") == len(region.nodes) for n in region.nodes)
    inplace = getattr(own, "inplace", False)
    return plain and len(keys) == 1 and untouched and not inplace


def _as_graph(region: Region, *, stops: bool = False) -> nn.Module:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {region.source: graph.placeholder("u")}
    copies |= {weight: graph.placeholder(f"slope_{i}") for i, weight in enumerate(region.learnable)}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {STOPS: stops_of(node)} if stops else {}
    if stops:
        insert_detaches(graph)
    graph.output(copies[region.end])
    return fx.GraphModule(region.module, graph)


def lost_stop(work: Workspace, region: Region) -> str:
    """What a shaped activation does to the gradient that the region does not: where a stop inside it matters.

    A stop behind a step function, say, does not: nothing flows there anyway.
    """
    lines = [one.line for node in region.nodes for one in stops_of(node)]
    own = find_module(work.graph.root, site_of(region.end).path)
    if not lines or region.learnable or (own is not None and _is_whole_call(region, own)):
        return ""
    u = torch.linspace(-3.0, 3.0, 31, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        kept, whole = (_slope(_as_graph(region, stops=stops)(u), u) for stops in (True, False))
    if torch.allclose(kept, whole):
        return ""
    where = f" ({lines[0]})" if lines[0] else ""
    return f"a stop of gradients inside it{where} is not kept: it has its whole derivative"


def _slope(y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    if not y.requires_grad:
        return torch.zeros_like(u)
    return torch.autograd.grad(y.sum(), u, materialize_grads=True)[0]


__all__ = ["activation_of", "lost_stop"]
