"""What a kernel does to a signal, in half a sentence; and what a component has to do with it."""

from __future__ import annotations

import math
from typing import Protocol

from kgraph.report.numbers import cosine, short

_RANGE = 1e3
"""Ratio of q values from which on q explodes or vanishes."""
_ALIKE, _APART = 0.95, 0.2
"""C(0) from which on unrelated inputs look alike, and up to which they stay apart."""
_FADES, _GROWS = 0.1, 10.0
"""Slopes below and above which small differences fade and grow."""


class Kernels(Protocol):
    """What sentences are made of."""

    @property
    def change(self) -> str: ...
    @property
    def q_low(self) -> float: ...
    @property
    def q_high(self) -> float: ...
    @property
    def c(self) -> float: ...
    @property
    def slope(self) -> float: ...


def fate(q_low: float, q_high: float, c: float, slope: float) -> str:
    """What becomes of q, of unrelated inputs and of small differences."""
    return "; ".join(filter(None, (_size(q_low, q_high), _apart(c), _differences(slope))))


def _size(low: float, high: float) -> str:
    if math.isnan(high):  # no activation reads anything
        return ""
    if math.isinf(high):
        return "q is not finite"
    if high > _RANGE and high > 1 / max(low, 1e-300):
        return f"q explodes (by {short(high)})"
    if low * _RANGE < 1:
        return f"q vanishes (by {short(1 / low)})" if low > 0 else "q is 0"
    return "q stays in range" if high > 2 * low else "q stays"


def _apart(c: float) -> str:
    if math.isnan(c):
        return "no cosine is left"
    if c >= _ALIKE:
        return "unrelated inputs look alike"
    return "unrelated inputs stay apart" if c <= _APART else f"unrelated inputs keep {1 - c:.0%} of their difference"


def _differences(slope: float) -> str:
    if math.isnan(slope):
        return ""
    return "small differences fade" if slope < _FADES else "small differences grow" if slope > _GROWS else ""


def difference(own: Kernels, other: Kernels) -> str:
    """What a change does to the model as it is; "" where it does little."""
    parts = []
    for name, before, after, show in (
        ("C(0)", own.c, other.c, cosine),
        ("slope", own.slope, other.slope, short),
        ("largest q", own.q_high, other.q_high, short),
        ("smallest q", own.q_low, other.q_low, short),
    ):
        if _matters(name, before, after):
            parts.append(f"{name} {show(before)} -> {show(after)}")
    return f"{other.change}: {', '.join(parts)}" if parts else ""


def _matters(name: str, before: float, after: float) -> bool:
    if math.isnan(before) or math.isnan(after):
        return math.isnan(before) != math.isnan(after)
    if name == "C(0)":
        return abs(after - before) > 0.1
    low, high = sorted((abs(before), abs(after)))
    return high > (1.5 if name == "slope" else 10.0) * low
