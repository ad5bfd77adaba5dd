"""Linear equations that are adopted one by one, each where it agrees with those before it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

TOLERANCE = 1e-13
"""What two ways to the same number may differ by: a few roundings, numbers being of order 1."""
_REASONS = 3
"""As many reasons as a reader wants; a chain of a thousand equations has a thousand."""
Reason = tuple[bool, str]
"""Whether it is a wish rather than a law, and what it is: laws come first."""


@dataclass(frozen=True)
class _Row:
    """``sum_u terms[u] u + constant``, and why."""

    terms: dict[int, float]
    constant: float
    why: tuple[Reason, ...] = ()


class Equations:
    """A consistent system ``sum_u terms[u] u = constant`` in real unknowns.

    Each adopted equation defines its last unknown by earlier ones (in the order of ``unknowns``), so that one pass
    in that order solves the system; what stays undefined is 0.
    """

    def __init__(self, unknowns: Iterable[Hashable]) -> None:
        self._index = {unknown: place for place, unknown in enumerate(unknowns)}
        self._defined: dict[int, _Row] = {}

    def adopt(
        self, terms: Mapping[Hashable, float], constant: float = 0.0, why: str = "", *, wish: bool = False
    ) -> tuple[str, ...] | None:
        """Adopt an equation; None where that went well, otherwise the reasons of those it contradicts."""
        row = self._reduced(terms, -constant)
        if not row.terms:
            agrees = abs(row.constant) <= TOLERANCE * max(1.0, abs(constant))
            return None if agrees else tuple(text for _, text in row.why)
        last = max(row.terms)
        factor = -row.terms.pop(last)
        others = {unknown: weight / factor for unknown, weight in row.terms.items()}
        self._defined[last] = _Row(others, row.constant / factor, _joined(((wish, why),) if why else (), row.why))
        return None

    def solution(self) -> dict[Hashable, float]:
        """Every unknown's value."""
        values: dict[int, float] = {}
        for place in self._index.values():
            row = self._defined.get(place)
            terms = row.terms.items() if row else ()
            values[place] = (row.constant if row else 0.0) + sum(values[u] * weight for u, weight in terms)
        return {unknown: values[place] for unknown, place in self._index.items()}

    def _reduced(self, terms: Mapping[Hashable, float], constant: float) -> _Row:
        """The same equation without defined unknowns."""
        found: dict[int, float] = {}
        for unknown, weight in terms.items():
            found[self._index[unknown]] = found.get(self._index[unknown], 0.0) + weight
        why: tuple[Reason, ...] = ()
        while defined := [unknown for unknown in found if unknown in self._defined]:
            last = max(defined)
            weight, row = found.pop(last), self._definition(last)
            constant, why = constant + weight * row.constant, _joined(why, row.why)
            for unknown, factor in row.terms.items():
                found[unknown] = found.get(unknown, 0.0) + weight * factor
        return _Row({u: weight for u, weight in found.items() if abs(weight) > TOLERANCE}, constant, why)

    def _definition(self, unknown: int) -> _Row:
        """A defined unknown's row; a row of one term that has been defined since is shortened by the way."""
        row = self._defined[unknown]
        while len(row.terms) == 1:
            ((other, weight),) = row.terms.items()
            if other not in self._defined:
                break
            more = self._defined[other]
            terms = {u: weight * factor for u, factor in more.terms.items()}
            row = _Row(terms, row.constant + weight * more.constant, _joined(row.why, more.why))
        self._defined[unknown] = row
        return row


def _joined(one: tuple[Reason, ...], other: tuple[Reason, ...]) -> tuple[Reason, ...]:
    return tuple(sorted(dict.fromkeys((*one, *other)), key=lambda reason: reason[0]))[:_REASONS]


__all__ = ["TOLERANCE", "Equations"]
