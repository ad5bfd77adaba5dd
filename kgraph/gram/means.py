"""First moments of fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram.attention import attended_mean, scores_mean
from kgraph.gram.field import Field
from kgraph.gram.places import Places, apply
from kgraph.maps import Pointwise
from kgraph.maps.quadrature import line_rule, value_and_slope

if TYPE_CHECKING:
    from kgraph.gram.engine import Engine


def shaped(mean: Tensor, places: Places) -> Tensor:
    """A mean as [N or 1, *places]."""
    return mean.reshape(1, *(1 for _ in places)).expand(1, *places) if mean.ndim == 0 else mean


def mean_of(engine: Engine, u: Field) -> Tensor:
    """E[u] from how the field is made; measured where no formula holds."""
    match u:
        case f.Known(data=data):
            return data.mean(1)
        case f.Affine(layer=layer):
            return torch.tensor(layer.bias_mean, dtype=torch.float64)
        case f.Leaf(mean=mean):
            return torch.tensor(mean, dtype=torch.float64)
        case f.Sliced(arg=arg) | f.Masked(arg=arg):
            return engine.mean(arg)
        case f.Moved(arg=arg, op=op):
            return apply(op, shaped(engine.mean(arg), arg.places), 1, arg.places)
        case f.Located(arg=arg, gain=gain, shift=shift):
            return shaped(engine.mean(arg), arg.places) * gain + shift
        case f.Folded(arg=arg, axes=axes):
            return shaped(engine.mean(arg), arg.places).mean(tuple(1 + a for a in axes))
        case f.Sum(terms=terms):
            total = torch.zeros((), dtype=torch.float64)
            for weight, term in terms:
                total = total + weight * engine.mean(term)
            return total
        case f.Joined(args=args, axis=axis):
            wide = [shaped(engine.mean(arg), arg.places) for arg in args]
            count = max(len(x) for x in wide)
            return torch.cat([x.expand(count, *x.shape[1:]) for x in wide], 1 + axis)
        case f.Grouped(args=args):
            total = sum(size for size, _ in args)
            return sum((size / total * engine.mean(a) for size, a in args), torch.zeros((), dtype=torch.float64))
        case f.Product(left=left, right=right) if left.independent(right):
            return engine.mean(left) * engine.mean(right)
        case f.Crossed(left=left, right=right):
            return engine.mean(left) * engine.mean(right)
        case f.Mapped(fn=fn, arg=arg) if arg.gaussian:
            shift = float(engine.mean(arg).reshape(-1)[0])
            return centred(fn, shift).mean(engine.variance(arg))
        case f.Scores():
            return scores_mean(engine, u)
        case f.Attended():
            return attended_mean(engine, u)
    return engine.draws.mean(u)


_centred: dict[tuple[Pointwise, float], Pointwise] = {}


def centred(fn: Pointwise, shift: float) -> Pointwise:
    """``u -> fn(u + shift)``; made once."""
    if shift == 0.0:
        return fn
    if (fn, shift) not in _centred:
        _centred[fn, shift] = fn.affine(input_shift=shift)
    return _centred[fn, shift]


def mean_slope(fn: Pointwise, q: Tensor) -> Tensor:
    """``E[fn'(z)]`` for z ~ N(0, q)."""
    flat = q.reshape(-1)
    plan = fn.plan(float(flat.max()), flat.device)
    root = flat.sqrt()
    x, weight = line_rule(plan, root)
    _, slope = value_and_slope(fn.fn, root[:, None] * x)
    return (weight * slope).sum(-1).reshape(q.shape)
