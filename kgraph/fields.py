"""Random fields with a given kernel: whole tensors for input a and for input b of every pair.

Positions are exchangeable: every entry is a share common to all positions plus one of its own. Channels and batch
members are independent. Parts that are expressions of the same Gaussian part get the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kgraph.draws import value_and_derivative
from kgraph.kernel import DIFF, SAME, Apply, Mask, Pairs, Part, Product, Sum

Shape = tuple[int, ...]
_ROUNDING = 1e-12
Gradients = dict[Part, tuple[Tensor, Tensor]]
"""For each Gaussian part: derivatives of a field by it, at a and at b of every pair."""


class FieldDraws:
    """Draws of parts as fields; one object is one joint draw, or several at once.

    Args:
        seed: of the generator; the global one is not touched. Of several, each has a generator of its own, and the
            first dimension of all shapes counts them: the numbers are those of each draw by itself.
        elsewhere: append rows P..2P in which input b is seen at other positions than a (with the same random
            numbers, so that rows of equal covariance get equal draws).
    """

    def __init__(self, seed: int | Sequence[int] = 0, *, elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        self.several = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else seed
        self.generators = [torch.Generator().manual_seed(one) for one in seeds]
        self._values: dict[tuple[Part, Shape], tuple[Tensor, Tensor]] = {}
        self._tangents: dict[tuple[Part, Shape, str, int], tuple[Tensor, Tensor]] = {}
        self._gradients: dict[tuple[Part, Shape], Gradients] = {}
        self._sides: dict[tuple[Part, Shape, int], tuple[Tensor, Tensor]] = {}
        self._slopes: dict[tuple[Part, Shape, int | None], Tensor] = {}

    def values(self, part: Part, shape: Shape, positions: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        """Fields at input a, ``shape``, and at input b of every pair, ``[P, *shape]``."""
        key = (part, shape)
        if key not in self._values:
            self._values[key] = self._draw(part, shape, positions)
        return self._values[key]

    def tangents(
        self, part: Part, shape: Shape, positions: tuple[bool, ...], name: str, row: int
    ) -> tuple[Tensor, Tensor]:
        """Directions J g at a and at b of one pair, with E[g g] = the Gaussian part's ``name`` kernel in that row.

        Price's theorem: d E[F(a) F(b)] / dK . K_slope = E[(J_F(a) g) (J_F(b) g)] for any F.
        """
        key = (part, shape, name, row)
        if key not in self._tangents:
            self._tangents[key] = self._push(part, shape, positions, name, row)
        return self._tangents[key]

    def _normal(self, shape: Shape, positions: tuple[bool, ...], *, common: bool) -> Tensor:
        size = tuple(1 if common and place else s for s, place in zip(shape, positions, strict=True))
        own = size[1:] if self.several else size
        drawn = [torch.randn(own, generator=generator, dtype=torch.float64) for generator in self.generators]
        return torch.stack(drawn) if self.several else drawn[0]

    def _draw(self, part: Part, shape: Shape, positions: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        match part.expr:
            case Apply(fn, arg):
                first, second = self.values(arg, shape, positions)
                return fn(first).to(first).detach(), fn(second).to(second).detach()
            case Sum(terms):
                drawn = [(weight, self.values(term, shape, positions)) for weight, term in terms]
                return sum(w * v[0] for w, v in drawn), sum(w * v[1] for w, v in drawn)  # type: ignore[return-value]
            case Product(left, right):
                one, two = self.values(left, shape, positions), self.values(right, shape, positions)
                return one[0] * two[0], one[1] * two[1]
            case Mask():
                return self._draw_mask(part.expr, shape, positions)
            case _:
                return self._draw_leaf(part, shape, positions)

    def _draw_mask(self, mask: Mask, shape: Shape, positions: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        common = bool(mask.shared[Pairs.SELF, DIFF])
        level = torch.special.ndtri(torch.tensor(mask.keep, dtype=torch.float64))
        first, other = (
            mask.height * (self._normal(shape, positions, common=common) < level).double().expand(shape)
            for _ in range(2)
        )
        shared = torch.cat([mask.shared[:, SAME], mask.shared[:, DIFF]]) if self.elsewhere else mask.shared[:, SAME]
        return first, torch.where(shared.reshape(-1, *(1 for _ in shape)), first, other)

    def _draw_leaf(self, part: Part, shape: Shape, positions: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        centre = part.mean**2
        shared_q = (part.cov[Pairs.SELF, DIFF] - centre).clamp_min(0)
        own_q = (part.cov[Pairs.SELF, SAME] - centre - shared_q).clamp_min(0)
        shared_cov = part.cov[:, DIFF] - centre
        own_cov = part.cov[:, SAME] - centre - shared_cov
        if self.elsewhere:
            shared_cov, own_cov = torch.cat([shared_cov, shared_cov]), torch.cat([own_cov, torch.zeros_like(own_cov)])
        if not any(positions):
            own_q, own_cov = own_q + shared_q, own_cov + shared_cov
            shared_q, shared_cov = torch.zeros_like(shared_q), torch.zeros_like(shared_cov)
        shared = self._two(shared_q, shared_cov, shape, positions, common=True)
        own = self._two(own_q, own_cov, shape, positions, common=False)
        return part.mean + shared[0] + own[0], part.mean + shared[1] + own[1]

    def _two(
        self, q: Tensor, cov: Tensor, shape: Shape, positions: tuple[bool, ...], *, common: bool
    ) -> tuple[Tensor, Tensor]:
        """Correlated pair of normals: variance q each, covariance cov[p] with pair p."""
        z1 = self._normal(shape, positions, common=common)
        z2 = self._normal(shape, positions, common=common)
        root = q.sqrt()
        share = torch.where(q > 0, (cov / root.clamp_min(1e-300)).clamp(-root, root), torch.zeros_like(cov))
        share = torch.where(cov >= q * (1 - _ROUNDING), root, share)  # one and the same input gives equal numbers
        rest = torch.where(share < root, (q - share.square()).clamp_min(0).sqrt(), torch.zeros_like(cov))
        wide = (-1, *(1 for _ in shape))
        return root * z1, share.reshape(wide) * z1 + rest.reshape(wide) * z2

    def _push(
        self, part: Part, shape: Shape, positions: tuple[bool, ...], name: str, row: int
    ) -> tuple[Tensor, Tensor]:
        def inner(arg: Part) -> tuple[Tensor, Tensor]:
            return self.tangents(arg, shape, positions, name, row)

        match part.expr:
            case Apply(_, arg):
                slopes, d = self._slopes_at(part, shape, positions, row), inner(arg)
                return _both([slopes, d], lambda i: slopes[i] * d[i])
            case Sum(terms):
                pushed = [(weight, inner(term)) for weight, term in terms]
                return _both([t for _, t in pushed], lambda i: sum(w * t[i] for w, t in pushed))  # type: ignore[arg-type, return-value]
            case Product(left, right):
                u, v = self._at(left, shape, positions, row), self._at(right, shape, positions, row)
                du, dv = inner(left), inner(right)
                return _both([u, v, du, dv], lambda i: du[i] * v[i] + u[i] * dv[i])
            case _:
                return self._direction(getattr(part, name)[row], shape, positions)

    def _at(self, part: Part, shape: Shape, positions: tuple[bool, ...], row: int) -> tuple[Tensor, Tensor]:
        """Fields at a and at b of one pair; one and the same tensor where b is a."""
        key = (part, shape, row)
        if key not in self._sides:
            first, second = self.values(part, shape, positions)
            self._sides[key] = first, first if torch.equal(first, second[row]) else second[row]
        return self._sides[key]

    def _slopes_at(self, part: Part, shape: Shape, positions: tuple[bool, ...], row: int) -> tuple[Tensor, Tensor]:
        """Derivatives of a function of another part at a and at b of one pair."""
        assert isinstance(part.expr, Apply)
        first, second = self._at(part.expr.arg, shape, positions, row)
        if (part, shape, None) not in self._slopes:
            self._slopes[part, shape, None] = value_and_derivative(part.expr.fn, first)[1]
        side = None if second is first else row
        if (part, shape, side) not in self._slopes:
            self._slopes[part, shape, side] = value_and_derivative(part.expr.fn, second)[1]
        return self._slopes[part, shape, None], self._slopes[part, shape, side]

    def _direction(self, kernel: Tensor, shape: Shape, positions: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        shared = kernel[DIFF] if any(positions) else torch.zeros_like(kernel[DIFF])
        own = (kernel[SAME] - shared).clamp_min(0)
        direction = shared.clamp_min(0).sqrt() * self._normal(shape, positions, common=True)
        direction = direction + own.sqrt() * self._normal(shape, positions, common=False)
        return direction, direction

    def gradients(self, part: Part, shape: Shape, positions: tuple[bool, ...]) -> Gradients:
        """Derivatives of the part's fields by each Gaussian part it is made of, entry by entry."""
        key = (part, shape)
        if key not in self._gradients:
            self._gradients[key] = self._differentiate(part, shape, positions)
        return self._gradients[key]

    def _differentiate(self, part: Part, shape: Shape, positions: tuple[bool, ...]) -> Gradients:
        match part.expr:
            case Apply(fn, arg):
                first, second = self.values(arg, shape, positions)
                slopes = value_and_derivative(fn, first)[1], value_and_derivative(fn, second)[1]
                inner = self.gradients(arg, shape, positions)
                return {leaf: (slopes[0] * d[0], slopes[1] * d[1]) for leaf, d in inner.items()}
            case Sum(terms):
                one = torch.ones((), dtype=torch.float64)
                return _added([((w * one, w * one), self.gradients(t, shape, positions)) for w, t in terms])
            case Product(left, right):
                u, v = self.values(left, shape, positions), self.values(right, shape, positions)
                inner_u, inner_v = self.gradients(left, shape, positions), self.gradients(right, shape, positions)
                return _added([(v, inner_u), (u, inner_v)])
            case _:
                first, second = self.values(part, shape, positions)
                return {part: (torch.ones_like(first), torch.ones_like(second))}


def _both(made_of: Sequence[tuple[Tensor, Tensor]], result: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """``result`` at a and at b; once, where all that it is made of is one and the same at both."""
    first = result(0)
    return first, first if all(at_a is at_b for at_a, at_b in made_of) else result(1)


def _added(terms: list[tuple[tuple[Tensor, Tensor], Gradients]]) -> Gradients:
    total: Gradients = {}
    for (first, second), inner in terms:
        for leaf, d in inner.items():
            before = total.get(leaf, (torch.zeros(()), torch.zeros(())))
            total[leaf] = (before[0] + first * d[0], before[1] + second * d[1])
    return total
