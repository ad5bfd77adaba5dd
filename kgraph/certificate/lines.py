"""A certificate in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kgraph.certificate.judge import rooms, told
from kgraph.report.numbers import count

if TYPE_CHECKING:
    from kgraph.certificate.report import Certificate, CertificateRow


def found_line(one: Certificate) -> str:
    """What the module measures at its output."""
    row = one.final
    first = f"C({one.cosines[0]:.2g}) = {row.c[0]}"
    over = f"{count(one.draws, 'draw')} of the weights, {count(one.pairs, 'pair')} of {one.inputs} each"
    return f"measured: {first}, slope {row.slope}, q {row.q} at the output {row.node}; {over}"


def passed_line(one: Certificate) -> str:
    """Whether that is what was promised, and the first node where it is not."""
    if one.passed is None:
        return "nothing to pass or fail"
    if one.passed:
        return f"passed: the output{_pools(one)} and q everywhere are as promised{_inner(one)}{_coarse(one)}"
    final, first = one.final, one.departing[0]
    said = ", ".join(told(final, quantity) for quantity in final.departures) + " at the output"
    if not final.departures:
        said = f"the output is as promised, but not {_nodes(len(one.broken))} before it"
    return f"failed: {said}; it first departs at {_at(first)}"


def _inner(one: Certificate) -> str:
    """Inner nodes that depart from the plan, which is no promise in itself."""
    inner = one.departing
    return (
        f"; off the plan {'is' if len(inner) == 1 else 'are'} {_nodes(len(inner))}, first {_at(inner[0])}"
        if inner
        else ""
    )


def _coarse(one: Certificate) -> str:
    """Where the measurement leaves more room than the tolerance."""
    found = rooms(one.final, one.draws)
    wide = [f"{name} +- {room:.2g}" for name, room in found.items()]
    if not wide:
        return ""
    return (
        f"; but {count(one.draws, 'draw')} leave more room than the tolerance ({', '.join(wide)}): raise n or the width"
    )


def _nodes(number: int) -> str:
    return "one inner node" if number == 1 else f"{number} inner nodes"


def finite_width(narrow: Sequence[CertificateRow]) -> str:
    """That one network is far from the average one, where it is; "" elsewhere."""
    if not narrow:
        return ""
    worst = max(narrow, key=lambda row: row.spread)
    more = len(narrow) - 1
    others = f", and by more than 10 % at {count(more, 'other node')}" if more else ""
    return (
        f"finite width: at width {worst.width} one draw's q differs from the mean by {worst.spread:.0%} ({worst.node})"
        f"{others}: the infinite-width numbers mean little there"
    )


def _pools(one: Certificate) -> str:
    return ", what pools read" if any(row.kind == "pool" for row in one.rows) else ""


def _at(row: CertificateRow) -> str:
    return f"{row.node} ({row.what}): {', '.join(told(row, quantity) for quantity in row.departures)}"
