"""Restore q = 1 after operations that change it by themselves: pooling, embeddings, position tables, gates.

Attention is left alone: how much it averages depends on how alike the positions of real data are, so a constant
chosen for unrelated positions would do harm. The ledger says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from kgraph.canonical import operation_name
from kgraph.kernel import Kernel
from kgraph.nonlinear import find_regions
from kgraph.passes.base import Pass, Workspace

_CHANGERS = {
    "max_pool1d": "max pooling",
    "max_pool2d": "max pooling",
    "max_pool3d": "max pooling",
    "avg_pool1d": "average pooling",
    "avg_pool2d": "average pooling",
    "avg_pool3d": "average pooling",
    "adaptive_avg_pool1d": "average pooling",
    "adaptive_avg_pool2d": "average pooling",
    "mean": "averaging positions",
    "embedding": "embedding",
    "add": "added table",
    "upsample_bilinear2d": "interpolation",
}


@dataclass(frozen=True)
class Rescale(Pass):
    """Insert a constant so that q = 1 follows pools, embeddings and sums with known tensors.

    Args:
        tolerance: deviation of q from 1 that is left alone.
        only_gates: leave everything but gated products alone.
    """

    tolerance: float = 1e-9
    only_gates: bool = False

    def rewrite(self, work: Workspace) -> None:
        done: set[str] = set()
        while True:
            layer = self._next_layer(work, done)
            if not layer:
                return
            for node, q in layer:
                gated = operation_name(node) == "mul"
                reason = f"q = {q:.4g} after {'a gate' if gated else _CHANGERS[operation_name(node)]}"
                work.scale_after(node, q**-0.5, reason)
                work.record(node, "normalize gate" if gated else "restore q", reason, f"q {q:.4g}", "q 1")
                done.add(node.name)
            work.touch()

    def _next_layer(self, work: Workspace, done: set[str]) -> list[tuple[fx.Node, float]]:
        """Nodes to correct that lie behind no other one (their own q is not final before)."""
        kernels = work.kernels()
        wanted = self._before_activations(work)
        regions = find_regions(work.graph.module, kernels.__contains__)
        inside = {n for r in regions for n in r.nodes}
        gates = {r.end for r in regions if r.gate}
        behind: set[fx.Node] = set()
        chosen = []
        for node in work.nodes:
            if any(n in behind for n in node.all_input_nodes):
                behind.add(node)
                continue
            if node not in kernels or node not in wanted or node.name in done or node in inside:
                continue
            q = float(kernels[node].merged.q)
            if self._changes(work, node, gates) and q > 0 and abs(q - 1) > self.tolerance:
                chosen.append((node, q))
                behind.add(node)
        return chosen

    def _changes(self, work: Workspace, node: fx.Node, gates: set[fx.Node]) -> bool:
        name = operation_name(node)
        if name == "mul":
            return any(n in gates for n in node.all_input_nodes)
        if name not in _CHANGERS or self.only_gates:
            return False
        values = work.propagation().values
        if name == "add":  # sums of branches are weighted already; this is about x + table
            others = [n for n in node.args[:2] if isinstance(n, fx.Node) and not isinstance(values[n], Kernel)]
            return len(others) == 1
        return True

    def _before_activations(self, work: Workspace) -> set[fx.Node]:
        """Nodes from which some activation can be reached."""
        regions = find_regions(work.graph.module, work.kernels().__contains__)
        found: set[fx.Node] = set()
        queue = [r.source for r in regions]
        while queue:
            node = queue.pop()
            if node not in found:
                found.add(node)
                queue += node.all_input_nodes
        return found
