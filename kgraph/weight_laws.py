"""The laws that parameters are drawn from: plain data, so that what was drawn once can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kgraph.initializers import Distribution, reinitialize_weight_


@dataclass(frozen=True)
class WeightLaw:
    """Law of one weight: see `kgraph.initializers.reinitialize_weight_`.

    Attributes:
        distribution: "suo" or "gaussian".
        geometry: options of the draw (delta, groups, stride, ...).
        flipped: the layer stores [in, out].
        each_tap: a transposed convolution of one input position: every tap is a linear layer of its own.
        divisor: what the draw is divided by: the number that the forward multiplies the parameter by.
        even: whether all taps of a convolution get the same mean square, so that borders cost every draw the same.
    """

    distribution: Distribution
    geometry: dict[str, Any]
    flipped: bool = False
    each_tap: bool = False
    divisor: float = 1.0
    even: bool = False

    @torch.no_grad()
    def draw_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw ``weight`` in place."""
        values = weight.data
        if self.each_tap:
            draw_each_tap(values, self.distribution, self.geometry["groups"], generator, corrected=True)
        else:
            options = {"distribution": self.distribution, "generator": generator, **self.geometry}
            reinitialize_weight_(values.T if self.flipped else values, **options)
        if self.even:
            squares = values.square().mean((0, 1))
            values *= (squares.mean() / squares).sqrt()
        if self.divisor != 1:
            values /= self.divisor


@dataclass(frozen=True)
class Filled:
    """A parameter that holds one number throughout: a bias of 0, a gain of 1."""

    value: float

    @torch.no_grad()
    def draw_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill ``weight`` in place; nothing is drawn."""
        weight.fill_(self.value)


Law = WeightLaw | Filled


def draw_each_tap(
    weight: Tensor, distribution: Distribution, groups: int, generator: torch.Generator, *, corrected: bool = False
) -> None:
    """A transposed convolution of one input position (the first of a generator): every output position meets
    one tap, so every tap is drawn as a linear layer of its own.
    """
    for tap in range(weight[0, 0].numel()):
        matrix = weight.flatten(2)[:, :, tap : tap + 1]
        geometry: dict[str, Any] = {"groups": groups, "transposed": True, "delta": False, "corrected": corrected}
        own = matrix.clone().contiguous()
        reinitialize_weight_(own, distribution=distribution, generator=generator, **geometry)
        matrix.copy_(own)


__all__ = ["Filled", "Law", "WeightLaw", "draw_each_tap"]
