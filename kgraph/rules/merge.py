"""Where tensors meet: sums, weighted sums, products, concatenations; and constants met on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kgraph import algebra
from kgraph.alignment import aligned
from kgraph.canonical import aten, operation_name
from kgraph.constants import add_constant, known_part, moments, multiply_constant
from kgraph.entries import origin, said
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Axes, Kernel, Part, merge
from kgraph.maps.tangent import TrainedFactor
from kgraph.modules import WeightedSum
from kgraph.rules.pointwise import unary
from kgraph.rules.table import Context, rule
from kgraph.rules.weights import one_number

Operand = Kernel | Tensor | float | int
_LEFT = 1e-8
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_STEPS = 6
_CANCELLED = assumed("its terms cancel, and what is left at finite width is not what is left in the limit")
"""x minus its own norm: with q = 1 eps is all that is left of it, less than the noise of statistics of C channels."""


@rule(aten.add.Tensor, aten.add.Scalar)
def add(context: Context, x: Operand, y: Operand, alpha: float = 1.0) -> Kernel:
    return _sum(context, x, y, 1.0, float(alpha))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(context: Context, x: Operand, y: Operand, alpha: float = 1.0) -> Kernel:
    return _sum(context, x, y, 1.0, -float(alpha))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(context: Context, x: Operand, y: Operand, alpha: float = 1.0) -> Kernel:
    return _sum(context, x, y, -float(alpha), 1.0)


@rule(aten.neg.default)
def neg(context: Context, x: Kernel) -> Kernel:
    return x.with_parts(*(algebra.scale(part, -1.0) for part in x.parts))


@rule(aten.lerp.Scalar)
def lerp(context: Context, x: Operand, y: Operand, weight: float) -> Kernel:
    """``(1 - w) x + w y``."""
    return _sum(context, x, y, 1.0 - float(weight), float(weight))


@rule(WeightedSum)
def weighted_sum(context: Context, module: WeightedSum, *terms: Kernel) -> Kernel:
    total, weight = terms[0], module.weights[0]
    for term, term_weight in zip(terms[1:], module.weights[1:], strict=True):
        total, weight = _sum(context, total, term, weight, term_weight), 1.0
    return total


def _sum(context: Context, x: Operand, y: Operand, wx: float, wy: float) -> Kernel:
    if isinstance(x, Kernel) and isinstance(y, Kernel):
        total = _pairwise(context, x, y, lambda u, v: algebra.add(u, v, wx, wy))
        terms = wx**2 * float(x.merged.q) + wy**2 * float(y.merged.q)
        left = 1 / total.merged.size if _behind_a_norm(context.node) else _LEFT
        return said(total, _CANCELLED) if 0 < float(total.merged.q) < left * terms else total
    if isinstance(x, Kernel):
        return _trained(context, 1, y, wy, add_constant(_scaled(x, wx), y, wy, _name(context, 1)))
    assert isinstance(y, Kernel)
    return _trained(context, 0, x, wx, add_constant(_scaled(y, wy), x, wx, _name(context, 0)))


def _behind_a_norm(node: fx.Node) -> bool:
    """Whether a norm is among the last few operations before a node."""
    stage = {node}
    for _ in range(_STEPS):
        stage = {before for n in stage for before in n.all_input_nodes}
        if any(operation_name(n) in _NORMS for n in stage):
            return True
    return False


def _trained(
    context: Context, index: int, known: object, weight: float, result: Kernel, read: Kernel | None = None
) -> Kernel:
    """A parameter used entry by entry has its own part in the NTK: 1 where it is added, K where it is a factor.

    Where it has positions, those have parameters of their own.
    """
    if not isinstance(known, Tensor) or not known.is_floating_point() or known.is_meta:
        return result
    own = context.speed(index) * weight**2
    if own == 0 or len(result.parts) != len(read.parts if read is not None else result.parts):
        return result
    own *= 1.0 if context.parametrization == "standard" else float(known.detach().double().square().mean())
    wide = [1] * (len(result.axes) - known.ndim) + list(known.shape)
    places = any(size > 1 and role == "p" for size, axis in zip(wide, result.axes, strict=True) for role, _ in axis)
    parts = []
    for i, part in enumerate(result.parts):
        gained = own * (read.parts[i].cov if read is not None else torch.ones_like(part.cov))
        if places:
            gained = torch.stack([gained[:, SAME], torch.zeros_like(gained[:, DIFF])], 1)
        moved = algebra.trained(part, gained, of_itself=read is not None)
        factor = one_number(known) if read is not None and part.gaussian and not places else None
        parts.append(moved.times(TrainedFactor(own / factor**2, 0.0)) if factor and moved is not part else moved)
    return result.with_parts(*parts)


def _scaled(x: Kernel, factor: float) -> Kernel:
    return x.with_parts(*(algebra.scale(part, factor) for part in x.parts))


def _name(context: Context, index: int) -> str:
    return context.argument_name(index)


def _crossed(x: Kernel, y: Kernel) -> bool:
    """Whether each is repeated along a dimension of the other's: u_i - u_j, where pairs that share an index differ."""
    sizes = [(_size(a), _size(b)) for a, b in zip(x.axes[::-1], y.axes[::-1], strict=False)]
    return any(a > b for a, b in sizes) and any(a < b for a, b in sizes)


def _size(axis: tuple[tuple[str, int], ...]) -> int:
    return math.prod(size for _, size in axis)


def _pairwise(context: Context, x: Kernel, y: Kernel, combine: Any) -> Kernel:
    pairs, axes, split = aligned(x, y)
    if _crossed(x, y) or any(algebra.entangled(left, right) for left, right in pairs):
        return context.sample()
    parts = tuple(combine(left, right) for left, right in pairs)
    return Kernel(parts, axes, split if len(parts) > 1 else None)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(context: Context, x: Operand, y: Operand) -> Kernel:
    if isinstance(x, Kernel) and isinstance(y, Kernel):
        return _pairwise(context, x, y, algebra.multiply)
    if isinstance(x, Kernel):
        return _trained(context, 1, y, 1.0, multiply_constant(x, y), x)
    assert isinstance(y, Kernel)
    return _trained(context, 0, x, 1.0, multiply_constant(y, x), y)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(context: Context, x: Operand, y: Operand) -> Kernel:
    if isinstance(x, Kernel) and not isinstance(y, Kernel):
        return multiply_constant(x, 1.0 / y)
    if isinstance(y, Kernel) and isinstance(x, (int, float)):
        return unary(context, aten.div.Tensor, (torch.tensor(float(x), dtype=torch.float64), y), {})
    return context.sample()


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(context: Context, condition: Operand, x: Operand, y: Operand) -> Kernel:
    one, other = (float(o) if isinstance(o, Tensor) and o.numel() == 1 else o for o in (x, y))
    if isinstance(condition, Kernel) and _drawn_apart(condition, one, other):
        taken, rest = mul(context, condition, one), mul(context, rsub(context, condition, 1.0), other)
        return taken if other == 0 else rest if one == 0 else add(context, taken, rest)
    return _entrywise(context, lambda c, one, other: torch.where(c.bool(), one, other.to(one)), condition, x, y)


def _drawn_apart(condition: Kernel, *chosen: Operand) -> bool:
    """Whether a choice is by random numbers of its own, between tensors or numbers."""
    tensors = [o for o in chosen if isinstance(o, Kernel)]
    own = all(condition.merged.independent(other.merged) for other in tensors)
    return own and len(tensors) > 0 and not any(isinstance(o, Tensor) for o in chosen)


@rule(
    *(aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default, aten.max.other, aten.min.other),
    *(aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor),
    *(aten.hypot.default, aten.atan2.default, aten.logaddexp.default),
)
def of_two(context: Context, x: Operand, y: Operand) -> Kernel:
    return _entrywise(context, context.node.target, x, y)  # type: ignore[arg-type]


def _entrywise(context: Context, fn: Callable[..., Tensor], *operands: Operand) -> Kernel:
    """One function where all operands are functions of one tensor (or numbers); else drawn."""
    kernels = [operand for operand in operands if isinstance(operand, Kernel)]
    numbers = all(isinstance(o, Kernel) or not isinstance(o, Tensor) or o.numel() == 1 for o in operands)
    if not numbers or any(k.axes != kernels[0].axes or len(k.parts) != len(kernels[0].parts) for k in kernels):
        return context.sample()

    def combined(*fields: Tensor) -> Tensor:
        found = iter(fields)
        return fn(*(next(found) if isinstance(o, Kernel) else torch.as_tensor(o) for o in operands))

    parts = [algebra.joint_function(group, combined) for group in zip(*(k.parts for k in kernels), strict=True)]
    known = [part for part in parts if part is not None]
    return kernels[0].with_parts(*known) if len(known) == len(parts) else context.sample()


@rule(aten.cat.default, aten.concat.default)
def cat(context: Context, tensors: list[Kernel | Tensor], dim: int = 0) -> Kernel:
    dim %= len(context.shape)
    like = next(t for t in tensors if isinstance(t, Kernel))
    kernels = [t if isinstance(t, Kernel) else _known(context, t, like, i) for i, t in enumerate(tensors)]
    roles = {role for kernel in kernels for role, _ in kernel.axes[dim]}
    if roles <= {"c"} or (not roles and _channel_dim(kernels[0]) in (dim, None)):
        return _cat_channels(kernels, dim)
    return _cat_positions(kernels, dim)


def _known(context: Context, tensor: Tensor, like: Kernel, index: int) -> Kernel:
    """A known tensor (a class token) as a kernel of its own, laid out like its neighbour; a trained one moves."""
    axes = tuple(
        ((axis[0][0] if axis else "p", size),) if size > 1 else ()
        for axis, size in zip(like.axes, tensor.shape, strict=True)
    )
    part = known_part(like.merged, moments(tensor, axes), f"{context.node.name}.{index}")
    listed: Any = context.node.args[0]
    own = context.speed(listed[index]) if isinstance(listed[index], fx.Node) else 0.0
    if own == 0 or tensor.is_meta:
        return Kernel((part,), axes)
    own *= 1.0 if context.parametrization == "standard" else float(tensor.detach().double().square().mean())
    return Kernel((algebra.trained(part, own * torch.tensor([1.0, 0.0]).expand_as(part.cov), of_itself=False),), axes)


def _channel_dim(kernel: Kernel) -> int | None:
    return next((i for i, axis in enumerate(kernel.axes) for role, _ in axis if role == "c"), None)


def _cat_channels(kernels: list[Kernel], dim: int) -> Kernel:
    parts: list[Part] = []
    for kernel in kernels:
        own = kernel.parts if kernel.split in (dim, None) else (kernel.merged,)
        size = kernel.shape[dim]
        parts += [replace(own[0], size=size)] if len(own) == 1 else list(own)
    total = sum(kernel.shape[dim] for kernel in kernels)
    axes = tuple((("c", total),) if i == dim else axis for i, axis in enumerate(kernels[0].axes))
    return Kernel(tuple(parts), axes, dim if len(parts) > 1 else None)


def _cat_positions(kernels: list[Kernel], dim: int) -> Kernel:
    """Positions of several tensors side by side: the average over positions, and over pairs of them."""
    counts = [kernel.positions for kernel in kernels]
    total = sum(kernel.shape[dim] for kernel in kernels)
    axes = tuple((("p", total),) if i == dim else axis for i, axis in enumerate(kernels[0].axes))
    whole = [kernel.merged for kernel in kernels]
    parts = [replace(part, size=count) for part, count in zip(whole, counts, strict=True)]
    mixed = merge(tuple(parts))
    crossed = _crossings(whole)
    fields = {name: _across(parts, crossed, name) for name in ("cov", "slope", "ntk")}
    how = max((mixed.how, *(part.how for part in crossed.values())), key=lambda how: (how.level, how.error))
    source = origin(whole[0])
    law = whole[0].expr if all(origin(part) is source for part in whole) else mixed.expr
    result = Kernel((replace(mixed, size=whole[0].size, expr=law, how=how, **fields),), axes)
    return result.of_joined(dim, tuple(kernels))


def _crossings(parts: list[Part]) -> dict[tuple[int, int], Part]:
    """Parts whose kernel is E[u_i v_j] of two concatenated tensors, by pair; independent ones have only their means."""
    result: dict[tuple[int, int], Part] = {}
    for one, two in itertools.combinations(range(len(parts)), 2):
        u, v = parts[one], parts[two]
        if u.independent(v):
            continue
        if origin(u) is origin(v) and u is not v:  # other places of one tensor
            places = {name: getattr(u, name)[:, DIFF:].expand(-1, 2) for name in ("cov", "slope", "ntk")}
            result[one, two] = replace(u, **places)
        else:
            total = algebra.add(u, v)
            half = {n: (getattr(total, n) - getattr(u, n) - getattr(v, n)) / 2 for n in ("cov", "slope", "ntk")}
            result[one, two] = replace(total, **half)
    return result


def _across(parts: list[Part], crossed: dict[tuple[int, int], Part], name: str) -> Tensor:
    """Average over the positions of all tensors, and over pairs of them; ``size`` counts positions here."""
    total = sum(part.size for part in parts)
    field = torch.zeros_like(getattr(parts[0], name))
    pairs = max(total * (total - 1), 1)
    for part in parts:
        own = getattr(part, name)
        field[:, SAME] += own[:, SAME] * part.size / total
        field[:, DIFF] += own[:, DIFF] * part.size * (part.size - 1) / pairs
    for one, two in itertools.combinations(range(len(parts)), 2):
        u, v = parts[one], parts[two]
        both = 2 * u.size * v.size / pairs
        if (one, two) in crossed:
            own, most = getattr(crossed[one, two], name), max(u.size, v.size)
            field[:, DIFF] += both * (own[:, SAME] / most + own[:, DIFF] * (1 - 1 / most))
        elif name == "cov":  # independent, but their means are not zero
            field[:, DIFF] += both * u.mean * v.mean
    return field


@rule(aten.stack.default)
def stack(context: Context, tensors: list[Kernel | Tensor], dim: int = 0) -> Kernel:
    kernels = [t for t in tensors if isinstance(t, Kernel)]
    if len(kernels) != len(tensors):
        return context.sample()
    dim %= len(context.shape)
    widened: list[Kernel] = []
    for kernel in kernels:
        axes: Axes = (*kernel.axes[:dim], (), *kernel.axes[dim:])
        split = kernel.split if kernel.split is None or kernel.split < dim else kernel.split + 1
        widened.append(Kernel(kernel.parts, axes, split))
    return _cat_positions(widened, dim)
