"""Marginals of streams: mixtures of Gaussians, their quadrature, and the polynomials orthonormal under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from kgraph.maps.quadrature import unit_rule

_MOST_CENTRES = 1 << 16
_NO_MASS = 1e-22
"""Even times the square of a polynomial of the degrees kept, such a mass is below rounding."""
_NO_NORM = 1e-13
_PIECE, _PIECES, _PER_PIECE = 1.5, 4, 16
"""Pieces of a marginal by few nodes: their width in deviations, how many on either side, and nodes of each."""

Breaks = Callable[[float], Tensor]
"""``reach -> points in [-reach, reach]`` where a function has to be cut."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Quadrature of a marginal: points and masses [I], and the tangents at rows of equal inputs {name: [R, I]}."""

    points: Tensor
    mass: Tensor
    own: dict[str, Tensor]

    def moved(self, factor: float, shift: float) -> Nodes:
        """Of ``factor y + shift``."""
        own = {name: factor**2 * at for name, at in self.own.items()}
        return Nodes(factor * self.points + shift, self.mass, own)

    def trained(self, tangents: dict[str, Tensor]) -> Nodes:
        """With tangents k of every row, {name: [R]}, wherever the point is."""
        return Nodes(self.points, self.mass, {name: self.own[name] + k[:, None] for name, k in tangents.items()})

    def compressed(self, breaks: Tensor) -> Nodes:
        """Few nodes: a Gauss rule on every piece of at most `_PIECE` deviations between any two breaks."""
        mean = self.mass @ self.points / self.mass.sum()
        spread = (self.mass @ (self.points - mean).square() / self.mass.sum()).sqrt()
        steps = torch.arange(-_PIECES, _PIECES + 1, dtype=torch.float64)
        piece = torch.bucketize(self.points, torch.cat([breaks, mean + _PIECE * spread * steps]).sort().values)
        rules = [self._compress(piece == one, _PER_PIECE) for one in piece.unique()]
        own = {name: torch.cat([rule.own[name] for rule in rules], 1) for name in self.own}
        return Nodes(torch.cat([r.points for r in rules]), torch.cat([r.mass for r in rules]), own)

    def _compress(self, inside: Tensor, count: int) -> Nodes:
        points, mass = self.points[inside], self.mass[inside]
        if float(mass.sum()) < _NO_MASS:
            return Nodes(points[:0], mass[:0], {name: at[:, :0] for name, at in self.own.items()})
        jacobi = lanczos(points, mass, count)
        new, share = gauss_rule(jacobi)
        project = (polynomials(jacobi, points) * mass / mass.sum()).T @ polynomials(jacobi, new)
        own = {}
        for name, at in self.own.items():
            here = at.expand(-1, len(inside))[:, inside]
            low, high = here.amin(1, keepdim=True), here.amax(1, keepdim=True)
            room = high - low  # where the mass is next to nothing, polynomials overshoot without end
            own[name] = (here @ project).clamp(low - room, high + room)
        return Nodes(new, share * mass.sum(), own)


@dataclass(frozen=True, eq=False)
class Mixture:
    """``sum_k mass_k N(centre_k, spread^2)``; ``own`` are tangents at equal inputs given the centre, {name: [R, K]}."""

    centres: Tensor
    mass: Tensor
    spread: float
    own: dict[str, Tensor]

    def nodes(self, degree: int, breaks: Breaks) -> Nodes:
        """Panels two spreads wide, cut at ``breaks(reach)``, of all weight that polynomials below ``degree`` see."""
        mean = float(self.mass @ self.centres)
        wide = 2 * math.sqrt(degree) + 4.0
        across = wide * math.sqrt(float(self.mass @ (self.centres - mean).square()) + self.spread**2)
        low = max(float(self.centres.min()) - wide * self.spread, mean - across)
        high = min(float(self.centres.max()) + wide * self.spread, mean + across)
        count = math.ceil((high - low) / (2 * self.spread))
        points, weights = panels(low, high, count, breaks(max(abs(low), abs(high))))
        kernel = (points[:, None] - self.centres) / self.spread
        kernel = torch.exp(-kernel.square() / 2) * (self.mass / (math.sqrt(2 * math.pi) * self.spread))
        density = kernel.sum(1)
        own = {name: at @ kernel.T / density.clamp_min(1e-300) for name, at in self.own.items()}
        return Nodes(points, weights * density, own)

    def plus(self, atoms: Nodes) -> Mixture | None:
        """Of the sum with ``atoms``; None where that takes too many centres."""
        mass = (atoms.mass[:, None] * self.mass).flatten()
        keep = mass > _NO_MASS
        if int(keep.sum()) > _MOST_CENTRES:
            return None
        centres = (atoms.points[:, None] + self.centres).flatten()
        own = {n: (at[:, :, None] + self.own[n][:, None, :]).flatten(1)[:, keep] for n, at in atoms.own.items()}
        return Mixture(centres[keep], mass[keep], self.spread, own)


def lanczos(points: Tensor, mass: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Recurrence ``b_k p_{k+1} = (y - a_k) p_k - b_{k-1} p_{k-1}`` of a discrete measure; shorter for few atoms."""
    y, weight = points.numpy(), (mass / mass.sum()).clamp_min(0).numpy()  # numpy: many steps on short vectors
    basis = np.empty((degree, len(y)))
    basis[0] = np.sqrt(weight)
    smallest = _NO_NORM * max(float(np.abs(y).max()), 1e-300)
    diagonal, beside = [], []
    for k in range(degree):
        v = y * basis[k]
        diagonal.append(float(basis[k] @ v))
        if k + 1 == degree:
            break
        for _ in range(2):  # twice is enough: all vectors before, not only the last two
            v -= (basis[: k + 1] @ v) @ basis[: k + 1]
        norm = math.sqrt(v @ v)
        if norm < smallest:
            break
        beside.append(norm)
        np.divide(v, norm, out=basis[k + 1])
    return torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside, dtype=torch.float64)


def polynomials(jacobi: tuple[Tensor, Tensor], points: Tensor) -> Tensor:
    """Orthonormal polynomials at points, [M, ...]."""
    rows = np.empty((len(jacobi[0]), *points.shape))
    for k, row in enumerate(each_polynomial(jacobi, points)):
        rows[k] = row
    return torch.from_numpy(rows)


def each_polynomial(jacobi: tuple[Tensor, Tensor], points: Tensor) -> Iterator[NDArray[np.float64]]:
    """The same one by one, where all of them at many points would take too much memory; each holds until the next."""
    y, (diagonal, beside) = points.numpy(), (one.tolist() for one in jacobi)
    before, row = np.zeros(y.shape), np.ones(y.shape)
    yield row
    for k in range(len(diagonal) - 1):
        before *= -beside[k - 1] if k else 0.0
        before += (y - diagonal[k]) * row
        before /= beside[k]
        before, row = row, before
        yield row


def panels(low: float, high: float, count: int, breaks: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points and weights on ``count`` equal panels of [low, high], cut at ``breaks`` besides."""
    inside = breaks[(breaks > low) & (breaks < high)].double()
    edges = torch.cat([torch.linspace(low, high, count + 1, dtype=torch.float64), inside]).unique()
    x, weights = unit_rule(edges.device)
    width = edges.diff()[:, None]
    return (edges[:-1, None] + width * x).flatten(), (width * weights).flatten()


def gauss_rule(jacobi: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Points and masses of the marginal's own Gauss rule, exact for polynomials below degree 2M (Golub and Welsch)."""
    points, vectors = eigh_tridiagonal(jacobi[0].numpy(), jacobi[1].numpy())
    return torch.from_numpy(points), torch.from_numpy(vectors[0] ** 2)
