"""Sums whose terms cancel: ``x + (q - x).detach()`` has the value of q and the gradient of x, and is no residual."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from kgraph.canonical import aten

SUMS = (aten.add.Tensor, aten.sub.Tensor)
_ZERO = 1e-12


def straight_through(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The term of a sum that cancels, and the difference inside it; None where nothing does."""
    for inner in _terms(node):
        found: defaultdict[fx.Node, float] = defaultdict(float)
        for term, weight in _terms(node).items():
            for own, factor in (_terms(inner) if term is inner else {term: 1.0}).items():
                found[own] += weight * factor
        gone = [term for term, weight in found.items() if abs(weight) < _ZERO]
        if gone and len(gone) < len(found):
            return gone[0], inner
    return None


def _terms(node: fx.Node) -> dict[fx.Node, float]:
    """Both terms of a sum with their factors; nothing for another node."""
    first, second = node.args[:2] if node.target in SUMS else (None, None)
    alpha = node.kwargs.get("alpha", 1.0)
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return {}
    assert isinstance(alpha, (int, float))
    return {first: 1.0, second: -float(alpha) if node.target is aten.sub.Tensor else float(alpha)}


__all__ = ["SUMS", "straight_through"]
