"""Where q departs from 1 in a rewritten graph, from which node on, and why."""

from __future__ import annotations

import torch
from torch import fx

from kgraph.canonical import operation_name
from kgraph.contractions import WORDS, contraction_of, follows_softmax
from kgraph.modules import NORM_FACTOR, Scale, WeightedSum
from kgraph.passes.base import Workspace

_Q_TOLERANCE = 1e-6
_SAMPLED_TOLERANCE = 0.05
_STANDARD_ERRORS = 4


def off(work: Workspace, node: fx.Node) -> bool:
    """Whether q is not 1 at a node, beyond what its number may be wrong by."""
    kernel = work.kernels()[node]
    drawn = max(_SAMPLED_TOLERANCE, _STANDARD_ERRORS * kernel.how.error)
    return abs(float(kernel.merged.q) - 1) > (drawn if kernel.how.level >= 2 else _rounding(work))


def _rounding(work: Workspace) -> float:
    """What q may differ by: half precision rounds a weight by up to eps / 2, and with it q by up to eps."""
    halves = {p.dtype for p in work.graph.root.parameters()} & {torch.float16, torch.bfloat16}
    return max([_Q_TOLERANCE, *(torch.finfo(one).eps for one in halves)])


class Causes:
    """The earliest node upstream whose inputs still have q = 1 (a gate's own q is not meant to be 1)."""

    def __init__(self, work: Workspace, gates: set[fx.Node]) -> None:
        self.work, self.gates, self.known = work, gates, dict[fx.Node, fx.Node]()

    def of(self, node: fx.Node) -> fx.Node:
        """Follow the first input that is off, up to one whose cause is known."""
        way = [node]
        while way[-1] not in self.known and (before := self._before(way[-1])) is not None:
            way.append(before)
        found = self.known.get(way[-1], way[-1])
        self.known |= dict.fromkeys(way, found)
        return found

    def _before(self, node: fx.Node) -> fx.Node | None:
        sources = _sources(self.work, node)
        return next((n for n in sources if n not in self.gates and off(self.work, n)), None)


def _sources(work: Workspace, node: fx.Node) -> list[fx.Node]:
    """Kernels a node's q comes from: through lists (chunk, split), and through attention the values only."""
    inputs, kernels = list(node.all_input_nodes), work.kernels()
    if operation_name(node) == "scaled_dot_product_attention":
        inputs = [n for n in node.args[2:3] if isinstance(n, fx.Node)]
    elif contraction_of(node, work.is_random) == "attention":
        inputs = [n for n in inputs if not follows_softmax(n)]
    found: list[fx.Node] = []
    for before in inputs:
        found += [before] if before in kernels else _sources(work, before)
    return found


def departure(work: Workspace, node: fx.Node) -> str:
    """``mean_1 (mean) has q = 0.016, ...``: a cause in words."""
    known = work.kernels()
    q = float(known[node].merged.q) if node in known else float("nan")
    return f"{node.name} ({operation_name(node)}) has q = {q:.4g}, {_reason(work, node)}"


def _reason(work: Workspace, node: fx.Node) -> str:
    contraction = contraction_of(node, work.is_random)
    if contraction is not None:
        return WORDS[contraction]
    reasons = {
        "lstm": "recurrent cells keep their own initialization",
        "gru": "recurrent cells keep their own initialization",
        "placeholder": "the input itself",
        "cat": "its operands have different q",
    }
    if isinstance(work.module(node), WeightedSum):
        return "its terms differ in q, or are not orthogonal: means add up, or one value or weight is in several"
    if isinstance(module := work.module(node), Scale) and module.reason == NORM_FACTOR:
        return "the size that a norm gave its vectors, which is kept"
    if node.op == "call_module":
        return "its local Q map does not give q = 1 here"
    return reasons.get(operation_name(node), "the operation changes q by itself")


__all__ = ["Causes", "departure", "off"]
