"""Weights that sum to 0 over the fan-in, as standardized ones do (Qiao et al. 2019, arXiv 1903.10520).

Such a layer does not see the mean of what it reads: with N = C k entries of C channels at k taps,

    y(i) = sum_co w_co x_c(i + o),    sum_co w_co = 0
    E[y(i) y(j)] = v C (sum_o K(i + o, j + o) - S(i) S(j) / k),    S(i) = sum of E[x] over the taps that meet an input

with v the measured E[w^2], of which the factor N / (N - 1) of dependent entries is part for channels that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from kgraph.how import EXACT, How, assumed
from kgraph.kernel import DIFF, SAME, Part, Unknown
from kgraph.rules.speeds import held
from kgraph.rules.table import Context
from kgraph.rules.weights import sums_to_zero

OF_POSITIONS = assumed("the weights sum to 0 over the positions that they mix, which is not counted")
_OF_GIVEN = assumed("the weights sum to 0 over the fan-in, and the mean of the inputs is not known")
EACH_TAP = assumed("the weights sum to 0 over the channels of every tap, counted like all taps together")


@dataclass(frozen=True)
class ZeroSums:
    """A weight whose units sum to 0.

    Attributes:
        fan_in: N.
        stored: whether the weight is a parameter itself: its gradient then has the mean of what it reads.
        each_tap: whether the channels of every tap sum to 0 by themselves.
        taps: k.
        same, different: E[n^2] and E[n n'] of the numbers of taps that one output position, and two, meet.
        how: what is taken for granted.
    """

    fan_in: int
    stored: bool
    each_tap: bool = False
    taps: int = 1
    same: float = 1.0
    different: float = 1.0
    how: How = EXACT

    def meeting(self, met: Tensor) -> ZeroSums:
        """The same for a convolution whose output positions meet ``met`` taps each."""
        total, squares, count = float(met.sum()), float(met.square().sum()), met.numel()
        different = (total**2 - squares) / (count * (count - 1)) if count > 1 else squares
        how = EACH_TAP if self.each_tap and bool((met < self.taps).any()) else EXACT
        return replace(self, same=squares / max(count, 1), different=different, how=how)

    def applied(self, context: Context, part: Part, result: Part, weight: float, speed: float) -> Part:
        """The layer's ``result`` on ``part`` without the mean; ``weight``: fan_in E[w^2] over all taps."""
        how = self.how
        if context.pairs.moments and isinstance(part.expr, Unknown):
            how = how | _OF_GIVEN
        if part.mean == 0:
            return replace(result, how=result.how | how)
        less = torch.empty_like(result.cov)
        less[:, SAME], less[:, DIFF] = (part.mean**2 * n / self.taps**2 for n in (self.same, self.different))
        own = 0.0 if self.stored else speed * (weight if context.parametrization == "ntk" else self.fan_in)
        return replace(result, cov=result.cov - weight * less, ntk=result.ntk - own * less, how=result.how | how)


def zero_sums(context: Context, source: object, units: Tensor) -> ZeroSums | None:
    """What the weight ``source``, as [units, channels, *taps], does not see; None if its units do not sum to 0."""
    if not sums_to_zero(units):
        return None
    taps = units.flatten(2).shape[2] if units.ndim > 2 else 1
    stored = isinstance(source, fx.Node) and isinstance(held(source), nn.Parameter)
    return ZeroSums(
        units[0].numel(), stored, taps > 1 and sums_to_zero(by_tap(units)), taps, float(taps**2), float(taps**2)
    )


def by_tap(units: Tensor) -> Tensor:
    """Every tap of every unit [units, channels, *taps] as a unit of its own."""
    return units.flatten(2).transpose(1, 2).flatten(0, 1) if units.ndim > 2 else units


def units_of(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A convolution's weight as [units, channels, *taps]; transposed ones store [channels, units of a group, *taps]."""
    if not transposed:
        return weight
    channels, units, *taps = weight.shape
    return weight.reshape(groups, channels // groups, units, *taps).transpose(1, 2).flatten(0, 1)
