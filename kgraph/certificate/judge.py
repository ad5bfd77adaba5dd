"""Whether a row of a certificate keeps what was promised: tolerances, and what is beyond them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy import stats

from kgraph.report.numbers import short

if TYPE_CHECKING:
    from kgraph.certificate.report import CertificateRow, Figure

C_TOLERANCE = 0.03
"""Absolute, of a cosine."""
RELATIVE_TOLERANCE = 0.1
"""Of a slope, and of q."""
NAMES = {"q": "q", "c": "C", "slope": "slope"}
"""Of the quantities, as they are written."""


def checks(row: CertificateRow) -> dict[str, tuple[Figure, float, float]]:
    """By quantity: measured, promised, and the tolerance."""
    return {
        "q": (row.q, row.promised_q, RELATIVE_TOLERANCE * row.promised_q),
        "c": (row.c[0], row.promised_c[0], C_TOLERANCE),
        "slope": (row.slope, row.promised_slope, RELATIVE_TOLERANCE * row.promised_slope),
    }


def told(row: CertificateRow, quantity: str) -> str:
    """``C 0.998 +- 0.001 where 0.900 is promised``."""
    figure, promise, _ = checks(row)[quantity]
    return f"{NAMES[quantity]} {figure} where {number(promise)} is promised"


def rooms(row: CertificateRow, draws: int) -> dict[str, float]:
    """Quantities that are promised and known less well than the tolerance, and how well."""
    found = {name: (_student(draws) * figure.error, tolerance) for name, (figure, _, tolerance) in checks(row).items()}
    return {NAMES[name]: room for name, (room, tolerance) in found.items() if room > tolerance}


def departures(row: CertificateRow, draws: int) -> tuple[str, ...]:
    """What of a row's promise does not hold, beyond tolerance and the error of the measurement."""
    quantile = _student(draws)
    return tuple(
        name
        for name, (figure, promise, tolerance) in checks(row).items()
        if math.isfinite(promise) and not abs(figure.value - promise) <= tolerance + quantile * figure.error
    )


def _student(draws: int) -> float:
    """Half the 95 % interval of a mean of so many draws, in standard errors: 3.2 of 4 draws, 2.3 of 8."""
    return float(stats.t.ppf(0.975, draws - 1))


def number(value: float) -> str:
    """Three digits after the point below 10: a slope of .013 and a C of .998 are told apart from 0 and 1."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else short(value)
