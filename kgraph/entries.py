"""Which entries a part holds: copies over positions, ranges of channels, other places of the same tensor.

Made once for the same part and the same move, so that sums recognize parts that are one and the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.how import How
from kgraph.kernel import SAME, Apply, Expr, Kernel, Mask, Part, Product, Samples, Sum
from kgraph.roots import Root, Roots

_rebuilt: weakref.WeakKeyDictionary[Part, dict[Hashable, Part]] = weakref.WeakKeyDictionary()


def once(part: Part, key: Hashable, make: Callable[[Part], Part]) -> Part:
    """``make(part)``, the same object for the same part and key: so that later sums recognize it."""
    known = _rebuilt.setdefault(part, {})
    if key not in known:
        known[key] = make(part)
    return known[key]


def rebuild(part: Part, key: Hashable, change: Callable[[Part], Part]) -> Part:
    """``change`` applied to the part and to every part that it is made of."""

    def rebuilt(part: Part) -> Part:
        result = change(replace(part, expr=_rebuilt_expression(part, key, change)))
        return result if part.factor is None else result.times(part.factor)

    return once(part, key, rebuilt)


def _rebuilt_expression(part: Part, key: Hashable, change: Callable[[Part], Part]) -> Expr:
    match part.expr:
        case Apply(fn, arg):
            return Apply(fn, rebuild(arg, key, change))
        case Sum(terms):
            return Sum(tuple((weight, rebuild(term, key, change)) for weight, term in terms))
        case Product(left, right):
            return Product(rebuild(left, key, change), rebuild(right, key, change))
        case _:
            return part.expr


def expand_positions(part: Part) -> Part:
    """The same value at every position (a gate of one position, broadcast): K_diff = K_same."""
    return rebuild(part, "expand", _expanded)


def _expanded(part: Part) -> Part:
    def same(field: Tensor) -> Tensor:
        return field[:, SAME : SAME + 1].expand(-1, 2)

    expr = part.expr
    if isinstance(expr, Samples):
        expr = replace(expr, second=expr.second[:, SAME : SAME + 1].expand(-1, 2, -1))
    elif isinstance(expr, Mask):
        expr = Mask(expr.keep, expr.height, same(expr.shared))
    return replace(part, cov=same(part.cov), slope=same(part.slope), ntk=same(part.ntk), expr=expr)


def slice_part(part: Part, low: int, high: int, label: str) -> Part:
    """Channels ``low:high``: the same law, of other random numbers than a disjoint range's."""

    def cut(piece: Part) -> Part:
        roots = Roots(Root(r.name, (*r.cuts, (label, low, high))) for r in piece.roots)
        expr = _other_draws(piece.expr, low) if isinstance(piece.expr, Samples) else piece.expr
        return replace(piece, size=high - low, roots=roots, expr=expr)

    return rebuild(part, ("slice", low, high, label), cut)


def _other_draws(known: Samples, seed: int) -> Samples:
    """The same draws in another order: what stands for one range of channels must not stand for the next as well."""
    order = torch.randperm(len(known.first), generator=torch.Generator().manual_seed(seed))
    return replace(known, first=known.first[order], second=known.second[..., order])


_origins: weakref.WeakKeyDictionary[Part, Part] = weakref.WeakKeyDictionary()


def moved(part: Part, label: str) -> Part:
    """The same entries at other places (rolled, flipped, transposed, a range of positions).

    The same law of the same weights, but no longer the same number at the same place: meeting the part it came
    from, it is neither independent nor one function with it.
    """
    result = rebuild(part, ("moved", label), replace)
    _origins.setdefault(result, origin(part))
    return result


def origin(part: Part) -> Part:
    """The part whose entries these are, wherever they stand."""
    return _origins.get(part, part)


def said(value: Kernel, how: How) -> Kernel:
    """The kernel with what is assumed; all that it remembers stays."""

    def with_how(part: Part) -> Part:
        result = replace(part, how=part.how | how)
        return result if part.factor is None else result.times(part.factor)

    return value.told(*(once(part, how, with_how) for part in value.parts))
