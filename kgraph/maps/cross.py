"""Gaussian integrals of two different functions of correlated arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.maps import quadrature
from kgraph.maps.closed import correlation
from kgraph.maps.pointwise import Pointwise
from kgraph.maps.quadrature import Plan


def cross(f: Pointwise, g: Pointwise, q1: Tensor, q2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """``(E[f(z1) g(z2)], E[f'(z1) g'(z2)])`` for ``(z1, z2) ~ N(0, [[q1, cov], [cov, q2]])``, as `Pointwise.dual`."""
    shape = torch.broadcast_shapes(q1.shape, q2.shape, cov.shape)
    q1, q2, cov = (t.expand(shape).reshape(-1) for t in (q1, q2, cov))
    _, c, s = correlation(q1, q2, cov)
    plan = _both(*(fn.plan(float(torch.maximum(q1, q2).max()), q1.device) for fn in (f, g)))
    value, slope = quadrature.dual(f.fn, plan, torch.stack([q1, q2]).sqrt(), c, s, g.fn)
    return value.reshape(shape), slope.reshape(shape)


def _both(one: Plan, two: Plan) -> Plan:
    """Edges that serve two functions."""
    return Plan(
        torch.cat([one.base, two.base]).unique(),
        torch.cat([one.kinks, two.kinks]).unique(),
        torch.cat([one.splits, two.splits]).unique(),
    )
