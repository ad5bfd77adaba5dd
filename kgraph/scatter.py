"""Cosines of two positions scatter where inputs have few channels, and functions see them one by one.

White inputs of d channels have cosines of mean 0 and variance 1 / d between their positions (of one colour: +-1). What
two positions have in common behind a nonlinearity is E[C(c)] over these cosines, not C(0), at any width. Their law has
the density (1 - c^2)^((d - 3) / 2); a Gauss rule of it goes from layer to layer with the kernel. Of a convolution's
taps each meets a pair of its own, so that their mean scatters less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.special import roots_gegenbauer
from torch import Tensor

_LEAST = 1e-4
"""Variance of a cosine from which on it counts: E[C(c)] - C(0) is about a quarter of it, of q = 1."""
_NODES = 5


@dataclass(frozen=True, eq=False)
class Scatter:
    """Of the kernel of two positions, over pairs of them: a Gauss rule.

    Attributes:
        cov, ntk: what a pair has more than the mean, [S] each.
        weights: [S].
        given: whether the channels are still an input's own: each of them draws both positions anew, so that functions
            have the moments of the mean cosine; units of a layer have one cosine in common.
    """

    cov: Tensor
    ntk: Tensor
    weights: Tensor
    given: bool = False

    @property
    def variance(self) -> float:
        """Of the second moment."""
        return float(self.cov.square() @ self.weights)

    def shows(self, q: float) -> bool:
        """Whether a function of Gaussians of this q has other mean moments because of it."""
        return self.variance > _LEAST * q * q

    def scaled(self, square: float) -> Scatter:
        """Of ``factor v``, with the factor's square."""
        return Scatter(self.cov * square, self.ntk * square, self.weights, self.given)

    def of_function(self, q: float, second: float, mean: float) -> Scatter:
        """Of f of given channels of this q: a mean of C products f f' has variance (E[f^2]^2 - E[f]^4) / C."""
        return self.scaled(math.sqrt(max(second**2 - mean**4, 0.0)) / q)

    def layer(self, gain: float, own: float, taps: float = 1.0) -> Scatter:
        """Behind ``K' = gain K``, ``T' = gain T + own K`` of a mean over so many taps."""
        share = taps**-0.5 if taps > 0 else 0.0  # no two outputs that read one tap
        return Scatter(share * gain * self.cov, share * (gain * self.ntk + own * self.cov), self.weights)


def of_white(channels: int, q: float) -> Scatter:
    """That of white inputs of so many channels."""
    cosines, weights = _cosines(channels)
    return Scatter(q * cosines, torch.zeros_like(cosines), weights, given=True)


@lru_cache(64)
def _cosines(channels: int) -> tuple[Tensor, Tensor]:
    if channels == 1:
        return torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
    if channels == 2:  # Chebyshev's, the limit of the others
        angles = (2 * torch.arange(_NODES, dtype=torch.float64) + 1) * math.pi / (2 * _NODES)
        return -angles.cos(), torch.full((_NODES,), 1 / _NODES, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(x) for x in roots_gegenbauer(_NODES, channels / 2 - 1))
    return nodes, weights / weights.sum()


def both(one: Scatter | None, two: Scatter | None) -> Scatter | None:
    """Of a sum of parts: they scatter together, for both are made of the same inputs."""
    if one is None or two is None:
        return one or two
    if len(one.cov) != len(two.cov):  # of two inputs
        return max(one, two, key=lambda scatter: scatter.variance)
    return Scatter(one.cov + two.cov, one.ntk + two.ntk, one.weights, one.given and two.given)


__all__ = ["Scatter", "both", "of_white"]
