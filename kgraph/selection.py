"""Which of DKS and TAT a model is given under ``method="auto"``.

Chosen by what trained better (benchmarks/training.py): where positions are averaged or pooled, a mean is what all
inputs share in the end, and DKS makes it 0 where TAT lets C(0) be .9. Without pooling, TAT's slope of 1 does better.
"""

from __future__ import annotations

from torch import fx

from kgraph.canonical import operation_name
from kgraph.capture import Graph
from kgraph.methods import DKS, TAT, Method
from kgraph.propagate import Propagation

_POOLS = tuple(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3))


def choose(graph: Graph, found: Propagation) -> tuple[Method, str]:
    """The method, and why in one sentence.

    Args:
        graph: as captured.
        found: its kernels.
    """
    pool = next((node for node in graph.module.graph.nodes if _pools(node, found)), None)
    if pool is None:
        return TAT(), "method 'auto' is TAT: nothing pools positions, and slopes of 1 trained better there"
    return DKS(), f"method 'auto' is DKS: {pool.name} pools positions, behind which a mean is what all inputs share"


def _pools(node: fx.Node, found: Propagation) -> bool:
    """Whether a node joins positions of what depends on the input."""
    kernels, name = found.kernels(), operation_name(node)
    read = node.all_input_nodes[0] if node.all_input_nodes else None
    if node not in kernels or read not in kernels:
        return False
    return name in _POOLS or (name == "mean" and kernels[read].positions > kernels[node].positions)


__all__ = ["choose"]
