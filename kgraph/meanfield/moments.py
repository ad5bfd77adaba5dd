"""Gaussian integrals of one activation that the mean field is made of."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache

import torch
from torch import Tensor, nn

from kgraph.errors import InputError
from kgraph.maps import Pointwise, pointwise
from kgraph.maps.quadrature import Plan, gaussian_rule, value_and_slope, with_edges

Activation = str | Pointwise | Callable[[Tensor], Tensor]
"""A name that `kgraph.maps.pointwise` knows, a `Pointwise`, or any elementwise torch function or module."""

_SMALLEST = 1e-20
"""Stands for q = 0, so that a kink at 0 is seen from both sides."""
_STEP, _JUMP = 1e-9, 1e-6


@lru_cache(maxsize=64)
def _wrapped(function: Callable[[Tensor], Tensor]) -> Pointwise:
    return Pointwise(function)


def as_pointwise(activation: Activation) -> Pointwise:
    """The activation with its Gaussian integrals; a function's kinks and panels are found once."""
    if isinstance(activation, Pointwise):
        return activation
    if isinstance(activation, str):
        return pointwise(activation)
    if not callable(activation):
        raise InputError(f"{activation!r} is no activation", hint="Pass a name, a function or a module")
    # A module's parameters may change between two calls, a function's do not. Integrals are taken in float64.
    if isinstance(activation, nn.Module):
        activation = deepcopy(activation).double() if any(True for _ in activation.parameters()) else activation
        refuse_vectors(activation)
        return Pointwise(activation)
    refuse_vectors(activation)
    try:
        return _wrapped(activation)
    except TypeError:  # an object with __eq__ and no __hash__ of its own
        return Pointwise(activation)


def fine_rule(plan: Plan, root: Tensor) -> tuple[Tensor, Tensor]:
    """Points and N(0, 1) weights for fourth powers of phi(root x) and of its slope.

    Panels are made for squares; fourth powers of an oscillating function oscillate twice as fast.
    """
    edges = with_edges(plan.base, plan.breaks / root)
    middles = (edges[..., 1:] + edges[..., :-1]) / 2
    return gaussian_rule(torch.cat([edges, middles], -1).sort(-1).values)


def refuse_vectors(activation: Callable[[Tensor], Tensor]) -> None:
    """Raise InputError if an activation is no function of one entry, such as a softmax or a linear layer."""
    with torch.enable_grad():
        x = torch.tensor([-1.3, 0.2, 0.7, 2.1], dtype=torch.float64, requires_grad=True)
        try:
            together = activation(x * 1)
            apart = torch.cat([activation(entry * 1) for entry in x.split(1)])  # in-place ones may write
            alike = together.shape == x.shape and torch.allclose(together, apart, rtol=1e-4, atol=1e-6, equal_nan=True)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            what = f"{activation!r} does not map a float64 tensor entry by entry: {str(error).splitlines()[0]}"
            raise InputError(what, hint="Pass a differentiable elementwise torch function") from error
    if not alike:
        what = f"{activation!r} is not elementwise: an entry of its result depends on others, or on chance"
        raise InputError(what, hint="Mean field is that of one function for all units")


class Moments:
    """Integrals of ``phi`` over u ~ N(0, q), split at the activation's kinks.

    Raises:
        InputError: phi jumps: two inputs however close are told apart, so that chi_1 is infinite.
    """

    def __init__(self, activation: Activation, q: float) -> None:
        if not 0 <= q < float("inf"):
            raise InputError(f"q is {q}", hint="A q value is a second moment: finite and >= 0")
        self.phi, self.q = as_pointwise(activation), max(q, _SMALLEST)
        refuse_jumps(self.phi)
        root = torch.tensor(self.q, dtype=torch.float64).sqrt()
        self._x, self._weight = fine_rule(self.phi.plan(self.q), root)
        self._u = root * self._x
        self._value, self._slope = value_and_slope(self.phi.fn, self._u)
        zero = torch.zeros(1, dtype=torch.float64)
        value, slope = value_and_slope(self.phi.fn, zero)
        self._at_zero, self._slope_at_zero = float(value), float(slope)

    def _mean(self, integrand: Tensor) -> float:
        return float((self._weight * integrand).sum())

    def second(self) -> float:
        """``E[phi^2]``."""
        return self._mean(self._value**2)

    def mu(self, k: int) -> float:
        """``mu_k = E[phi'^(2k)]``."""
        return self._mean(self._slope ** (2 * k))

    def q_slope(self) -> float:
        """``d E[phi^2] / d q = E[phi'^2 + phi phi''] = E[phi^2 (u^2 / q - 1)] / (2 q)``: no phi'' is needed.

        phi(0)^2 is taken off first, for its integral against u^2 / q - 1 is 0 but for rounding.
        """
        above = self._value**2 - self._at_zero**2
        return self._mean(above * (self._x**2 - 1)) / (2 * self.q)

    def slope_spread(self) -> float:
        """``mu_2 / mu_1^2 - 1``, as the variance of phi'^2, so that an almost linear phi loses no digits."""
        mu = self.mu(1)
        return self._mean((self._slope**2 - mu) ** 2) / mu**2

    def critical_bias(self) -> float:
        """``q mu_1 - E[phi^2]``, which is sb2 / sw2 on the critical line.

        With phi = b + a u + r the parts in a cancel (E[u r] = q E[r'], Stein), and what is left of a tiny q keeps
        all its digits: q E[r'^2] - E[r^2] - b^2 - 2 b E[r].
        """
        b, a = self._at_zero, self._slope_at_zero
        rest, bend = self._value - b - a * self._u, self._slope - a
        value = self.q * self._mean(bend**2) - self._mean(rest**2) - b * (b + 2 * self._mean(rest))
        rounding = 1e-13 * max(self.q * self.mu(1), b * b) if a == 0 or b != 0 else 1e-14 * self.q * self._mean(bend**2)
        return 0.0 if abs(value) <= rounding else value


def refuse_jumps(phi: Pointwise) -> None:
    """Raise InputError if ``phi`` is discontinuous."""
    kinks = phi.kinks()
    with torch.no_grad():
        step = (phi(kinks + _STEP) - phi(kinks - _STEP)).abs() if len(kinks) else kinks
    if bool((step > _JUMP).any()):
        raise InputError(
            f"The activation jumps at {float(kinks[step > _JUMP][0]):.4g}: its slope chi_1 is infinite at every q",
            hint="No variance of the weights makes it critical; use a continuous activation",
        )
