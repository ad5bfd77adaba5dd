"""PReLU: a leaky relu whose negative slope is a parameter, one for all channels or one for each.

    phi_a(u) = max(u, 0) + a min(u, 0)

With R and N the kernels of max(u, 0) and min(u, 0), the kernel is R + E[a] (K - R - N) + E[a a'] N: averaged over
channels, only the first two moments of the slopes enter. Two slopes E[a] +- std(a), half the channels each, have
them too, so that `average` stands for any number of slopes.

Source: He et al. 2015, arXiv 1502.01852; the integrals are leaky relu's, see `kgraph.maps.closed`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kgraph import algebra
from kgraph.canonical import aten
from kgraph.constants import Moments, known_part, moments
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Gaussian, Kernel, Pairs, Part, Sum
from kgraph.maps import ClosedForm, Pointwise
from kgraph.rules.pointwise import NEGATIVE_PART, POSITIVE_PART, leaky
from kgraph.rules.table import Context, rule
from kgraph.rules.weights import mean_square


@rule(aten.prelu.default)
def prelu(context: Context, x: Kernel, weight: Tensor) -> Kernel:
    if not isinstance(x, Kernel) or not isinstance(weight, Tensor):
        return context.sample()
    speed = 1.0 if context.parametrization == "standard" else mean_square(weight)
    trained = speed * context.speed("weight")
    root = context.argument_name(1)
    parts = []
    for part, own in zip(x.parts, _per_part(x, weight), strict=True):
        slopes = moments(own, x.axes)
        parts.append(_one_slope(part, slopes, trained) if _same(own) else _slopes(part, slopes, trained, root))
    return x.with_parts(*parts)


@rule(aten.rrelu.default)
def rrelu(
    context: Context, x: Kernel, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: object
) -> Kernel:
    """eval: leaky relu of the mean slope; train: every entry draws its own, which adds var(a) N to E[v_a(i)^2]."""
    if not isinstance(x, Kernel):
        return context.sample()
    fixed = x.with_parts(*(algebra.apply(leaky((lower + upper) / 2), part) for part in x.parts))
    if not training or context.mode == "eval":
        return fixed
    return fixed.with_parts(
        *(_noisy(part, own, (upper - lower) ** 2 / 12) for part, own in zip(x.parts, fixed.parts, strict=True))
    )


def _noisy(part: Part, shaped: Part, variance: float) -> Part:
    negative, cov, ntk = algebra.apply(NEGATIVE_PART, part), shaped.cov.clone(), shaped.ntk.clone()
    cov[Pairs.SELF, SAME] += variance * negative.cov[Pairs.SELF, SAME]
    ntk[Pairs.SELF, SAME] += variance * negative.ntk[Pairs.SELF, SAME]
    return replace(shaped, cov=cov, ntk=ntk, expr=Gaussian(), how=shaped.how | assumed("Gaussian after random slopes"))


def _per_part(x: Kernel, weight: Tensor) -> list[Tensor]:
    """The slopes that meet each channel group, laid out to broadcast against the kernel: channels are dimension 1."""
    shape = [weight.numel() if i == 1 else 1 for i in range(len(x.axes))]
    wide = weight.detach().double().reshape(shape)
    if x.split == 1 and weight.numel() > 1:
        return list(wide.split([part.size for part in x.parts], 1))
    return [wide] * len(x.parts)


def _same(slopes: Tensor) -> bool:
    return bool((slopes == slopes.flatten()[0]).all())


def _one_slope(part: Part, slopes: Moments, trained: float) -> Part:
    """A leaky relu; its parameter adds E[min(u, 0) min(u', 0)] to the NTK."""
    shaped = algebra.apply(leaky(slopes.mean), part)
    return algebra.trained(shaped, trained * algebra.apply(NEGATIVE_PART, part).cov, of_itself=True)


def _slopes(part: Part, slopes: Moments, trained: float, root: str) -> Part:
    """max(u, 0) + a min(u, 0) with ``a`` a known tensor; where draws are needed, Gaussian of the slopes' moments."""
    positive, negative = algebra.apply(POSITIVE_PART, part), algebra.apply(NEGATIVE_PART, part)
    factor = known_part(part, slopes, root)
    factor = replace(factor, ntk=torch.full_like(factor.ntk, trained))
    bent = algebra.multiply(factor, negative)
    gains = torch.empty(2, dtype=torch.float64)
    gains[SAME], gains[DIFF] = slopes.same, slopes.different

    def mixed(name: str) -> Tensor:
        whole, up, down = (getattr(p, name) for p in (part, positive, negative))
        return up + slopes.mean * (whole - up - down) + gains * down

    return Part(
        size=part.size,
        cov=mixed("cov"),
        slope=mixed("slope"),
        ntk=mixed("ntk") + trained * negative.cov,
        mean=positive.mean + slopes.mean * negative.mean,
        roots=positive.roots | factor.roots,
        expr=Sum(((1.0, positive), (1.0, bent))),
        how=positive.how | negative.how,
    )


def spread(weight: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the slopes; 0.25, PReLU's own start, on the meta device."""
    if weight.is_meta:
        return 0.25, 0.0
    if _same(weight.detach()):
        return float(weight.detach().flatten()[0]), 0.0
    flat = weight.detach().double()
    return float(flat.mean()), float(flat.std(unbiased=False))


def average(low: Pointwise, high: Pointwise, middle: Pointwise) -> Pointwise:
    """The mean of the integrals of two functions, half the channels each; ``middle`` stands for its curve."""

    def dual(q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        one, two = low.dual(q1, q2, cov), high.dual(q1, q2, cov)
        return (one[0] + two[0]) / 2, (one[1] + two[1]) / 2

    return Pointwise(middle.fn, ClosedForm(dual, lambda q: (low.mean(q) + high.mean(q)) / 2))
