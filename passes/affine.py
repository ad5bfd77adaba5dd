"""Affine layers of a graph: the nodes whose weights are drawn, and what they read."""

from __future__ import annotations

from torch import fx

from kgraph.canonical import operation_name
from kgraph.passes.base import Workspace

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def affine_source(work: Workspace, node: fx.Node) -> fx.Node | None:
    """The random tensor that an affine layer reads; None where the node is no layer."""
    name = operation_name(node)
    if name in ("linear", *CONVOLUTIONS, *TRANSPOSED):
        source, weight = node.args[0], node.args[1]
    elif name == "addmm":
        source, weight = node.args[1], node.args[2]
    elif name in ("matmul", "mm"):
        source, weight = node.args[0], node.args[1]
    else:
        return None
    layer = isinstance(source, fx.Node) and work.is_random(source) and not work.is_random(weight)
    return source if layer else None  # pyright: ignore[reportReturnType]


__all__ = ["CONVOLUTIONS", "TRANSPOSED", "affine_source"]
