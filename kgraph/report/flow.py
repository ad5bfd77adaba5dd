"""Which nodes depend on the inputs, and which ones every path to the output passes."""

from __future__ import annotations

import math
from functools import cached_property

import networkx as nx

from kgraph.analysis import Analysis, NodeKernel

_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"})
_START = "\0start"  # no fx node can have this name


class Flow:
    """Read-only view of an analysis as a directed graph."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.by_name = {node.name: node for node in analysis.nodes}

    def parents(self, node: NodeKernel) -> tuple[NodeKernel, ...]:
        """The rows that the node reads."""
        return tuple(self.by_name[name] for name in node.inputs if name in self.by_name)

    @cached_property
    def sources(self) -> tuple[NodeKernel, ...]:
        """The model's inputs: nodes that read nothing and differ between inputs."""
        return tuple(node for node in self.analysis.nodes if not self.parents(node) and not _is_constant(node))

    @cached_property
    def dependent(self) -> frozenset[str]:
        """Names of the nodes that depend on an input. The others (parameters, position embeddings) have
        c = 1 for every pair of inputs by nature, which is not a collapse."""
        names = {node.name for node in self.sources}
        for node in self.analysis.nodes:
            if any(name in names for name in node.inputs):
                names.add(node.name)
        return frozenset(names)

    @cached_property
    def trunk(self) -> dict[str, str | None]:
        """The nodes on every path from the inputs to the output (dominators), each with the one before it.

        What goes wrong on the trunk reaches the output; what goes wrong in a branch may be
        mended by the merge that follows.
        """
        graph = nx.DiGraph()
        graph.add_edges_from((_START, node.name) for node in self.sources)
        for node in self.analysis.nodes:
            if node.name in self.dependent:
                graph.add_edges_from((name, node.name) for name in node.inputs if name in self.dependent)
        if self.analysis.output not in graph:
            return {}
        chain = _dominators(graph, self.analysis.output)
        return dict(zip(chain, [None, *chain], strict=False))

    @cached_property
    def main_line(self) -> tuple[NodeKernel, ...]:
        """The trunk's nodes in order; all nodes that depend on an input where there is no trunk."""
        names = self.trunk or self.dependent
        return tuple(node for node in self.analysis.nodes if node.name in names)

    def predecessors(self, node: NodeKernel) -> tuple[str, ...]:
        """Where a state can be inherited from: on the trunk the trunk alone, in a branch all it reads."""
        if node.name not in self.trunk:
            return node.inputs
        before = self.trunk[node.name]
        return (before,) if before is not None else ()

    @cached_property
    def q_input(self) -> float:
        """Largest q value among the inputs, which all q are compared with (1 if there is none)."""
        values = [node.q for node in self.sources if math.isfinite(node.q) and node.q > 0]
        return max(values, default=1.0)

    @cached_property
    def first_norm(self) -> NodeKernel | None:
        """The first norm that depends on the inputs: where it reads an embedding, it sets the scale, not they."""
        return next((n for n in self.analysis.nodes if n.op in _NORMS and n.name in self.dependent), None)

    @cached_property
    def embedded(self) -> bool:
        """Whether the inputs are token ids that a table is read by: their q is the table's, whatever that is."""
        return bool(self.sources) and all(node.op in ("embedding", "embedding_bag") for node in self.sources)

    @cached_property
    def q_most(self) -> float:
        """The q that growth is measured against: the inputs', or behind an embedding that of the first norm."""
        norm = self.first_norm
        return max(self.q_input, norm.q) if self.embedded and norm is not None and norm.q > 0 else self.q_input


def _is_constant(node: NodeKernel) -> bool:
    return bool(node.c) and all(math.isnan(c) or abs(1.0 - c) < 1e-12 for c in node.c)


def _dominators(graph: nx.DiGraph, output: str) -> list[str]:
    """Nodes on every path from the start to the output, first to last."""
    immediate = nx.immediate_dominators(graph, _START)
    chain = [output]
    while (before := immediate[chain[-1]]) not in (None, _START):
        chain.append(before)
    return chain[::-1]
