"""How a number was obtained: every row of a report says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEVELS = ("exact", "quadrature", "sampled", "assumed")


@dataclass(frozen=True)
class How:
    """How sure a number is, from the surest level to the least.

    ``exact`` < ``quadrature`` (with its truncation, where it has one) < ``sampled`` (with its standard error)
    < ``assumed`` (with the reason).
    """

    level: int = 0
    note: str = ""
    error: float = 0.0

    @property
    def name(self) -> str:
        return LEVELS[self.level]

    def __or__(self, other: How) -> How:
        """The less certain of the two."""
        return other if (other.level, other.error) > (self.level, self.error) else self

    def drawn(self, standard_error: float) -> How:
        """After draws that add an error of their own: relative errors add up in quadrature."""
        return self | sampled(math.hypot(self.error, standard_error))


EXACT = How(0)
QUADRATURE = How(1)


def integrated(error: float) -> How:
    """Integrated with a truncation that changes the kernel by ``error``, relative to q."""
    return How(1, f"+-{error:.0e}", error) if error > 1e-9 else QUADRATURE


def sampled(standard_error: float) -> How:
    """Measured on draws; relative standard error of the q value."""
    return How(2, f"+-{standard_error:.1e}", standard_error)


def assumed(reason: str) -> How:
    """Right only if ``reason`` holds."""
    return How(3, reason)
