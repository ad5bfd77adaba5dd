"""Activations whose exact form another output relies on: flows that return log-determinants, densities.

A planar flow has f = tanh(a) in one output and f' = 1 - tanh(a)^2 in the other; a squashing one has log f'. Shaping f
alone would make the second output false.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from kgraph.nonlinear import Region

_ROUNDING = 1e-9
"""Relative; float64 values of a function on a grid that are an affine function of others to their last digits."""


def derivative_beside(region: Region) -> str:
    """The node that computes the derivative of a region, or its log, for other outputs than the region has; or ""."""
    others = [other for other in region.of_source if other is not region]
    if not others:
        return ""
    reached = _outputs(region.end)
    for other in others:
        if _outputs(other.end) != reached and _computes_derivative(other, region):
            return other.end.name
    return ""


def _outputs(node: fx.Node) -> frozenset[fx.Node]:
    """Which of the values that the model returns depend on ``node``."""
    last = next(iter(reversed(node.graph.nodes)))
    seen, queue = {node}, [node]
    while queue:
        fresh = [user for user in queue.pop().users if user not in seen]
        seen.update(fresh)
        queue += fresh
    return frozenset(seen & set(last.all_input_nodes))


def _computes_derivative(other: Region, region: Region) -> bool:
    """Whether g = a + b f' or a + b log|f'| on a half-line where f' is no constant and g no line."""
    right = torch.linspace(0.07, 3.0, 31, dtype=torch.float64)
    for u in (right, -right):
        values, slope = other.fn(u), _derivative(region, u)
        if _fits(values, u):
            continue
        if any(not _is_constant(basis) and _fits(values, basis) for basis in (slope, slope.abs().log())):
            return True
    return False


def _derivative(region: Region, u: Tensor) -> Tensor:
    with torch.enable_grad():
        point = u.clone().requires_grad_()
        value = region.fn(point)
        return torch.autograd.grad(value.sum(), point)[0] if value.requires_grad else torch.zeros_like(u)


def _is_constant(values: Tensor) -> bool:
    return not bool(values.isfinite().all()) or float(values.std()) <= _ROUNDING * (1 + float(values.abs().max()))


def _fits(values: Tensor, basis: Tensor) -> bool:
    """Whether ``values`` are an affine function of ``basis``; constants are one of everything."""
    y, x = values - values.mean(), basis - basis.mean()
    rest = y - x * (x @ y) / (x @ x)
    return bool(rest.norm() <= _ROUNDING * (1 + values.abs().max()) * len(y) ** 0.5)


__all__ = ["derivative_beside"]
