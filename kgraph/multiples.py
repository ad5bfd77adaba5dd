"""Sums of multiples of one tensor: as a value ``a h + b h`` is a multiple of h, whatever gradients either part stops.

``-h + (2 h).detach()`` has the value of h and its gradient the other way, ``.1 h + (h - .1 h).detach()`` a tenth of it.
A constant put in front of one part would change both the value and the ratio that the user wrote; one behind the
whole sum changes neither.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from kgraph.canonical import operation_name
from kgraph.gradient_stops import stops_of

_SUMS = ("add", "sub", "rsub", "subtract", "lerp")
_FACTORS = ("mul", "multiply")
_FIRST = ("div", "divide", "true_divide", "neg", "negative", "positive", "clone", "contiguous", "to", "_to_copy")
"""A multiple of what stands first."""


class Multiples:
    """Which nodes of a graph are multiples of which tensor.

    Args:
        graph: of canonical operations.
        random: whether a node's value is random (depends on the input).
    """

    def __init__(self, graph: fx.Graph, random: Callable[[fx.Node], bool]) -> None:
        self._of: dict[fx.Node, fx.Node] = {}
        self._sums: set[fx.Node] = set()
        for node in graph.nodes:
            terms = [n for n in node.args if isinstance(n, fx.Node) and random(n)] if node.op != "output" else []
            if len({self._of.get(term, term) for term in terms}) == 1:
                self._read(node, terms)
        self._parts: dict[fx.Node, fx.Node] = {}  # and the whole sum of each
        for node in reversed(self._of):
            inside = [user for user in node.users if self._of.get(user) is self._of[node]]
            whole = [self._parts.get(user, user) for user in inside if user in self._sums or user in self._parts]
            if whole:
                self._parts[node] = whole[0]

    def is_part(self, node: fx.Node) -> bool:
        """Whether a sum of multiples of one tensor reads the node, by itself or times a number."""
        return node in self._parts

    def is_sum(self, node: fx.Node) -> bool:
        """Whether a node is such a sum, and no part of a larger one."""
        return node in self._sums and node not in self._parts

    def stopped(self) -> set[fx.Node]:
        """Such sums, and their parts, in which a gradient is stopped."""
        marked = {self._parts.get(node, node) for node in self._of if stops_of(node)}
        return {node for node in self._of if self._parts.get(node, node) in marked and self._belongs(node)}

    def _belongs(self, node: fx.Node) -> bool:
        return node in self._sums or node in self._parts

    def _read(self, node: fx.Node, terms: list[fx.Node]) -> None:
        name = operation_name(node)
        added = name in _SUMS and len(terms) > 1
        multiplied = len(terms) == 1 and (name in _FACTORS or (name in _FIRST and node.args[0] is terms[0]))
        if added:
            self._sums.add(node)
        if added or multiplied:
            self._of[node] = self._of.get(terms[0], terms[0])


__all__ = ["Multiples"]
