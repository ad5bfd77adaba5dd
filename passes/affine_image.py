"""Which constants behind an operation keep the shape of the kernel: the affine image ``g (v + d)`` of q = 1.

With q = E[v^2], m = E[v], s the tangent dK/dc of v at equal inputs and t that of what the operation reads, per its q:

    nothing      d = 0
    centred      d = -m                                    unrelated inputs stay uncorrelated: C(0) = 0
    slope kept   (m + d)^2 = s / (psi t) - (q - m^2)       the operation's own slope C'(1) is psi
    always       g = (q + 2 m d + d^2)^(-1/2)

The moments are those of the propagated input, whatever its law. Behind the sums of a post-activation residual network
the constants differ from those of a Gaussian of mean 0: the mean of the shortcut adds up coherently from sum to sum,
and with it C(0), where everything else adds up in squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kgraph import algebra
from kgraph.kernel import SAME, Kernel, Pairs

Keep = Literal["q", "mean", "slope"]
"""What the constants keep besides q = 1: nothing, a mean of 0, or the slope."""


@dataclass(frozen=True)
class AffineImage:
    """``v -> factor * (v + shift)``."""

    factor: float = 1.0
    shift: float = 0.0

    def of(self, kernel: Kernel) -> Kernel:
        """The kernel of the image: exact."""
        parts = (algebra.shift(part, self.shift) for part in kernel.parts)
        return kernel.with_parts(*(algebra.scale(part, self.factor) for part in parts))

    def idle(self, tolerance: float) -> bool:
        """Whether it moves nothing by more than ``tolerance``; the factor counts squared, as q does."""
        return abs(self.shift) <= tolerance and abs(self.factor**-2 - 1) <= tolerance


def restoring(kernel: Kernel, read: Kernel | None, keep: Keep, psi: float = 1.0) -> AffineImage | None:
    """The affine image of q = 1; None where q is not known or nothing is left of it.

    Args:
        kernel: of what comes out.
        read: of what the operation reads, for its slope.
        keep: what the shift is for.
        psi: the slope to have, for "slope".
    """
    q, mean = float(kernel.merged.q), kernel.merged.mean
    if not 0 < q < math.inf:
        return None
    shift = _shift(kernel, read, keep, psi, q, mean)
    second = q + 2 * mean * shift + shift**2
    if not second > _NOTHING * q:  # a constant: centred, nothing of it is left
        return AffineImage(q**-0.5)
    return AffineImage(second**-0.5, shift)


def incoherent(kernel: Kernel) -> AffineImage | None:
    """The image of q = 1 of a weighted sum: as much of its mean as orthogonal terms of q = 1 would have together.

    The means of terms add up, and everything else in squares: with (m + d)^2 = 1 - (q - m^2) the slope is the weighted
    mean of the terms' slopes, as it is without means.
    """
    q, mean = float(kernel.merged.q), kernel.merged.mean
    variance = q - mean**2
    if not 0 < variance < 1:
        return restoring(kernel, None, "q")
    return AffineImage(1.0, math.copysign(math.sqrt(1 - variance), mean) - mean)


_NOTHING = 1e-9


def _shift(kernel: Kernel, read: Kernel | None, keep: Keep, psi: float, q: float, mean: float) -> float:
    if keep == "q":
        return 0.0
    if keep == "mean":
        return -mean
    slope, before = tangent(kernel), tangent(read) if read is not None else 0.0
    if not (0 < slope < math.inf and 0 < before < math.inf):
        return 0.0
    left = slope * q / (psi * before) - (q - mean**2)  # of q, for the mean
    return math.copysign(math.sqrt(max(left, 0.0)), mean) - mean


def tangent(kernel: Kernel) -> float:
    """``C'(1)`` from the inputs to here: dK/dc at equal inputs over q; NaN where q is 0."""
    part = kernel.merged
    q = float(part.q)
    return float(part.slope[Pairs.UNIT, SAME]) / q if q > 0 else math.nan


__all__ = ["AffineImage", "Keep", "incoherent", "restoring", "tangent"]
