"""The judge: what kgraph says of a program against what the oracle measures, extrapolated to infinite width.

kgraph's numbers hold in the limit of many channels. Its error at width w is ``d(w) = a + b / w + ...`` and ``a`` must
be 0; from two widths, ``a = (r d(r w) - d(w)) / (r - 1)``, up to a remainder of the order of ``(b / w)^2``.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from scipy import stats

from kgraph.errors import KGraphError

from .oracle import Estimate, Measured
from .program import Program
from .subjects import Row

SIGMAS = 4.0
WIDTH = 48
RATIO = 3
"""Of the two widths: the larger, the less the extrapolation magnifies errors."""
NETWORKS = (96, 40, 16)
"""Drawn at a width, by the dimensions of positions: where there are more, one network says more and takes longer."""
TRUSTED = ("exact", "quadrature")
MEASURED = (*TRUSTED, "sampled")
AGAIN = ((1, 1, 2), (2, 2, 1))
"""Seeds of the further measurements, with their factors on the widths and on the number of networks."""
ROUNDING = 2e-3
"""Of difference quotients and single precision."""

TINY = 1e-12
CALIBRATED = ("q", "c 0", "c 0.5", "c 0.9")
"""Numbers whose printed error is held against the truth."""


_LARGE = 30.0
"""Measured slopes past which a function jumps: steep continuous ones of the generator stay below 10."""


@dataclass(frozen=True)
class Subject:
    """What is judged: one of kgraph's calls, and how the oracle measures the same.

    Attributes:
        said: kgraph's rows of a program at a width.
        measured: the oracle's estimates of a program at a width, from some networks, with a seed.
    """

    said: Callable[[Program, int], dict[str, Row]]
    measured: Callable[[Program, int, int, int], Measured]


@dataclass(frozen=True)
class Comparison:
    """One number of one value: kgraph's at the larger width, and the error that stays at infinite width.

    Attributes:
        deviation: extrapolated ``kgraph - truth``; relative for q and NTK.
        error: its standard error.
        allowed: what chance and the remainder of the extrapolation may add.
    """

    value: str
    quantity: str
    how: str
    said: float
    measured: float
    deviation: float
    error: float
    allowed: float
    printed: float = 0.0

    @property
    def wrong(self) -> bool:
        if math.isinf(self.said):  # measured between close inputs, an infinite slope is a large number
            return not self.measured > _LARGE
        return not abs(self.deviation) <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.value} {self.quantity}: {self.said:.5g} ({self.how}), measured {self.measured:.5g} at finite "
            f"width; at infinite width off by {self.deviation:+.4f} +- {self.error:.4f}, allowed {self.allowed:.4f}"
        )


@dataclass
class Verdict:
    """What became of one program.

    Attributes:
        status: "right", "wrong", "refused" (a named error), "crashed" (any other), "slow" or "large".
        detail: the error.
        seconds: kgraph's.
        counts: values by how kgraph got them.
        wrong: numbers called exact or quadrature that are neither.
        sampled: numbers with a printed error, of steady programs, to be held against the truth.
        compared: numbers called exact or quadrature that were compared.
    """

    seed: int
    status: str = "right"
    detail: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[Comparison] = field(default_factory=list)
    sampled: list[Comparison] = field(default_factory=list)
    compared: int = 0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def compare(rows: list[dict[str, Row]], measured: list[Measured], networks: int) -> list[Comparison]:
    """All numbers that kgraph and the oracle have at both widths."""
    quantile = float(stats.t.isf(stats.norm.sf(SIGMAS), networks - 1))
    found = []
    for name, large in rows[1].items():
        small = rows[0].get(name)
        for quantity, truth in measured[1].get(name, {}).items():
            if small is None or quantity not in measured[0][name] or math.isnan(large.numbers[quantity]):
                continue
            truths = [measured[0][name][quantity], truth]
            if large.how == "sampled":
                small = large  # draws at another width have errors of their own
            found.append(_compared(name, quantity, [small, large], truths, quantile))
    return found


def _compared(name: str, quantity: str, rows: list[Row], truths: list[Estimate], quantile: float) -> Comparison:
    row, truth = rows[1], truths[1]
    small, large = (_difference(quantity, *each) for each in zip(rows, truths, strict=True))
    drift = (large.value - small.value) / (RATIO - 1)
    deviation, error = large.value + drift, math.hypot(RATIO * large.error, small.error) / (RATIO - 1)
    allowed = quantile * error + (RATIO * drift) ** 2 + ROUNDING
    said = row.numbers[quantity]
    return Comparison(name, quantity, row.how, said, truth.value, deviation, error, allowed, row.error)


def _difference(quantity: str, row: Row, truth: Estimate) -> Estimate:
    """kgraph minus truth in units of the number's scale."""
    said, scale = row.numbers[quantity], max(row.scales.get(quantity, 1.0), TINY)
    if said == truth.value:  # infinite slopes
        return Estimate(0.0, 0.0)
    return Estimate((said - truth.value) / scale, truth.error / scale)


def judge(
    program: Program, subject: Subject, *, width: int = WIDTH, effort: float = 1.0, twice: bool = True
) -> Verdict:
    """One program: kgraph at two widths, the oracle at two.

    Args:
        program: what is judged.
        subject: by which of kgraph's calls.
        width: the smaller of the widths.
        effort: factor on the number of networks.
        twice: whether suspects are measured again with fresh networks, then with wider ones.
    """
    networks = round(effort * NETWORKS[len(program.given.places)])
    verdict, start = Verdict(program.seed), time.perf_counter()
    try:
        rows = [subject.said(program, w) for w in (width, RATIO * width)]
    except TimeoutError:
        raise
    except Exception as error:  # the very thing looked for: whatever is raised is a finding
        verdict.status, verdict.detail = failure(error)
        return verdict
    finally:
        verdict.seconds = time.perf_counter() - start
    for row in rows[1].values():
        verdict.counts[row.how] = verdict.counts.get(row.how, 0) + 1
    if not any(row.how in MEASURED for row in rows[1].values()):
        return verdict
    found = _found(program, subject, rows, width, networks, seed=0)
    verdict.compared = sum(c.how in TRUSTED for c in found)
    fair = program.steady and not program.tabled
    verdict.sampled = [c for c in found if fair and c.how == "sampled" and c.quantity in CALIBRATED]
    suspects = [c for c in found if c.wrong and c.how in TRUSTED]
    for seed, factor, more in AGAIN if twice else ():
        if suspects:
            suspects = confirmed(program, subject, suspects, factor * width, more * networks, seed)
    verdict.wrong, verdict.status = suspects, "wrong" if suspects else "right"
    return verdict


def _found(
    program: Program, subject: Subject, rows: list[dict[str, Row]], width: int, networks: int, seed: int
) -> list[Comparison]:
    measured = [subject.measured(program, w, networks, 10 * w + seed) for w in (width, RATIO * width)]
    found = compare(rows, measured, networks)
    # of a jump that is rarely met, the measured slope is any number
    return [c for c in found if not (math.isinf(c.said) and program.jumps)]


def confirmed(
    program: Program, subject: Subject, suspects: list[Comparison], width: int, networks: int, seed: int
) -> list[Comparison]:
    """The suspects that stay wrong with other networks."""
    rows = [subject.said(program, w) for w in (width, RATIO * width)]
    keys = {(c.value, c.quantity) for c in suspects}
    again = _found(program, subject, rows, width, networks, seed)
    return [c for c in again if c.wrong and c.how in TRUSTED and (c.value, c.quantity) in keys]


def failure(error: Exception) -> tuple[str, str]:
    """Status and detail of a program that ended in an error: "large" where it was for memory, named or not."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "large", "more memory than a process may have"
    if isinstance(error, KGraphError):
        return "refused", f"{type(error).__name__}: {kind_of(error)}"
    return "crashed", f"{type(error).__name__}: {error}"


def kind_of(error: KGraphError) -> str:
    """The message without names and numbers, to count refusals by."""
    text = re.sub(r"'[^']*'|\([^)]*\)", "", error.what)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.e+-]*", "#", text)).strip()[:120]
