"""``M u + b`` behind a convolution, under exchangeable positions.

A convolution's kernel there is already an average over positions of how many taps meet an input, w_p = |P(p)| / c_max
with M_p^2 = 1 / w_p. Scaling makes K the same at every pixel that has parents, so with <.> the mean over pixels

    K'_same = K_same <1[w > 0]> / <w> + sb2      (exact where taps weigh alike)
    K'_diff = K_diff <sqrt w>^2 / <w>^2 + sb2    (a tap is taken to meet an input with chance w_p, whichever it is)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kgraph.how import EXACT, assumed
from kgraph.kernel import DIFF, SAME, Gaussian, Kernel, Part
from kgraph.parent_scale import PARENT_SCALE, ParentScale
from kgraph.rules.linear import bias_moments
from kgraph.rules.table import Context, rule


@rule(PARENT_SCALE)
def parent_scale(context: Context, x: Kernel, scale: Tensor, bias: Tensor | None = None) -> Kernel:
    gains = _gains(scale.detach().double())
    even = bool((scale == scale.flatten()[0]).all())
    sb2, mean = bias_moments(bias)
    own = float(bias is not None) if context.parametrization == "standard" else sb2

    def scaled(part: Part) -> Part:
        return replace(
            part,
            cov=part.cov * gains + sb2,
            slope=part.slope * gains,
            ntk=part.ntk * gains + own,
            mean=part.mean + mean,
            expr=Gaussian(),
            how=part.how | (EXACT if even else assumed("taps that meet the border alike")),
        )

    return x.with_parts(*(scaled(part) for part in x.parts))


@rule(ParentScale)
def parent_scale_module(
    context: Context, module: ParentScale, x: Kernel, like: Kernel, bias: Tensor | None = None
) -> Kernel:
    dims = len(module.taps.kernel)
    return parent_scale(context, x, module.factors(like.shape[-dims:]), bias)


def _gains(scale: Tensor) -> Tensor:
    """Factors of the same-position and different-position kernels, [2]."""
    alive = scale > 0
    share = torch.where(alive, scale.square().clamp_min(1e-300).reciprocal(), 0.0)
    gains = torch.empty(2, dtype=torch.float64)
    gains[SAME] = alive.double().mean() / share.mean()
    gains[DIFF] = (share.sqrt().mean() / share.mean()).square()
    return gains
