"""Chains of residual blocks in a captured graph: h_{l+1} = h_l + alpha V_l g(h_l), of equal shape, in order.

A block is a sum one of whose terms, the shortcut, is an ancestor of the others, the branches, with nothing between it
and the block's input but dropout, copies and constants. Blocks follow one another where nothing but pointwise
functions stands between a sum and the next shortcut.

What a block is made of: `kgraph.residual.branches`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from torch import fx

from kgraph.canonical import aten, operation_name
from kgraph.modules import WeightedSum
from kgraph.residual.branches import IDENTITY, Branch, BranchReader, IsRandom
from kgraph.residual.sums import SUMS, straight_through
from kgraph.site import shape_of, site_of

_HIDDEN = ("addcmul", "lerp", "addmm", "baddbmm", "addbmm", "addr", "addmv")
"""Operations with a sum inside."""
_VIEWS = ("reshape", "view", "flatten", "unsqueeze", "squeeze")
"""What leaves the entries of a tensor in their order."""


@dataclass(frozen=True, eq=False)
class Block:
    """One residual sum.

    Attributes:
        sum: its node.
        shortcut, shortcut_term: the term of the identity path, and its weight in the sum.
        source: the block's input h, behind dropout, copies and constants.
        shortcut_weight: factor of h altogether.
        branches: the other terms.
    """

    sum: fx.Node
    shortcut: fx.Node
    shortcut_term: float
    source: fx.Node
    shortcut_weight: float
    branches: tuple[Branch, ...]

    @property
    def kind(self) -> str:
        return " + ".join(branch.kind for branch in self.branches)

    @property
    def alpha(self) -> float:
        """Common constant of the branches; not a number where they differ."""
        constants = {branch.constant for branch in self.branches}
        return constants.pop() if len(constants) == 1 else float("nan")


@dataclass(frozen=True, eq=False)
class ResidualChain:
    """Blocks in order; ``between`` are the operations that stand on the identity path between them."""

    blocks: tuple[Block, ...]
    between: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.kind for block in self.blocks))

    @property
    def name(self) -> str:
        """Where it is: modules of the first and the last sum."""
        first, last = (_place(block.sum) for block in (self.blocks[0], self.blocks[-1]))
        return first if first == last else f"{first} .. {last}"


@dataclass(frozen=True)
class FoundChains:
    """All chains, and the sums that are no block, with the reason."""

    chains: tuple[ResidualChain, ...]
    left_out: tuple[tuple[fx.Node, str], ...] = field(default=())


def find_chains(module: fx.GraphModule, is_random: IsRandom) -> FoundChains:
    """The residual chains of a flat graph.

    Args:
        module: the graph.
        is_random: whether a node's value depends on the input.
    """
    finder = _Finder(module, is_random)
    blocks: dict[fx.Node, Block] = {}
    left_out: list[tuple[fx.Node, str]] = []
    for node in module.graph.nodes:
        if finder.hides_sum(node):
            left_out.append((node, f"{operation_name(node)} hides the sum: write h + branch"))
        if not finder.is_sum(node) or finder.is_inner(node):
            continue
        found = finder.block(node)
        if isinstance(found, Block):
            blocks[node] = found
        elif found:
            left_out.append((node, found))
    return FoundChains(tuple(_linked(blocks, finder)), tuple(left_out))


def _linked(blocks: dict[fx.Node, Block], finder: _Finder) -> list[ResidualChain]:
    chains: list[tuple[list[Block], set[str]]] = []
    of: dict[fx.Node, int] = {}
    before = {block.sum: finder.previous(block.source, blocks) for block in blocks.values()}
    following = _following(blocks, {node: known[0] for node, known in before.items()}, finder)
    for block in blocks.values():
        last, between = before[block.sum]
        if last is None or following.get(last) is not block:
            at = len(chains)
            chains.append(([], set()))
            between = ()
        else:
            at = of[last]
        chains[at][0].append(block)
        chains[at][1].update(between)
        of[block.sum] = at
    return [ResidualChain(tuple(own), tuple(sorted(between))) for own, between in chains]


def _following(
    blocks: dict[fx.Node, Block], before: dict[fx.Node, fx.Node | None], finder: _Finder
) -> dict[fx.Node, Block]:
    """The next block of every sum: of those that begin there, the outermost, whose branch holds the others."""
    following: dict[fx.Node, Block] = {}
    for block in blocks.values():
        last = before[block.sum]
        if last is None or _size(last) != _size(block.sum):
            continue
        rival = following.get(last)
        if rival is None or finder.holds(block, rival.sum):
            following[last] = block
    return following


def _size(node: fx.Node) -> int:
    return math.prod(shape_of(node))


def _place(node: fx.Node) -> str:
    return re.sub(r"\.?weighted_sum(_\d+)?$", "", site_of(node).path) or node.name


class _Finder(BranchReader):
    def is_sum(self, node: fx.Node) -> bool:
        weighted = isinstance(self.submodule(node), WeightedSum)
        if not weighted and node.target not in SUMS:
            return False
        terms = node.args if weighted else node.args[:2]
        return node not in self.interior and len(terms) > 1 and all(self.is_random(term) for term in terms)

    def hides_sum(self, node: fx.Node) -> bool:
        """Whether an operation adds a tensor to what is computed from it, and is no sum by name."""
        random = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.carrying]
        if operation_name(node) not in _HIDDEN or len(random) < 2 or random[0] is not node.args[0]:
            return False
        stops = self._stripped(random[0])[2]
        return any(self._between(term, stops) is not None for term in random[1:])

    def holds(self, block: Block, node: fx.Node) -> bool:
        """Whether a node lies inside a block's branches."""
        inside = [self._between(branch.end, {block.source}) for branch in block.branches]
        return any(node in nodes for nodes in inside if nodes is not None)

    def is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is only a term of another: (h + a) + b is one block of two branches."""
        users = list(node.users)
        return len(users) == 1 and self.is_sum(users[0])

    def block(self, node: fx.Node) -> Block | str:
        """The block that ends in this sum, or why it is none ("" for arithmetic without layers)."""
        if straight_through(node) is not None:
            return "its terms cancel (straight-through): it has the value of one of them"
        terms = self._terms(node, 1.0)
        for i, (shortcut, weight) in enumerate(terms):
            source, factor, stops = self._stripped(shortcut)
            others = terms[:i] + terms[i + 1 :]
            inside = [self._between(term, stops) for term, _ in others]
            if all(nodes is not None for nodes in inside):
                found = [
                    self.branch(term, own, nodes or set()) for (term, own), nodes in zip(others, inside, strict=True)
                ]
                reasons = [reason for reason in found if isinstance(reason, str)]
                if reasons:
                    return reasons[0]
                branches = tuple(branch for branch in found if isinstance(branch, Branch))
                return Block(node, shortcut, weight, source, weight * factor, branches)
        return (
            ""
            if self._arithmetic(terms)
            else "no identity shortcut: none of its terms is what the others are computed from"
        )

    def previous(self, source: fx.Node, blocks: dict[fx.Node, Block]) -> tuple[fx.Node | None, tuple[str, ...]]:
        """The sum whose value reaches ``source`` through pointwise functions, and their names."""
        node, between = source, []
        while node not in blocks:
            inputs = [n for n in node.all_input_nodes if n in self.carrying]
            pointwise = node in self.ends or operation_name(node) in (*IDENTITY, *_VIEWS)
            if not pointwise or len(inputs) != 1:
                return None, ()
            if node in self.ends:
                between.append(operation_name(node))
            node = inputs[0]
        return node, tuple(between)

    def _terms(self, node: fx.Node, weight: float) -> list[tuple[fx.Node, float]]:
        module = self.submodule(node)
        if isinstance(module, WeightedSum):
            own = list(zip(node.args, module.weights, strict=True))
        else:
            alpha = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
            own = [(node.args[0], 1.0), (node.args[1], -alpha if node.target is aten.sub.Tensor else alpha)]
        found: list[tuple[fx.Node, float]] = []
        for term, factor in own:
            assert isinstance(term, fx.Node)
            inner = self.is_sum(term) and self.is_inner(term)
            found += self._terms(term, weight * factor) if inner else [(term, weight * factor)]
        return found

    def _stripped(self, node: fx.Node) -> tuple[fx.Node, float, set[fx.Node]]:
        """The node behind dropout, copies and constant factors; the factor; all nodes on the way."""
        factor, way = 1.0, {node}
        while True:
            own = self.constant(node)
            before = next((n for n in node.all_input_nodes if self.is_random(n)), None)
            if before is None or (own is None and operation_name(node) not in IDENTITY):
                return node, factor, way
            factor, node = factor * (own if own is not None else 1.0), before
            way.add(node)

    def _between(self, end: fx.Node, stops: set[fx.Node]) -> set[fx.Node] | None:
        """Random nodes from ``stops`` (excluded) to ``end``; None where ``end`` does not come from there."""
        first = min(self.order[node] for node in stops)
        found: set[fx.Node] = set()
        queue, reached = [end], False
        while queue:
            node = queue.pop()
            reached = reached or node in stops
            if node in stops or node in found or self.order[node] < first or node not in self.carrying:
                continue
            found.add(node)
            queue += node.all_input_nodes
        return found if reached and end in found else None

    def _arithmetic(self, terms: list[tuple[fx.Node, float]]) -> bool:
        """Whether all terms come from the same layers with nothing but arithmetic since (a rotary embedding)."""
        return len({frozenset(self._layers_before(term)) for term, _ in terms}) == 1

    def _layers_before(self, node: fx.Node) -> set[fx.Node]:
        found, seen, queue = set[fx.Node](), {node}, [node]
        while queue:
            current = queue.pop()
            inputs = [n for n in current.all_input_nodes if n in self.carrying]
            if self.weight(current) is not None or not inputs or self.is_sum(current):
                found.add(current)
                continue
            queue += [n for n in inputs if n not in seen]
            seen.update(inputs)
        return found
