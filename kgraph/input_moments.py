"""What an analysis takes its inputs for: white noise, or second moments measured on the user's own batch.

    q          mean square of an entry
    c          cosine of two inputs at one position
    c_within   cosine of two positions of one input
    c_apart    cosine of two positions of two inputs
    spread     standard deviation of the inputs' own q, in units of q

all about zero, averaged over channels, inputs and positions. White inputs have q = 1 and the cosines asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.checks import dense_inputs
from kgraph.errors import InputError

_PLAINLY = 0.3
_NEAR = 0.1
_UNEVEN = 0.1
_SIGMAS = 5.0


@dataclass(frozen=True)
class InputMoments:
    """Second moments of an input: q, cosines in [-1, 1], and how unlike the inputs' own q are.

    Functions are computed at q: where the inputs differ from it by more than a tenth, the report says "assumed".

    Raises:
        InputError: a number that no input can have.
    """

    q: float = 1.0
    c: float = 0.0
    c_within: float = 0.0
    c_apart: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        for name in ("q", "c", "c_within", "c_apart", "spread"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"InputMoments: {name} is {value!r}", hint="Pass a finite number")
        if self.q <= 0:
            raise InputError(f"InputMoments: q is {self.q!r}", hint="A mean square is above 0")
        if self.spread < 0:
            raise InputError(f"InputMoments: spread is {self.spread!r}", hint="A deviation is 0 or above")
        if not -1 <= self.c < 1 or not -1 <= self.c_within <= 1 or not -1 <= self.c_apart <= 1:
            raise InputError(
                f"InputMoments: cosines {self.c!r}, {self.c_within!r}, {self.c_apart!r} are not in [-1, 1]",
                hint="Two inputs need a cosine below 1 to be two",
            )

    @classmethod
    def of(cls, x: Tensor, channel: int = 1) -> InputMoments:
        """Measured on a batch ``x`` [N, ...] whose channels lie in dimension ``channel``; N at least 2.

        Raises:
            InputError: no batch of numbers, one input, inputs that are all the same, or nothing but zeros.
        """
        dense_inputs(x, with_values=True)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise InputError("moments are those of a tensor [N, ...] of floating-point numbers", hint="Pass a batch")
        if not isinstance(channel, int) or isinstance(channel, bool) or not 0 < channel < x.ndim:
            raise InputError(f"channel is {channel!r}", hint=f"Pass a dimension from 1 to {x.ndim - 1}")
        if not bool(x.isfinite().all()):
            raise InputError("the inputs hold NaN or infinite numbers", hint="Pass finite ones")
        n = x.shape[0]
        if n < 2:
            raise InputError("second moments of inputs need a batch of at least 2", hint="Pass more inputs")
        flat = x.detach().double().movedim(channel, -1).reshape(n, -1, x.shape[channel])  # [N, positions, channels]
        places = flat.shape[1]
        q = float(flat.square().mean())
        if q == 0:
            raise InputError("the inputs are zero everywhere", hint="Pass inputs as the model will see them")
        entries, total, one = flat.numel(), flat.sum(0), flat.sum(1)
        same_place = float(total.square().sum()) - q * entries  # pairs of inputs at one position
        same_input = float(one.square().sum()) - q * entries  # pairs of positions of one input
        apart = float(one.sum(0).square().sum()) - q * entries - same_place - same_input
        c = same_place / (entries * (n - 1)) / q
        if c >= 1 - 1e-12:
            raise InputError("the inputs are all the same", hint="Pass different inputs")
        pairs = max(places - 1, 1)
        spread = float(flat.square().mean((1, 2)).std(correction=0)) / q
        within, between = same_input / (entries * pairs) / q, apart / (entries * (n - 1) * pairs) / q
        within, between = (min(max(x, -1.0), 1.0) for x in (within, between))  # but for rounding
        return cls(q, max(c, -1.0), within, between, spread)

    @property
    def uneven(self) -> bool:
        """Whether inputs differ in their own q by so much that a function's mean over them is not that at the mean."""
        return self.spread > _UNEVEN

    @property
    def white(self) -> bool:
        return not (self.c_within or self.c_apart)

    def __str__(self) -> str:
        within = f", of two positions {self.c_within:.3g}" if self.c_within else ""
        apart = f" (of two inputs {self.c_apart:.3g})" if self.c_apart else ""
        spread = f" +- {100 * self.spread:.0f} %" if self.uneven else ""
        return f"q {self.q:.3g}{spread}, cosine of two inputs {self.c:.3g}{within}{apart}"


WHITE = InputMoments()


def check_possible(moments: InputMoments, positions: int) -> None:
    """Whether two inputs of so many positions can have these cosines: no combination of entries has q < 0.

    Raises:
        InputError: they cannot.
    """
    for sign in (1, -1):  # sum and difference of the two inputs: of all positions, and of two
        one, other = 1 + sign * moments.c, moments.c_within + sign * moments.c_apart
        if min(one + (positions - 1) * other, one - other) < -1e-9:
            raise InputError(
                f"no two inputs of {positions} positions have cosines c={moments.c:.3g}, "
                f"c_within={moments.c_within:.3g} and c_apart={moments.c_apart:.3g}",
                hint="Measure them on a batch: InputMoments.of(x)",
            )


def plainly_not_white(moments: InputMoments, entries: int) -> bool:
    """Whether cosines are beyond what white noise of so many entries has."""
    allowed = _PLAINLY + _SIGMAS / math.sqrt(max(entries, 1))
    return max(abs(moments.c), abs(moments.c_within), abs(moments.c_apart)) > allowed


def neighbours(x: Tensor, channel: int = 1) -> float:
    """Largest correlation of neighbouring positions of a batch, along any dimension; 0 where there is one position."""
    y = x.detach().double()
    square = float(y.square().mean())
    found = [0.0]
    for dim in range(1, y.ndim):
        if dim != channel and y.shape[dim] > 1 and square > 0:
            ahead, behind = y.narrow(dim, 1, y.shape[dim] - 1), y.narrow(dim, 0, y.shape[dim] - 1)
            found.append(abs(float((ahead * behind).mean())) / square)
    return max(found)


def plainly_smooth(x: Tensor, channel: int = 1) -> bool:
    """Whether neighbouring positions are more alike than those of white noise of so many entries: as of images."""
    return neighbours(x, channel) > _NEAR + _SIGMAS / math.sqrt(max(x.numel(), 1))


def covariances(moments: InputMoments, cosines: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Covariance and its derivative by the cosine, [P, 2] (same position, another one), of pairs on the way from two
    inputs as they come (cosine ``base``) to one and the same (cosine 1)."""
    share = (cosines - base) / (1 - base)
    two, one = torch.tensor([[moments.c, moments.c_apart], [1.0, moments.c_within]], dtype=torch.float64)
    cov = moments.q * (two + share[:, None] * (one - two))
    slope = moments.q * (one - two) / (1 - base)
    return cov, slope.expand(len(cosines), 2).clone()
