"""What a normalization computes: a program of one tensor is run on random inputs and compared with the norms there are.

    y = gain * factor * (x - m) / sqrt(v + eps) + shift

with m the mean (0 for RMS norms) and v the mean square of x - m over the entries that one output depends on. Which
entries these are is read off a gradient; the formula is then checked at inputs of several scales and shifts, so that
the invariance under x -> a x + b is a fact, not a reading of the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"]
_LARGEST_EPS = 0.02
_EXACT, _SMALL_EPS = 1e-5, 2e-3


_TINY = 1e-24
"""Keeps 0 / 0 away where a tensor is all zeros, and is nothing beside any variance."""


class Slot(NamedTuple):
    """Stands for a tensor: 0 is x, then the parameters, then the steps' results in order."""

    slot: int


Step = tuple[Callable[..., Any], tuple[Any, ...], tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Program:
    """Operations on x and parameters; hashable, so that equal layers of a network are run once.

    Attributes:
        shape: of x; dimension 0 is the batch.
        parameters: shapes of the tensors that no input reaches.
        steps: ``(operation, arguments, keyword arguments)``; the last one's result is the program's.
    """

    shape: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]

    def run(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        known: list[Any] = [x, *parameters]

        def given(value: Any) -> Any:
            if isinstance(value, Slot):
                return known[value.slot]
            return [given(v) for v in value] if isinstance(value, tuple) else value

        for operation, args, kwargs in self.steps:
            known.append(operation(*map(given, args), **{name: given(value) for name, value in kwargs}))
        return known[-1]


@dataclass(frozen=True)
class Form:
    """A program that is a norm.

    Attributes:
        kind: which.
        over: dimensions of x that the statistics average, in order (of GroupNorm: all but the channels').
        groups: of channels, for GroupNorm.
        factor: what multiplies the normalized tensor besides the gains.
        eps: beside the variance; where it stands outside the root, what it is worth at unit variance.
        gains: indices of the parameters that multiply.
        shifts: indices of those that are added.
    """

    kind: Kind
    over: tuple[int, ...]
    groups: int
    factor: float
    eps: float
    gains: tuple[int, ...]
    shifts: tuple[int, ...]


@lru_cache(maxsize=512)
def identify(program: Program, channels_first: bool) -> Form | None:
    """The norm that ``program`` computes, or None.

    Args:
        program: in double precision.
        channels_first: what to call dimension 1 of a tensor of three dimensions: channels or positions.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        trials = (_Trial(program, roles) for roles in product((True, False), repeat=len(program.parameters)))
        return next(filter(None, (trial.form(channels_first) for trial in trials)), None)


class _Trial:
    """One guess of which parameters are gains (True) and which are shifts."""

    def __init__(self, program: Program, roles: tuple[bool, ...]) -> None:
        self.program, self.roles = program, roles
        self.neutral = [
            torch.full(shape, float(gain), dtype=torch.float64)
            for shape, gain in zip(program.parameters, roles, strict=True)
        ]
        self.generator = torch.Generator().manual_seed(0)

    def form(self, channels_first: bool) -> Form | None:
        x = self._normal(self.program.shape)
        reach = self._reach(x)
        if reach is None:
            return None
        for centred in (True, False):
            named = _named(reach, self.program.shape, centred, channels_first)
            fitted = self._fit(x, named[1], named[2], centred) if named is not None else None
            if named is not None and fitted is not None:
                gains = tuple(i for i, gain in enumerate(self.roles) if gain)
                shifts = tuple(i for i, gain in enumerate(self.roles) if not gain)
                factor, eps = fitted
                if named[0] == "BatchNorm" and abs(factor - self._unbiased(named[1])) < _EXACT:
                    factor = 1.0  # of the sample variance: how far from 1 depends on the size of the batch
                return Form(*named, factor, eps, gains, shifts)
        return None

    def _unbiased(self, over: tuple[int, ...]) -> float:
        """Root of population over sample variance."""
        count = math.prod(self.program.shape[d] for d in over)
        return math.sqrt((count - 1) / count)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _run(self, x: Tensor) -> Tensor:
        return self.program.run(x, self.neutral)

    def _reach(self, x: Tensor) -> tuple[int, ...] | None:
        """Along each dimension, the number of entries of x that one entry of the output depends on."""
        x = x.requires_grad_()
        y = self._run(x)
        if y.shape != x.shape or not y.requires_grad:
            return None
        at = tuple(size // 2 for size in x.shape)
        (gradient,) = torch.autograd.grad(y[at], x, allow_unused=True)
        x.requires_grad_(False)
        if gradient is None or not bool(gradient.isfinite().all()):
            return None
        reached = gradient.abs() > 1e-12 * gradient.abs().max()
        axes = range(x.ndim)
        counts = tuple(int(reached.any([d for d in axes if d != axis]).sum()) for axis in axes)
        return counts if math.prod(counts) == int(reached.sum()) else None

    def _fit(self, x: Tensor, over: tuple[int, ...], groups: int, centred: bool) -> tuple[float, float] | None:
        """Factor and eps; None where the program is another function."""
        large = 1e6 * (x + 0.3)
        y, (c, v) = self._run(large), _statistics(large, over, groups, centred)
        plain = c * v.rsqrt()
        factor = float((y * plain).sum() / plain.square().sum())
        if not (factor > 0 and math.isfinite(factor) and _alike(y, factor * plain, _EXACT)):
            return None
        unit, small = (self._eps(scale * x, over, groups, centred, factor) for scale in (1.0, 1e-4))
        inside = abs(unit - small) <= 1e-12 + 1e-3 * abs(unit)
        eps = small if inside else unit
        if not -1e-9 < eps < (_LARGEST_EPS if inside else _SMALL_EPS):
            return None
        eps = eps if eps > 1e-20 else _TINY
        holds = self._holds(over, groups, centred, factor, eps, _EXACT if inside else max(_EXACT, 40 * eps))
        return (factor, float(f"{eps:.8g}")) if holds and self._parameters_hold(x) else None

    def _eps(self, x: Tensor, over: tuple[int, ...], groups: int, centred: bool, factor: float) -> float:
        """``(factor c / y)^2 - v`` at the entry that tells most."""
        y, (c, v) = self._run(x), _statistics(x, over, groups, centred)
        at = int(c.abs().argmax())
        value = float(y.flatten()[at])
        return float((factor * c.flatten()[at] / value) ** 2 - v.expand_as(c).flatten()[at]) if value else math.inf

    def _holds(
        self, over: tuple[int, ...], groups: int, centred: bool, factor: float, eps: float, tolerance: float
    ) -> bool:
        """The formula at inputs whose scale and mean differ from one to the next along every dimension."""
        for scale, shift in ((1.0, 0.0), (1.0, 1.0), (30.0, -3.0), (0.3, 0.1)):
            x = self._normal(self.program.shape)
            for axis in range(x.ndim):
                sizes = [1] * x.ndim
                sizes[axis] = x.shape[axis]
                x = x * (0.1 * self._normal(tuple(sizes))).exp() + 0.1 * self._normal(tuple(sizes))
            x = scale * x + shift
            c, v = _statistics(x, over, groups, centred)
            expected = factor * c * (v + eps).rsqrt()  # an eps beside the deviation counts by 1 / v
            if not _alike(v * self._run(x), v * expected, tolerance):
                return False
        return True

    def _parameters_hold(self, x: Tensor) -> bool:
        """Whether gains multiply and shifts are added, whatever their values."""
        drawn = [self._normal(shape) for shape in self.program.parameters]
        expected = self._run(x)
        for value, gain in zip(drawn, self.roles, strict=True):
            expected = expected * value if gain else expected
        for value, gain in zip(drawn, self.roles, strict=True):
            expected = expected if gain else expected + value
        return expected.shape == x.shape and _alike(self.program.run(x, drawn), expected, 1e-9)


def _statistics(x: Tensor, over: tuple[int, ...], groups: int, centred: bool) -> tuple[Tensor, Tensor]:
    """``x - m`` and the mean square of it, of the shape of x each."""
    cut, dims = x, over
    if groups > 1:
        cut, dims = x.unflatten(1, (groups, -1)), (2, *(d + 1 for d in over))
    c = cut - cut.mean(dims, keepdim=True) if centred else cut
    v = c.square().mean(dims, keepdim=True).expand_as(c)
    return c.reshape(x.shape), v.reshape(x.shape)


def _named(
    reach: tuple[int, ...], shape: tuple[int, ...], centred: bool, channels_first: bool
) -> tuple[Kind, tuple[int, ...], int] | None:
    """Name, dimensions averaged and groups of the norm whose statistics reach so far (dimensions of size 1: any)."""
    rest = [d for d in range(1, len(shape)) if shape[d] > 1]
    over = tuple(d for d in rest if reach[d] == shape[d])
    kept = [d for d in rest if reach[d] == 1]
    blocks = [d for d in rest if 1 < reach[d] < shape[d]]
    if reach[0] == shape[0] > 1:
        return ("BatchNorm", (0, *over), 1) if centred and len(kept) == 1 and not blocks else None
    if blocks:
        grouped = centred and blocks == [1] and not kept and shape[1] % reach[1] == 0
        return ("GroupNorm", over, shape[1] // reach[1]) if grouped else None
    if not over:
        return None
    if kept == [1] and (len(shape) > 3 or channels_first):
        return ("InstanceNorm", over, 1) if centred else None
    return ("LayerNorm" if centred else "RMSNorm", over, 1)


def _alike(y: Tensor, expected: Tensor, tolerance: float) -> bool:
    scale = float(expected.square().mean().sqrt())
    return math.isfinite(scale) and bool((y - expected).abs().max() <= tolerance * scale)


__all__ = ["Form", "Kind", "Program", "Slot", "identify"]
