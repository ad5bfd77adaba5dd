"""Rows of a report: one node each, with what happens there and whether the table may fold it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kgraph.analysis import Analysis, NodeKernel
from kgraph.report.flags import Flag, find_flags
from kgraph.report.flow import Flow

#: Ops that only re-index positions or channels, or do nothing in this mode. They are folded only where the
#: kernel is unchanged, so dropout in train mode or a flatten that averages positions still gets its row.
REINDEXING = frozenset(
    """alias chunk clone contiguous detach dropout expand expand_as flatten flip getitem identity movedim
    narrow permute pixel_shuffle pixel_unshuffle repeat reshape roll select slice split split_with_sizes
    squeeze stack swapaxes t to transpose type_as unbind unflatten unfold unsqueeze view""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    node: NodeKernel
    flags: tuple[Flag, ...]
    trunk: bool
    """Every path from the inputs to the output passes here."""
    live: bool
    """The value depends on an input (parameters and position embeddings do not)."""
    folded: bool
    """The node merely re-indexes, nothing changes and nothing is flagged: the table may hide it."""
    x: float
    """Place on the depth axis: nodes of equal depth are spread evenly over [depth, depth + 1)."""

    @property
    def flag_text(self) -> str:
        """The flags in plain words, or ""."""
        return "; ".join(flag.text for flag in self.flags)


def make_rows(analysis: Analysis) -> tuple[Row, ...]:
    """Rows of all nodes, in topological order."""
    flow = Flow(analysis)
    flags = find_flags(analysis, flow)
    places = depth_axis(analysis.nodes)
    shown = {*flags, analysis.output}
    return tuple(
        Row(
            node=node,
            flags=flags.get(node.name, ()),
            trunk=node.name in flow.trunk,
            live=node.name in flow.dependent,
            folded=node.name not in shown and is_reindexing(node, flow.parents(node)),
            x=place,
        )
        for node, place in zip(analysis.nodes, places, strict=True)
    )


def is_reindexing(node: NodeKernel, parents: Iterable[NodeKernel]) -> bool:
    """True if the node is a re-indexing op with one input row and hands its kernel on unchanged."""
    parents = tuple(parents)
    if len(parents) != 1 or node.op.strip("_") not in REINDEXING:
        return False
    (parent,) = parents
    before = (parent.q, parent.mean, parent.slope, parent.ntk, *parent.c)
    after = (node.q, node.mean, node.slope, node.ntk, *node.c)
    return all(_same(one, other) for one, other in zip(before, after, strict=True))


def depth_axis(nodes: Iterable[NodeKernel]) -> list[float]:
    """Place of each node on a depth axis that two versions of a model share, whatever their node counts."""
    nodes = tuple(nodes)
    totals: dict[int, int] = {}
    for node in nodes:
        totals[node.depth] = totals.get(node.depth, 0) + 1
    seen = dict.fromkeys(totals, 0)
    places = []
    for node in nodes:
        places.append(node.depth + seen[node.depth] / totals[node.depth])
        seen[node.depth] += 1
    return places


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))
