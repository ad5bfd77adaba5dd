"""How numbers are written in reports: short, and honest near the ends of their range."""

from __future__ import annotations

import math


def short(value: float) -> str:
    """Three significant digits: "0.981", "12.3", "1.2e5"; "-" for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 9999.5:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return power(value)


def power(value: float) -> str:
    """Two digits and a power of ten: "1.2e5"."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def cosine(value: float) -> str:
    """A c value: "0.318"; near 1, where only the distance tells layers apart, "1-2e-5"."""
    distance = 1.0 - value
    if math.isnan(value) or not 0 < distance < 5e-4:
        return short(round(value, 3) + 0.0) if math.isfinite(value) else "-"
    mantissa, exponent = f"{distance:.0e}".split("e")
    return f"1-{mantissa}e{int(exponent)}"


def plain(value: float) -> str:
    """A setting such as an input cosine: "0", "0.5", "0.9"."""
    return f"{value:.4g}"


def elide(text: str, width: int) -> str:
    """`text` with its middle replaced by "…" if longer than `width`: both ends of a dotted path tell most."""
    if len(text) <= width:
        return text
    if width < 3:
        return text[:width]
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def count(number: int, noun: str) -> str:
    """ "1 node", "1,024 nodes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
