"""What goes wrong in a kernel, and where: found once per event, at the node where it happens.

Thresholds, and what they mean. With d = 1 - c half the squared distance of two normalized values:

- **inputs collapse**: d < 0.05 d_input for the most distant pair of inputs. At c_input = 0 that is c >
  .95: two unrelated inputs differ by less than 5 % of their second moment, an angle of 18 degrees instead
  of 90.
- **positions collapse**: the same for two positions of one input, against the input's own position
  cosine.
- **chaos**: d > 2 d_input for the closest pair of inputs, with a slope above 1. At c_input = .9 that is c
  < .8: the squared distance of similar inputs has doubled, and grows for still closer ones since the
  slope exceeds 1.
- **q explodes / vanishes**: q has left [1e-3, 1e3] times the input's (behind an embedding, whose q is that of its
  table, the first norm's where that is larger: raising q to 1 is what a norm is for). A factor 1e3 in q is a
  factor 30 in the activations, and in the gradients of the weights that read them.
- **no signal**: q = 0, e.g. a zero-initialized branch; **not finite**: q is nan or inf.

An event lasts along the graph's edges until the value has clearly recovered (the thresholds are wider on
the way back), and is reported where it begins: a chain of 50 collapsed layers has one flag. On the trunk,
where all paths to the output pass, a flag is "bad"; in a branch it is "warn", as the merge may mend it. A
branch does not hand its state on to the trunk: if the merge does not mend it, the trunk gets its own
flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kgraph.analysis import Analysis, NodeKernel
from kgraph.report.flow import Flow

KINDS = ("not finite", "dead", "explodes", "vanishes", "collapse", "positions", "chaos", "assumed", "sampled")
Severity = Literal["bad", "warn", "info"]

COLLAPSE, COLLAPSE_OVER = 0.05, 0.2  # begins below, is over above (share of the input's distance)
CHAOS, CHAOS_OVER = 2.0, 1.5  # begins above, is over below (multiple of the input's distance)
Q_RANGE, Q_OVER = 1e3, 1e2  # begins outside, is over inside (multiple of the input's q)

#: Probabilities are small by nature and nearly equal at initialization; what they weigh is judged instead.
PROBABILITIES = frozenset({"softmax"})


@dataclass(frozen=True)
class Flag:
    """A remark on a row, in plain words."""

    kind: str
    text: str
    severity: Severity


@dataclass(frozen=True)
class Event:
    """A state that a value enters (`begins`) and leaves (`over`)."""

    kind: str
    text: str
    begins: Callable[[NodeKernel], bool]
    over: Callable[[NodeKernel], bool]


def find_flags(analysis: Analysis, flow: Flow) -> dict[str, tuple[Flag, ...]]:
    """The flags of each flagged node."""
    found: dict[str, list[Flag]] = {}
    for event in events(analysis, flow):
        for name in _beginnings(event, flow):
            on_trunk = name in flow.trunk
            severity: Severity = "info" if event.kind == "dead" and not on_trunk else "bad" if on_trunk else "warn"
            text = event.text if on_trunk else f"{event.text} (branch)"
            found.setdefault(name, []).append(Flag(event.kind, text, severity))
    origin = {node.name: (node.how, node.note) for node in analysis.nodes}
    for node in analysis.nodes:
        if (node.how, node.note) not in [origin.get(name) for name in node.inputs]:
            found.setdefault(node.name, []).extend(_how_flags(node))
    return {name: tuple(flags) for name, flags in found.items() if flags}


def events(analysis: Analysis, flow: Flow) -> tuple[Event, ...]:
    """The events that this analysis can show: chaos, for one, needs a pair of similar inputs."""
    return (*_q_events(flow.q_input, flow.q_most), *_collapse(analysis), *_positions(flow), *_chaos(analysis))


def _beginnings(event: Event, flow: Flow) -> list[str]:
    """Names of the nodes where the event begins: no value it could have come from is in that state."""
    lasting: set[str] = set()
    begun = []
    for node in flow.analysis.nodes:
        if node.name not in flow.dependent or node.op in PROBABILITIES:
            continue
        inherited = any(name in lasting for name in flow.predecessors(node))
        if event.begins(node):
            lasting.add(node.name)
            if not inherited:
                begun.append(node.name)
        elif inherited and not event.over(node):
            lasting.add(node.name)
    return begun


def _q_events(q_input: float, q_most: float) -> tuple[Event, ...]:
    high, low = Q_RANGE * q_most, q_input / Q_RANGE
    high_over, low_over = Q_OVER * q_most, q_input / Q_OVER
    return (
        Event(
            "not finite",
            "q is not finite here",
            lambda n: not math.isfinite(n.q),
            lambda n: math.isfinite(n.q),
        ),
        Event("dead", "no signal: q = 0", lambda n: n.q == 0, lambda n: n.q != 0),
        Event("explodes", "q explodes here", lambda n: high < n.q < math.inf, lambda n: n.q < high_over),
        Event("vanishes", "q vanishes here", lambda n: 0 < n.q < low, lambda n: n.q > low_over),
    )


def _collapse(analysis: Analysis) -> tuple[Event, ...]:
    index, d_input = farthest(analysis)
    if index is None:
        return ()
    return (
        Event(
            "collapse",
            "inputs collapse here",
            lambda n: 1 - n.c[index] < COLLAPSE * d_input,
            lambda n: 1 - n.c[index] > COLLAPSE_OVER * d_input,
        ),
    )


def _positions(flow: Flow) -> tuple[Event, ...]:
    known = [n.c_positions for n in flow.sources if not math.isnan(n.c_positions)]
    d_input = 1 - min(known, default=0.0)
    if d_input <= 1e-12:
        return ()
    return (
        Event(
            "positions",
            "positions collapse here",
            lambda n: 1 - n.c_positions < COLLAPSE * d_input,
            lambda n: not 1 - n.c_positions <= COLLAPSE_OVER * d_input,  # also over where positions are gone
        ),
    )


def _chaos(analysis: Analysis) -> tuple[Event, ...]:
    index, d_input = nearest(analysis)
    if index is None:
        return ()
    return (
        Event(
            "chaos",
            "chaos: similar inputs diverge",
            lambda n: 1 - n.c[index] > CHAOS * d_input and not n.slope <= 1,
            lambda n: 1 - n.c[index] < CHAOS_OVER * d_input,
        ),
    )


def farthest(analysis: Analysis) -> tuple[int | None, float]:
    """Index of the smallest input cosine and its 1 - c; (None, 0) if all are 1."""
    pairs = [(c, i) for i, c in enumerate(analysis.cosines) if c < 1 - 1e-12]
    return (min(pairs)[1], 1 - min(pairs)[0]) if pairs else (None, 0.0)


def nearest(analysis: Analysis) -> tuple[int | None, float]:
    """Index of the largest input cosine that leaves room to diverge (c >= .5), and its 1 - c."""
    pairs = [(c, i) for i, c in enumerate(analysis.cosines) if 0.5 <= c < 1 - 1e-12]
    return (max(pairs)[1], 1 - max(pairs)[0]) if pairs else (None, 0.0)


def _how_flags(node: NodeKernel) -> list[Flag]:
    """Said where the uncertainty begins; the rows after it inherit it and show it in their "how" column."""
    if node.how == "assumed":
        return [Flag("assumed", f"assumed: {node.note or 'no reason given'}", "warn")]
    if node.how == "sampled":
        return [Flag("sampled", f"sampled {node.note}".strip(), "info")]
    return []
