"""Which of DKS and TAT a model is given under ``method="auto"``: the one that trained better, and why.

At its best rate of a grid, with Adam, DKS was ahead of TAT or level with it (within a point) on 16 of 18 networks, with
and without skips, pooling and attention (docs/howto/training.md); no property of a graph told the other two apart.
"""

from __future__ import annotations

from kgraph.methods import DKS, Method


def choose() -> tuple[Method, str]:
    """The method, and why in one sentence."""
    return DKS(), "method 'auto' is DKS: ahead of TAT, or within a point of it, on 16 of 18 networks that were trained"


__all__ = ["choose"]
