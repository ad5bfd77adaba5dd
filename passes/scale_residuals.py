"""Sums of branches become normalized sums: w * shortcut + sqrt(1 - w^2) * residual, constants not trained.

Which operand is the shortcut is read off the graph: the path with fewer layers since the two parted (their common
dominator). Where neither is shorter, the n branches are equal and each weight is 1/sqrt(n). ``shortcut_weight=0``
drops the shortcut and with it a projection that nobody reads any more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import networkx as nx
from torch import fx

from kgraph.canonical import aten, operation_name
from kgraph.checks import flag, weight_of_shortcut
from kgraph.gradient_stops import read_instead, stopped
from kgraph.modules import WeightedSum
from kgraph.passes.base import Pass, Workspace, owner_path
from kgraph.residual.sums import SUMS, straight_through

_AFFINE = (
    "linear",
    "addmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose2d",
    "scaled_dot_product_attention",
    "matmul",
)


@dataclass(frozen=True)
class ScaleResiduals(Pass):
    """Weight residual sums.

    Args:
        shortcut_weight: w in [0, 1]; 0 removes the shortcuts.
        only_shortcuts: leave sums of equal branches as they are.
    """

    shortcut_weight: float = 0.8
    only_shortcuts: bool = False

    def __post_init__(self) -> None:
        weight_of_shortcut(self.shortcut_weight)
        flag("only_shortcuts", self.only_shortcuts)

    def rewrite(self, work: Workspace) -> None:
        inside = _inside_regions(work)
        lengths = _Lengths(work)
        sums = [n for n in work.nodes if n.target in SUMS and n not in inside and _adds_branches(work, n)]
        for node, (gone, inner) in [(n, found) for n in sums if (found := straight_through(n)) is not None]:
            why = f"{gone.name} cancels: it has the value of the other term, and is no residual (straight-through)"
            for one in {node, inner} & set(sums):
                sums.remove(one)
                work.keep(one, "sum", why)
        for node in [n for n in sums if lengths.since_parting(*_operands(n)) == (0, 0)]:
            sums.remove(node)
            work.keep(node, "sum", "no layer lies in either branch: it is arithmetic (a rotation), not a residual")
        # decide on the graph as captured, then rewrite: the analysis does not know the new nodes
        terms: dict[fx.Node, int] = {}
        plans = [(node, *self._weights(node, lengths, terms)) for node in sums]
        for node, weights, shortcut, why in plans:
            if shortcut is not None or not self.only_shortcuts:
                _replace(work, node, weights, shortcut, why)

    def _weights(
        self, node: fx.Node, lengths: _Lengths, terms: dict[fx.Node, int]
    ) -> tuple[list[float], int | None, str]:
        """Weights of the two operands, and which of them is the shortcut; ``terms`` counts equal branches."""
        one, two = lengths.since_parting(*_operands(node))
        if one == two:
            counts = [terms.get(n, 1) if len(n.users) == 1 else 1 for n in node.args[:2]]  # type: ignore[arg-type, union-attr]
            terms[node] = sum(counts)
            return [math.sqrt(n / terms[node]) for n in counts], None, f"{terms[node]} equal branches"
        weights = _pair(self.shortcut_weight, 0 if one < two else 1)
        return weights, 0 if one < two else 1, "normalized sum keeps q = 1"

    def broken(self, work: Workspace) -> str:
        bad = [
            n.name
            for n in work.nodes
            if isinstance(module := work.module(n), WeightedSum) and abs(sum(w * w for w in module.weights) - 1) > 1e-9
        ]
        return f"weights of {', '.join(bad)} are not normalized" if bad else ""


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


def _inside_regions(work: Workspace) -> set[fx.Node]:
    """Sums inside an activation (x + relu(x), relu6(x + 3)) are part of its function."""
    return {node for region in work.regions() for node in region.nodes}


def _adds_branches(work: Workspace, node: fx.Node) -> bool:
    return all(work.is_random(operand) for operand in node.args[:2])


def _pair(shortcut_weight: float, shortcut: int) -> list[float]:
    rest = math.sqrt(1 - shortcut_weight**2)
    return [shortcut_weight, rest] if shortcut == 0 else [rest, shortcut_weight]


def _signs(node: fx.Node) -> tuple[float, float]:
    alpha = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
    return 1.0, -alpha if node.target is aten.sub.Tensor else alpha


def _replace(work: Workspace, node: fx.Node, weights: list[float], shortcut: int | None, why: str) -> None:
    terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
    before = " + ".join(term.name for term in terms)
    if 0.0 in weights:
        kept = terms[1 - weights.index(0.0)]
        gone = terms[weights.index(0.0)]
        what = "remove shortcut" if weights.index(0.0) == shortcut else "remove residual branch"
        work.record(node, what, f"weight 0: {gone.name} is dropped", before, kept.name)
        read_instead(node, kept, stopped(node, kept))
        return
    signed = [math.copysign(w, sign) for w, sign in zip(weights, _signs(node), strict=True)]
    graph = work.graph.module.graph
    path = work.add_module(f"{owner_path(work, node)}weighted_sum", WeightedSum(signed))
    with graph.inserting_before(node):
        call = graph.call_module(path, tuple(terms))
    call.meta = dict(node.meta)
    if shortcut is not None:
        call.meta["shortcut"] = shortcut
    after = " + ".join(f"{w:.4g} {term.name}" for term, w in zip(terms, signed, strict=True))
    work.record(node, "weight residual sum", why, before, after)
    node.replace_all_uses_with(call)


def reweight(work: Workspace, shortcut_weight: float) -> bool:
    """Give every shortcut another weight; False when there is none (or it was removed).

    The analysis is not forgotten: which nodes are random stays, and callers that read q must `touch`.
    """
    found = [node for node in work.nodes if "shortcut" in node.meta]
    for node in found:
        old = work.module(node)
        assert isinstance(old, WeightedSum)
        weights = _pair(shortcut_weight, node.meta["shortcut"])
        signed = [math.copysign(new, own) for new, own in zip(weights, old.weights, strict=True)]
        work.replace_module(str(node.target), WeightedSum(signed))
    return bool(found)


class _Lengths:
    """Numbers of layers (affine or nonlinear) on the longest way from the last common node to each operand."""

    def __init__(self, work: Workspace) -> None:
        self.order: dict[object, int] = {node: i for i, node in enumerate(work.nodes)}
        ends = {region.end for region in work.regions()}
        self.is_layer = {n: n in ends or operation_name(n) in _AFFINE for n in work.nodes}
        self.graph = nx.DiGraph()
        for node in work.nodes:
            inputs = [n for n in node.all_input_nodes if work.carries_random(n)]
            self.graph.add_edges_from((before, node) for before in inputs)
            if not inputs and work.carries_random(node):
                self.graph.add_edge("start", node)
        self.dominator = nx.immediate_dominators(self.graph, "start")
        self.known: dict[tuple[fx.Node, fx.Node], tuple[int, int]] = {}

    def since_parting(self, first: fx.Node, second: fx.Node) -> tuple[int, int]:
        if (first, second) not in self.known:
            origin = self._common(first, second)
            self.known[first, second] = self._longest(origin, first), self._longest(origin, second)
        return self.known[first, second]

    def _common(self, first: object, second: object) -> object:
        """Last dominator of both: the later of the two gives way, for a dominator comes first in graph order."""
        while first is not second:
            if self.order.get(first, -1) > self.order.get(second, -1):
                first = self.dominator[first]
            else:
                second = self.dominator[second]
        return first

    def _longest(self, origin: object, end: fx.Node) -> int:
        """Layers on the longest way from ``origin``, which dominates ``end``; all between lie in graph order."""
        best: dict[object, int] = {origin: 0}
        for node in sorted(self._between(origin, end), key=self.order.__getitem__):
            best[node] = max(best[p] for p in self.graph.predecessors(node)) + self.is_layer[node]
        return best.get(end, 0)

    def _between(self, origin: object, end: fx.Node) -> set[fx.Node]:
        """What lies on the ways from ``origin`` to ``end``, which is among them unless it is the origin."""
        found: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = queue.pop()
            if node is not origin and node not in found:
                found.add(node)
                queue += self.graph.predecessors(node)
        return found
