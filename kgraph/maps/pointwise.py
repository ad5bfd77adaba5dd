"""`Pointwise`: an elementwise function with its Gaussian integrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.maps import quadrature
from kgraph.maps.chunks import ENTRIES, in_pieces
from kgraph.maps.closed import ClosedForm, correlation
from kgraph.maps.gap import smooth_gap, split_gap
from kgraph.maps.panels import distinct, find_kinks, make_plan
from kgraph.maps.quadrature import Function, Plan
from kgraph.maps.series import make_series

_SMALLEST_REACH = 16.0
_CPU = torch.device("cpu")
_NEAR = 1e-4
"""1 - c below which a difference of second moments would have fewer than twelve digits."""
_MANY = 4096
"""Entries from which on a series' coefficients cost less than the entries' own integrals."""


KinksOf = Callable[[float, torch.device], Tensor]
"""``(reach, device) -> kinks within [-reach, reach]`` and perhaps beyond, in any order, perhaps twice."""


@dataclass(frozen=True, eq=False)
class Pointwise:
    """An elementwise map ``phi`` and the integrals that make up its local Q and C maps.

    Args:
        fn: Tensor -> Tensor of the same shape, elementwise, differentiable by autodiff almost everywhere,
            able to take float64.
        closed: its closed form, if one is known; else the function itself is integrated, to 1e-9
            relative or better.
        kinks_of: where its kinks are, if that is known of its parts; else they are looked for.

    Not safe for concurrent first use: kinks and panels are computed when first needed, and kept.
    """

    fn: Function
    closed: ClosedForm | None = None
    kinks_of: KinksOf | None = field(default=None, repr=False)
    _kinks: dict[tuple[float, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)
    _plans: dict[tuple[int, torch.device], Plan] = field(default_factory=dict, init=False, repr=False)

    @property
    def how(self) -> Literal["exact", "quadrature"]:
        """How the integrals are obtained."""
        return "quadrature" if self.closed is None else "exact"

    def __call__(self, z: Tensor) -> Tensor:
        return self.fn(z)

    def dual(self, q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """``(E[phi(z1) phi(z2)], E[phi'(z1) phi'(z2)])`` for ``(z1, z2) ~ N(0, [[q1, cov], [cov, q2]])``.

        Arguments broadcast; |cov| is clipped to sqrt(q1 q2). Where a q is 0, z is the constant 0 and
        phi'(0) is autodiff's. Derivatives are taken almost everywhere: a jump of phi adds
        nothing to ``E[phi' phi']``.
        """
        q1, q2, cov = (torch.as_tensor(t, dtype=torch.float64) for t in (q1, q2, cov))
        _check_q(q1)
        _check_q(q2)
        cov = cov.expand(torch.broadcast_shapes(q1.shape, q2.shape, cov.shape))
        if self.closed is None:
            return self._many(q1, q2, cov) if cov.numel() > _MANY else self._integrate(q1, q2, cov)
        if cov.numel() <= ENTRIES:  # a few entries: all of one shape, as closed forms of one argument want them
            return self._exact(q1.expand_as(cov), q2.expand_as(cov), cov)
        return in_pieces(self._exact, q1, q2, cov)

    def _exact(self, q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        assert self.closed is not None
        value, slope = self.closed.dual(q1, q2, cov)
        at_zero = (q1 == 0) | (q2 == 0)
        if at_zero.any():
            at_zero = at_zero.expand_as(cov)
            value, slope = value.clone(), slope.clone()
            q1, q2 = q1.expand_as(cov)[at_zero], q2.expand_as(cov)[at_zero]
            value[at_zero], slope[at_zero] = self._integrate(q1, q2, cov[at_zero])
        return value, slope

    def near(self, q1: Tensor, q2: Tensor, gap: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(E[(phi(z1) - phi(z2))^2] / 2, E[phi' phi'])`` given ``gap = E[(z1 - z2)^2] / 2``, however small.

        Exact by a closed form; for a smooth function an integral of its own where 1 - c < 1e-4. None where a
        difference of second moments is as good (kinks without a closed form, gaps that are not small).
        """
        if self.closed is not None and self.closed.near is not None:
            return self.closed.near(q1, q2, gap)
        small = (gap > 0) & (split_gap(q1, q2, gap)[2] < _NEAR)
        if not small.any() or len(self.kinks(device=gap.device)):
            return None
        cov = (q1 + q2) / 2 - gap
        value, slope = self.dual(q1, q2, cov)
        apart = (self.second(q1) + self.second(q2)) / 2 - value
        apart[gap == 0] = 0.0
        q1, q2 = q1.expand_as(gap), q2.expand_as(gap)
        plan = self.plan(float(torch.maximum(q1, q2).max()), gap.device)
        apart[small] = smooth_gap(self.fn, plan, q1[small], q2[small], gap[small])
        return apart, slope

    def mean(self, q: Tensor) -> Tensor:
        """``E[phi(z)]`` for z ~ N(0, q)."""
        q = torch.as_tensor(q, dtype=torch.float64)
        _check_q(q)
        return self._moment(q, 1) if self.closed is None else self.closed.mean(q)

    def second(self, q: Tensor) -> Tensor:
        """``E[phi(z)^2]`` for z ~ N(0, q): the local Q map."""
        q = torch.as_tensor(q, dtype=torch.float64)
        _check_q(q)
        return self._moment(q, 2) if self.closed is None else self.closed.dual(q, q, q)[0]

    def affine(
        self,
        input_scale: float = 1.0,
        input_shift: float = 0.0,
        output_shift: float = 0.0,
        output_scale: float = 1.0,
    ) -> Pointwise:
        """``u -> output_scale * (phi(input_scale * u + input_shift) + output_shift)``.

        The closed form is kept when input_shift is 0.
        """
        fn = self.fn

        def shaped(u: Tensor) -> Tensor:
            return output_scale * (fn(input_scale * u + input_shift) + output_shift)

        closed = None
        if self.closed is not None and input_shift == 0:
            closed = self.closed.affine(input_scale, output_shift, output_scale)
        return Pointwise(shaped, closed, partial(_moved_kinks, self, input_scale, input_shift))

    def kinks(self, reach: float = _SMALLEST_REACH, device: torch.device = _CPU) -> Tensor:
        """Points within at least [-reach, reach] where phi, phi' or phi'' jumps, sorted."""
        reach = 2.0 ** math.ceil(math.log2(max(reach, _SMALLEST_REACH)))  # 0 for what is 0 everywhere
        if (reach, device) not in self._kinks:
            self._kinks[reach, device] = (
                find_kinks(self.fn, reach, device) if self.kinks_of is None else self._known_kinks(reach, device)
            )
        return self._kinks[reach, device]

    def _known_kinks(self, reach: float, device: torch.device) -> Tensor:
        assert self.kinks_of is not None
        found = self.kinks_of(reach, device)
        return distinct(found[found.abs() <= reach * 1.01], 1e-12 * reach)

    def plan(self, q: float, device: torch.device = _CPU) -> Plan:
        """Panels good for every variance up to q, found once for each power of two."""
        return self._plan(_level(torch.tensor(q, dtype=torch.float64, device=device)))

    def _plan(self, level: Tensor) -> Plan:
        power, device = int(level), level.device
        if (power, device) not in self._plans:
            kinks = partial(self.kinks, device=device)
            self._plans[power, device] = make_plan(self.fn, kinks, 2.0 ** (power / 2), device)
        return self._plans[power, device]

    def _moment(self, q: Tensor, power: int) -> Tensor:
        flat = q.reshape(-1)
        out = torch.empty_like(flat)
        levels = _level(flat)
        for level in levels.unique():
            rows = levels == level
            out[rows] = quadrature.moment(self.fn, self._plan(level), flat[rows], power)
        return out.reshape(q.shape)

    def _many(self, q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Many entries of few q values: Mehler's series, and the integral where the series is not good."""
        known, index = torch.cat([q1.reshape(-1), q2.reshape(-1)]).unique(return_inverse=True)
        if len(known) > cov.numel() // 8:
            return self._integrate(q1, q2, cov)
        series = make_series(self.fn, self.plan(float(known[-1]), known.device), known)
        if series is None:
            return self._integrate(q1, q2, cov)
        first, second = index[: q1.numel()].reshape(q1.shape), index[q1.numel() :].reshape(q2.shape)

        def some(first: Tensor, second: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
            v1, v2 = known[first], known[second]
            c = correlation(v1, v2, cov)[1]
            value, slope = series.sum(first, second, c)
            bad = ~series.good(first, second, c)
            if bad.any():
                value[bad], slope[bad] = self._integrate(v1.expand_as(cov)[bad], v2.expand_as(cov)[bad], cov[bad])
            return value, slope

        return in_pieces(some, first, second, cov)

    def _integrate(self, q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        q1, q2 = q1.expand_as(cov), q2.expand_as(cov)
        _, c, s = correlation(q1, q2, cov)
        c, s = c.reshape(-1), s.reshape(-1)
        roots = torch.stack([q1.reshape(-1), q2.reshape(-1)]).sqrt()
        out = c.new_empty(2, len(c))
        levels = _level(torch.maximum(q1, q2).reshape(-1))
        for level in levels.unique():
            rows = levels == level
            out[0, rows], out[1, rows] = quadrature.dual(self.fn, self._plan(level), roots[:, rows], c[rows], s[rows])
        return out[0].reshape(cov.shape), out[1].reshape(cov.shape)


def _moved_kinks(fn: Pointwise, scale: float, shift: float, reach: float, device: torch.device) -> Tensor:
    """Kinks of ``fn(scale u + shift)``."""
    if scale == 0:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return (fn.kinks(abs(scale) * reach + abs(shift), device) - shift) / scale


def _level(q: Tensor) -> Tensor:
    """Smallest whole n with q <= 2^n; q below 2^-40 counts as that (nothing is sharper there)."""
    return torch.ceil(torch.log2(q.clamp_min(2.0**-40)))


def _check_q(q: Tensor) -> None:
    if not bool((q >= 0).all()) or not bool(torch.isfinite(q).all()):
        raise InputError("A q value is negative or not finite", hint="q is a second moment: pass q >= 0")
