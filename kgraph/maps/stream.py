"""The law of a residual stream without draws: sums of functions of Gaussians, for pairs of inputs.

A stream ``y' = a phi(y) + z`` (a sum read behind its activation, z the output of an affine layer) is no Gaussian, but
two copies of it, at two inputs, form a Markov chain. What is carried from sum to sum:

    marginal   of one copy, which all rows share: a mixture of Gaussians, integrated on panels cut at kinks
    pair       P_r[m, n] = E[p_m(y_1) p_n(y_2)] for every row r; p_m are the marginal's orthonormal polynomials
    tangents   T_r[m, n] = E[p_m(y_1) p_n(y_2) sum_z k_z (dy_1/dz)(dy_2/dz)]: slope and NTK alike

A sum of independent laws is exact up to the degree M that is kept, since p_m(x + w) is a polynomial in x and in w:

    P'[m, n] = sum C[m, i, j] C[n, k, l] Px[i, k] Pw[j, l],    C[m, i, j] = E[p'_m(x + w) p_i(x) p_j(w)]

A function ``u = phi(y)`` loses what lies beyond degree M; the share lost at equal inputs is known, and is taken to
decay with c as the coefficients of a function with a kink do. Rows of two equal inputs need no polynomials: exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kgraph.maps.marginal import Breaks, Mixture, Nodes, gauss_rule, lanczos, polynomials
from kgraph.maps.pointwise import Pointwise
from kgraph.maps.quadrature import value_and_slope

EQUAL = 1e-13
"""1 - c below which two inputs count as equal."""
_BISECTIONS = 50
_KINK, _JUMP = 2.5, 1.5
"""Exponents of the squared Hermite coefficients of a function with a kink, and of its derivative."""


@dataclass(frozen=True, eq=False)
class Law:
    """Joint law of a stream at two inputs, for all rows.

    Attributes:
        jacobi: recurrence of the marginal's orthonormal polynomials: diagonal [M], off-diagonal [M - 1].
        pair: E[p_m(y_1) p_n(y_2)], [R, M, M]; the identity where ``equal``.
        tangents: by name, [R, M, M].
        equal: rows of two equal copies, [R].
        nodes: ``breaks -> Nodes`` of the marginal.
        atoms: the marginal by few nodes, of what is made by a function or a maximum.
        mixture: the marginal, where a Gaussian has been added.
    """

    jacobi: tuple[Tensor, Tensor]
    pair: Tensor
    tangents: dict[str, Tensor]
    equal: Tensor
    nodes: Callable[[Breaks], Nodes]
    atoms: Nodes | None = None
    mixture: Mixture | None = None

    @property
    def degree(self) -> int:
        return len(self.jacobi[0])

    @property
    def mean(self) -> float:
        return float(self.jacobi[0][0])

    @property
    def cov(self) -> Tensor:
        """E[y_1 y_2] of every row, [R]: y = mean p_0 + sd p_1."""
        spread = self.jacobi[1][0] ** 2 * self.pair[:, 1, 1] if self.degree > 1 else 0.0
        return self.jacobi[0][0] ** 2 + torch.zeros(len(self.pair), dtype=torch.float64) + spread

    def carrying(self, constants: dict[str, Tensor]) -> Law:
        """The same law with ``constants`` [R] added to its tangents: every copy moves with one more Gaussian."""

        def more(nodes: Nodes) -> Nodes:
            return replace(nodes, own={name: at + constants[name][:, None] for name, at in nodes.own.items()})

        tangents = {name: t + constants[name][:, None, None] * self.pair for name, t in self.tangents.items()}
        atoms = self.atoms and more(self.atoms)
        return replace(self, tangents=tangents, nodes=lambda breaks: more(self.nodes(breaks)), atoms=atoms)

    def tangent(self, name: str) -> Tensor:
        """E[sum_z k_z (dy_1/dz)(dy_2/dz)] of every row, [R]."""
        return self.tangents[name][:, 0, 0]


def gaussian(mean: float, variance: float, cov: Tensor, tangents: dict[str, Tensor], degree: int) -> Law:
    """Law of a Gaussian field: P = diag(rho^m) in Hermite polynomials (Mehler).

    Args:
        cov: covariance of the two copies in every row, [R].
        tangents: k of every row, {name: [R]}.
        degree: number M of polynomials kept.
    """
    rho = (cov / variance).clamp(-1, 1)
    equal = rho >= 1 - EQUAL
    order = torch.arange(degree, dtype=torch.float64)
    pair = torch.diag_embed(torch.where(equal, 1.0, rho)[:, None] ** order)
    jacobi = (torch.full((degree,), mean, dtype=torch.float64), (variance * order[1:]).sqrt())
    own = {name: k[:, None] for name, k in tangents.items()}
    one = torch.ones(1, dtype=torch.float64)
    mixture = Mixture(mean * one, one, math.sqrt(variance), own)
    spread = {name: k[:, None, None] * pair for name, k in tangents.items()}
    return Law(jacobi, pair, spread, equal, lambda breaks: mixture.nodes(degree, breaks), mixture=mixture)


def trained(law: Law, tangents: dict[str, Tensor]) -> Law:
    """The law of a stream with parameters of its own: tangents k of every row, {name: [R]}, independent of it."""
    spread = {name: law.tangents[name] + k[:, None, None] * law.pair for name, k in tangents.items()}
    atoms = law.atoms and law.atoms.trained(tangents)
    return replace(
        law, tangents=spread, nodes=lambda breaks: law.nodes(breaks).trained(tangents), atoms=atoms, mixture=None
    )


def truncated(law: Law, degree: int) -> Law:
    """The law with its first ``degree`` polynomials only: those of a Gaussian, a sum or a maximum do not need more."""
    tangents = {name: tangent[:, :degree, :degree] for name, tangent in law.tangents.items()}
    jacobi = (law.jacobi[0][:degree], law.jacobi[1][: degree - 1])
    return replace(law, jacobi=jacobi, pair=law.pair[:, :degree, :degree], tangents=tangents)


def mapped(law: Law, fn: Pointwise, atoms: Nodes | None = None) -> Law:
    """Law of ``fn(y)``; ``atoms`` are its marginal by few nodes, where they are known."""
    breaks = fn.plan(float(law.cov.amax())).breaks
    nodes = law.nodes(lambda _: breaks)
    value, slope = value_and_slope(fn.fn, nodes.points)
    jacobi = lanczos(value, nodes.mass, law.degree)
    old, new = polynomials(law.jacobi, nodes.points), polynomials(jacobi, value)
    through, tilted = (new * nodes.mass) @ old.T, (new * nodes.mass * slope) @ old.T
    decay = law.pair[:, -1, -1].clamp(0, 1) ** (1 / max(law.degree - 1, 1))
    lost = torch.eye(len(new), dtype=torch.float64) - through @ through.T
    pair = through @ law.pair @ through.T + lost * _tail(decay, law.degree, _KINK)[:, None, None]
    pair[law.equal] = torch.eye(len(new), dtype=torch.float64)
    lost = (new * nodes.mass * slope.square()) @ new.T - tilted @ tilted.T
    tangents = {}
    for name, tangent in law.tangents.items():
        share = (_tail(decay, law.degree, _JUMP) * tangent[:, 0, 0])[:, None, None]
        tangents[name] = tilted @ tangent @ tilted.T + lost * share
        weight = nodes.mass * slope.square() * nodes.own[name][law.equal]
        tangents[name][law.equal] = (new * weight[:, None]) @ new.T
    few = atoms or _behind(fn, nodes.compressed(breaks))

    def cut(further: Breaks) -> Nodes:
        at = preimages(fn, nodes.points, value, further(float(value.abs().max())))
        return _behind(fn, law.nodes(lambda _: torch.cat([breaks, at])) if len(at) else nodes)

    return Law(jacobi, pair, tangents, law.equal, cut, few)


def preimages(fn: Pointwise, points: Tensor, value: Tensor, levels: Tensor) -> Tensor:
    """Where ``fn`` crosses the levels, between neighbouring points: bisection, all crossings together."""
    points, order = points.sort()
    above = value[order] > levels[:, None]
    level, left = (above[:, 1:] != above[:, :-1]).nonzero(as_tuple=True)
    low, high, rising = points[left], points[left + 1], above[level, left + 1]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beyond = (fn.fn(middle) > levels[level]) == rising
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (low + high) / 2


def _behind(fn: Pointwise, nodes: Nodes) -> Nodes:
    value, slope = value_and_slope(fn.fn, nodes.points)
    return Nodes(value, nodes.mass, {name: slope.square() * at for name, at in nodes.own.items()})


def scaled(law: Law, factor: float) -> Law:
    """Law of ``factor y``: polynomials of odd degree change sign with the factor."""
    order = torch.arange(law.degree)
    sign = torch.where((order % 2 == 1) & torch.tensor(factor < 0), -1.0, 1.0).double()
    signs = sign[:, None] * sign
    tangents = {name: factor**2 * signs * tangent for name, tangent in law.tangents.items()}

    def nodes(breaks: Breaks) -> Nodes:
        return law.nodes(lambda reach: breaks(abs(factor) * reach) / factor).moved(factor, 0.0)

    jacobi = (factor * law.jacobi[0], abs(factor) * law.jacobi[1])
    return Law(jacobi, law.pair * signs, tangents, law.equal, nodes, law.atoms and law.atoms.moved(factor, 0.0))


def shifted(law: Law, constant: float) -> Law:
    """Law of ``y + constant``."""

    def nodes(breaks: Breaks) -> Nodes:
        return law.nodes(lambda reach: breaks(reach + abs(constant)) - constant).moved(1.0, constant)

    jacobi = (law.jacobi[0] + constant, law.jacobi[1])
    return replace(law, jacobi=jacobi, nodes=nodes, atoms=law.atoms and law.atoms.moved(1.0, constant), mixture=None)


def added(x: Law, smooth: Law, degree: int) -> Law | None:
    """Law of ``x + w`` for independent x and w, w with a Gaussian in it; None where the mixture grows too large."""
    assert x.atoms is not None
    assert smooth.mixture is not None
    mixture = smooth.mixture.plus(x.atoms)
    if mixture is None:
        return None
    one, two = gauss_rule(x.jacobi), gauss_rule(smooth.jacobi)
    points = one[0][:, None] + two[0]
    jacobi = lanczos(points.flatten(), (one[1][:, None] * two[1]).flatten(), degree)
    at_one, at_two = polynomials(x.jacobi, one[0]) * one[1], polynomials(smooth.jacobi, two[0]) * two[1]
    new = polynomials(jacobi, points.flatten()).reshape(-1, *points.shape)
    meet = torch.einsum("mab,ia,jb->mij", new, at_one, at_two)
    names = list(x.tangents)
    lefts = torch.stack([x.pair, *(x.tangents[n] for n in names), *(x.pair for _ in names)])
    rights = torch.stack([smooth.pair, *(smooth.pair for _ in names), *(smooth.tangents[n] for n in names)])
    moved = _push(meet, lefts, rights)
    tangents = {name: moved[1 + i] + moved[1 + len(names) + i] for i, name in enumerate(names)}
    pair, equal = moved[0], x.equal & smooth.equal
    pair[equal] = torch.eye(len(jacobi[0]), dtype=torch.float64)
    return Law(jacobi, pair, tangents, equal, lambda breaks: mixture.nodes(degree, breaks), mixture=mixture)


def _push(meet: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum C[m,i,j] C[n,k,l] left[..,i,k] right[..,j,l]``."""
    half = torch.einsum("mij,...ik->...mkj", meet, left)
    half = torch.einsum("...mkj,...jl->...mkl", half, right)
    return torch.einsum("...mkl,nkl->...mn", half, meet)


def _tail(decay: Tensor, degree: int, exponent: float) -> Tensor:
    """Mean of ``decay^m`` over m >= degree with weights m^-exponent: an integral over log m."""
    order = degree * torch.logspace(0, 3, 200, dtype=torch.float64)
    weight = order ** (1 - exponent)
    return (weight * decay[..., None] ** order).sum(-1) / weight.sum()
