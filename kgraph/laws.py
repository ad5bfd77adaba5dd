"""Laws of parts: residual streams, read behind their activations, and maxima over windows, without draws."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.how import How, integrated
from kgraph.kernel import Apply, Part, Sum
from kgraph.maps import stream
from kgraph.maps.maximum import Shares, maximum
from kgraph.maps.stream import Law

DEGREE = 24
"""Polynomials kept; what `COARSE` of them give instead is the error that is printed."""
COARSE = 16
_LARGEST_ERROR = 2e-3
"""Relative to q; where polynomials are worse than that (jumps, exponentials), draws are better."""
_NOTHING = 1e-26


class Moments(NamedTuple):
    """What is read off a law: cov, slope and ntk [P, 2], the mean, and how."""

    tensors: dict[str, Tensor]
    mean: float
    how: How


Both = tuple[Law, Law]
"""A law at both degrees."""

_laws: weakref.WeakKeyDictionary[Part, Both | None] = weakref.WeakKeyDictionary()


def read(law: Both) -> Moments | None:
    """The law's moments; None where the polynomials kept are too few."""
    fine, coarse = law
    q = float(fine.cov.amax())
    error = float((fine.cov - coarse.cov).abs().amax()) / q if q > 0 else 0.0
    if not error < _LARGEST_ERROR:
        return None
    tensors = {"cov": fine.cov, **{name: fine.tangent(name) for name in fine.tangents}}
    by_pair = {name: value.reshape(-1, 2) for name, value in tensors.items()}
    return Moments(by_pair, fine.mean, integrated(error))


def law_of(part: Part) -> Both | None:
    """The law of a part, computed once; None where its expression has products, masks or shared weights."""
    if part not in _laws:
        _laws[part] = _make(part)
    return _laws[part]


def of_expression(part: Part) -> Both | None:
    """The law that the expression alone tells: of a part whose own moments are not known yet."""
    return _sum(terms_of(part)) if isinstance(part.expr, Sum) else law_of(part)


def restart() -> None:
    """Forget the laws of an analysis before."""
    _laws.clear()


def remember(part: Part, law: Both | None) -> None:
    """The law of a part whose expression does not tell it, or told it of an equal part."""
    _laws[part] = law


def of_maximum(part: Part, shares: Shares, overlap: float) -> Both | None:
    """Law of the maximum of a Gaussian part over windows."""
    variance = float(part.q) - part.mean**2
    if not part.gaussian or not variance > _NOTHING * part.mean**2:
        return None
    tangents = {"slope": part.slope, "ntk": part.ntk}
    law = maximum(part.mean, variance, part.cov - part.mean**2, tangents, shares, overlap, DEGREE)
    return law and (law, stream.truncated(law, COARSE))


def _make(part: Part) -> Both | None:
    if part.gaussian:
        return _gaussian([(1.0, part)])
    if isinstance(part.expr, Apply):
        inner, fn = law_of(part.expr.arg), part.expr.fn
        if inner is None:
            return None
        try:
            fine = stream.mapped(inner[0], fn)
        except InputError:  # no finite second moment of it or of its derivative
            return None
        return fine, stream.mapped(inner[1], fn, fine.atoms)
    if isinstance(part.expr, Sum):
        return _sum(terms_of(part))
    return None


def _gaussian(terms: list[tuple[float, Part]]) -> Both | None:
    """Sum of independent Gaussian parts."""
    mean = sum(w * t.mean for w, t in terms)
    variance = sum(w * w * (float(t.q) - t.mean**2) for w, t in terms)
    if not variance > _NOTHING * mean**2 or not math.isfinite(variance):
        return None
    cov = torch.stack([w * w * (t.cov - t.mean**2) for w, t in terms]).sum(0).flatten()
    tangents = {
        name: torch.stack([w * w * getattr(t, name) for w, t in terms]).sum(0).flatten() for name in ("slope", "ntk")
    }
    law = stream.gaussian(mean, variance, cov, tangents, DEGREE)
    return law, stream.truncated(law, COARSE)


def terms_of(part: Part) -> list[tuple[float, Part]]:
    """Terms of nested sums, those of one part together; a part whose law is known is a term."""
    total: dict[Part, float] = {}
    queue = [(1.0, part)]
    while queue:
        weight, one = queue.pop()
        if isinstance(one.expr, Sum) and (one is part or _laws.get(one) is None):
            queue += [(weight * w, term) for w, term in one.expr.terms]
        else:
            total[one] = total.get(one, 0.0) + weight
    return [(weight, one) for one, weight in total.items() if weight]


def _sum(terms: list[tuple[float, Part]]) -> Both | None:
    """Law of a sum of independent terms, at least one of them Gaussian or all but one tangents alone."""
    if any(not t.cov.any() for _, t in terms):
        return _with_tangents(terms)
    smooth = [(w, t) for w, t in terms if t.gaussian]
    rough = [(w, t) for w, t in terms if not t.gaussian]
    if any(not a.independent(b) for i, (_, a) in enumerate(terms) for _, b in terms[:i]):
        return None
    if not smooth:
        return _scaled(*rough[0]) if len(rough) == 1 else None
    found = _gaussian(smooth)
    for weight, term in rough:
        more = _scaled(weight, term)
        if found is None or more is None:
            return None
        fine, coarse = stream.added(more[0], found[0], DEGREE), stream.added(more[1], found[1], COARSE)
        found = None if fine is None or coarse is None else (fine, coarse)
    return found


def _with_tangents(terms: list[tuple[float, Part]]) -> Both | None:
    """Law of a sum some of whose terms are nothing but tangents of their own."""
    law = _sum([(w, t) for w, t in terms if t.cov.any()])
    for weight, term in terms:
        if law is not None and not term.cov.any():
            own = {name: weight**2 * getattr(term, name).flatten() for name in ("slope", "ntk")}
            law = stream.trained(law[0], own), stream.trained(law[1], own)
    return law


def _scaled(weight: float, part: Part) -> Both | None:
    law = law_of(part)
    return law and (stream.scaled(law[0], weight), stream.scaled(law[1], weight))
