"""Distances to known points, as radial basis functions read them.

    |x - c_k|^2 = |x|^2 + |c_k|^2 - 2 <c_k, x>

The last term is a linear layer, the second a number for every channel, and |x|^2 is D q for many channels D.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kgraph import algebra
from kgraph.canonical import aten
from kgraph.constants import add_constant
from kgraph.entries import said
from kgraph.how import assumed
from kgraph.kernel import Kernel
from kgraph.maps import Pointwise
from kgraph.rules.linear import last_dim
from kgraph.rules.table import Context, rule

_ROOT = Pointwise(lambda u: u.clamp_min(0).sqrt())
_ALIKE = assumed("distances of inputs of one norm, to points whose norms say nothing of what they are multiplied by")


@rule(aten.cdist.default)
def cdist(context: Context, x: Kernel | Tensor, points: Kernel | Tensor, p: float = 2.0, *_: object) -> Kernel:
    known = isinstance(points, Tensor) and points.ndim == 2 and not points.is_meta
    if p != 2 or not known or not isinstance(x, Kernel) or len(x.axes) < 2:
        return context.sample()
    if any(role != "c" for role, _ in x.axes[-1]):
        return context.sample()
    assert isinstance(points, Tensor)
    count, channels = points.shape
    norms = points.detach().double().square().sum(1)
    inner = last_dim(context, x, points, None, count, 1)
    squared = inner.with_parts(*(algebra.scale(part, -2.0) for part in inner.parts))
    squared = add_constant(squared, norms - norms.mean(), 1.0, f"{context.node.name} norms")
    far = float(norms.mean()) + channels * float(x.merged.q)
    parts = (algebra.apply(_ROOT, algebra.shift(part, far)) for part in squared.parts)
    return said(replace(squared, parts=tuple(parts)), _ALIKE)


__all__ = ["cdist"]
