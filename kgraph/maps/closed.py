"""Closed forms of the Gaussian integrals behind the local Q and C maps.

For ``(z1, z2) ~ N(0, [[q1, cov], [cov, q2]])`` a :class:`ClosedForm` holds ``E[phi(z1) phi(z2)]``,
``E[phi'(z1) phi'(z2)]`` and ``E[phi(z)]``, accurate to rounding
(about 1e-15 of ``sqrt(q1 q2)``) at every c including +-1. Derivatives are those
autodiff gives: zero almost everywhere for step and sign.

Sources: Williams 1998 (erf); Cho & Saul 2009, arXiv 1109.5231 (relu, step); Han et al. 2022,
arXiv 2209.04121 (a survey of dual activations). The exact gelu is derived with Stein's lemma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.maps.gap import Near, erf_gap, jump_gap, linear_gap, two_slopes_gap

Dual = tuple[Tensor, Tensor]
_ROUNDING = 4 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """Exact Gaussian integrals of one pointwise function.

    Args:
        dual: ``(q1, q2, cov) -> (E[phi phi], E[phi' phi'])``, elementwise on float64 tensors.
        mean: ``q -> E[phi(z)]``.
        near: ``(q1, q2, gap) -> (E[(phi(z1) - phi(z2))^2] / 2, E[phi' phi'])`` with all digits of a small gap
            ``E[(z1 - z2)^2] / 2``; None where that is not known.
        slopes: those for u > 0 and u < 0, where the function is 0 at 0 and straight on both sides.
    """

    dual: Callable[[Tensor, Tensor, Tensor], Dual]
    mean: Callable[[Tensor], Tensor]
    near: Near | None = None
    slopes: tuple[float, float] | None = None

    def affine(self, input_scale: float, output_shift: float, output_scale: float) -> ClosedForm:
        """Closed form of ``output_scale * (phi(input_scale * u) + output_shift)``."""
        squared = input_scale * input_scale

        def mean(q: Tensor) -> Tensor:
            return output_scale * (self.mean(squared * q) + output_shift)

        def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
            value, slope = self.dual(squared * q1, squared * q2, squared * cov)
            if output_shift:
                value = value + output_shift * (self.mean(squared * q1) + self.mean(squared * q2) + output_shift)
            return output_scale**2 * value, (output_scale * input_scale) ** 2 * slope

        own = self.near

        def near(q1: Tensor, q2: Tensor, gap: Tensor) -> Dual:
            assert own is not None
            value, slope = own(squared * q1, squared * q2, squared * gap)
            return output_scale**2 * value, (output_scale * input_scale) ** 2 * slope

        return ClosedForm(
            dual, mean, None if own is None else near, self._slopes(input_scale, output_shift, output_scale)
        )

    def _slopes(self, input_scale: float, output_shift: float, output_scale: float) -> tuple[float, float] | None:
        if self.slopes is None or output_shift:
            return None
        positive, negative = self.slopes if input_scale >= 0 else self.slopes[::-1]
        return output_scale * input_scale * positive, output_scale * input_scale * negative


def correlation(q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(r, c, s)`` with ``r = sqrt(q1 q2)``, ``c = cov / r`` in [-1, 1] and ``s = sqrt(1 - c^2)``.

    ``s`` comes from ``(1-c)(1+c)``, which keeps its digits near |c| = 1. A |c| within four ulps of 1 is taken
    to be 1: a covariance computed as ``sqrt(q1) * sqrt(q2)`` means identical inputs. c = 0 where r = 0.
    """
    r = torch.sqrt(q1) * torch.sqrt(q2)
    c = cov / r
    if not r.all():
        c = torch.where(r > 0, c, 0.0)
    near = c.abs() >= 1 - _ROUNDING
    if near.any():
        c = torch.where(near, torch.sign(c), c)
    return r, c, ((1 - c).mul_(1 + c)).sqrt_()


def two_slopes(positive: float, negative: float) -> ClosedForm:
    """``positive * max(u, 0) + negative * min(u, 0)``, written as ``even * |u| + odd * u``."""
    even, odd = (positive - negative) / 2, (positive + negative) / 2

    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        r, c, s = correlation(q1, q2, cov)
        share = even**2 * (2 / math.pi)
        arcsine = torch.asin(c)  # as good as atan2(c, s), for c is taken as it is
        s.mul_(share).addcmul_(c, arcsine, value=share)
        return s.add_(c, alpha=odd**2).mul_(r), arcsine.mul_(share).add_(odd**2)

    def mean(q: Tensor) -> Tensor:
        return even * torch.sqrt(2 * q / math.pi)

    return ClosedForm(dual, mean, two_slopes_gap(positive, negative), (positive, negative))


def _identity() -> ClosedForm:
    return ClosedForm(lambda q1, q2, cov: (cov, torch.ones_like(cov)), torch.zeros_like, linear_gap, (1.0, 1.0))


def _jump(high: float, low: float) -> ClosedForm:
    """``high`` for u > 0 and ``low`` for u < 0: step is (1, 0), sign is (1, -1)."""
    middle, half = (high + low) / 2, (high - low) / 2

    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        _, c, s = correlation(q1, q2, cov)
        return middle**2 + half**2 * (2 / math.pi) * torch.atan2(c, s), torch.zeros_like(cov)

    return ClosedForm(dual, lambda q: torch.full_like(q, middle), jump_gap(high, low))


def _gap(q1: Tensor, q2: Tensor, cov: Tensor) -> Tensor:
    """``q1 q2 - cov^2`` without cancellation."""
    r = torch.sqrt(q1) * torch.sqrt(q2)
    return ((r - cov) * (r + cov)).clamp_min(0.0)


def _erf() -> ClosedForm:
    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        root = torch.sqrt(1 + 2 * q1 + 2 * q2 + 4 * _gap(q1, q2, cov))
        return (2 / math.pi) * torch.atan2(2 * cov, root), (4 / math.pi) / root

    return ClosedForm(dual, torch.zeros_like, erf_gap)


def _waves(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
    """``exp(-(q1+q2)/2)`` times ``(sinh(cov), cosh(cov))``, without overflow or loss at small cov."""
    size = cov.abs()
    front = torch.exp(-(q1 + q2) / 2 + size)
    return torch.sign(cov) * front * -torch.expm1(-2 * size) / 2, front * (1 + torch.exp(-2 * size)) / 2


def _sin() -> ClosedForm:
    return ClosedForm(_waves, torch.zeros_like)


def _cos() -> ClosedForm:
    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        odd, even = _waves(q1, q2, cov)
        return even, odd

    return ClosedForm(dual, lambda q: torch.exp(-q / 2))


def _gelu_exact() -> ClosedForm:
    """``u Phi(u)``; P = E[Phi Phi], A = E[density density], Stein's lemma gives the rest."""

    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        gap = _gap(q1, q2, cov)
        det = 1 + q1 + q2 + gap
        prob = 0.25 + torch.atan2(cov, torch.sqrt(det)) / (2 * math.pi)
        dens = 1 / (2 * math.pi * torch.sqrt(det))
        inverse = 1 / (1 + q1) + 1 / (1 + q2)
        value = cov * prob + dens * (gap + cov * cov * inverse)
        return value, prob + cov * dens * (inverse + 1 / det)

    return ClosedForm(dual, lambda q: q / torch.sqrt(2 * math.pi * (1 + q)))


def _power_moment(degree: int, q1: Tensor, q2: Tensor, cov: Tensor) -> Tensor:
    """``E[z1^n z2^n]`` by counting pairings: j pairs across, (n-j)/2 pairs within each side."""
    total = torch.zeros_like(cov)
    for across in range(degree % 2, degree + 1, 2):
        within = (degree - across) // 2
        count = math.factorial(degree) ** 2 / (math.factorial(across) * (math.factorial(within) * 2**within) ** 2)
        total = total + count * cov**across * (q1 * q2) ** within
    return total


def _monomial(degree: float) -> ClosedForm:
    n = int(degree)
    if n != degree or n < 1:
        raise InputError(f"A monomial needs a whole degree >= 1, not {degree}")
    double_factorial = math.prod(range(n - 1, 0, -2)) if n % 2 == 0 else 0

    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> Dual:
        return _power_moment(n, q1, q2, cov), n * n * _power_moment(n - 1, q1, q2, cov)

    return ClosedForm(dual, lambda q: double_factorial * torch.sqrt(q) ** n)


_FORMS: dict[str, Callable[..., ClosedForm]] = {
    "identity": _identity,
    "relu": lambda: two_slopes(1.0, 0.0),
    "leaky_relu": lambda negative_slope=0.01: two_slopes(1.0, negative_slope),
    "abs": lambda: two_slopes(1.0, -1.0),
    "erf": _erf,
    "sin": _sin,
    "cos": _cos,
    "gelu_exact": _gelu_exact,
    "square": lambda: _monomial(2),
    "monomial": _monomial,
    "step": lambda: _jump(1.0, 0.0),
    "heaviside": lambda: _jump(1.0, 0.0),
    "sign": lambda: _jump(1.0, -1.0),
}


def closed_form(name: str, *params: float) -> ClosedForm | None:
    """Closed form of a named function, or None where none is known.

    Names: identity, relu, leaky_relu(negative_slope=.01), abs, erf, sin, cos, gelu_exact, square,
    monomial(degree), step, heaviside, sign.
    """
    form = _FORMS.get(name)
    return form(*params) if form is not None else None
