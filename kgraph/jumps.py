"""Functions that jump (sign, step, round, comparisons): two inputs part where they fall on two sides of the jump.

With a jump of height h at k and inputs of correlation c the second moments fall by h^2 P(k lies between), which goes
like the root of 1 - c: the slope at c = 1 is infinite, although the derivative is 0 almost everywhere. The NTK is that
of training, which knows the derivative alone.
"""

from __future__ import annotations

import math
import weakref

import torch

from kgraph.kernel import SAME, Apply, Pairs, Part, made_of
from kgraph.maps import Pointwise

_REACH = 6.0
"""Standard deviations within which a jump counts."""
_STEP = 1e-9
_HEIGHT = 1e-6
_steep: weakref.WeakKeyDictionary[Part, bool] = weakref.WeakKeyDictionary()


def jumps(fn: Pointwise, mean: float, deviation: float) -> bool:
    """Whether ``fn`` jumps within reach of a Gaussian; one with a closed form is continuous."""
    if fn.closed is not None or deviation <= 0 or not math.isfinite(deviation):
        return False
    kinks = fn.kinks(abs(mean) + _REACH * deviation)
    kinks = kinks[(kinks - mean).abs() < _REACH * deviation]
    if not len(kinks):
        return False
    step = _STEP * (kinks.abs() + deviation)
    places = mean + deviation * torch.linspace(-3, 3, 13, dtype=torch.float64)
    with torch.no_grad():
        below, above, usual = (fn(z).double() for z in (kinks - step, kinks + step, places))
    return bool(((above - below).abs() > _HEIGHT * usual.abs().max()).any())


def steep(part: Part) -> bool:
    """Whether the part, or anything it is made of, jumps where two inputs differ."""
    queue, order = [part], []
    while queue:  # not by recursion: a residual network's sums are nested as deeply as it is
        one = queue.pop()
        if one not in _steep:
            order.append(one)
            queue += [inner for inner in made_of(one) if inner not in _steep]
    for one in reversed(order):
        _steep[one] = _jumps_itself(one) or any(_steep.get(inner, False) for inner in made_of(one))
    return _steep[part]


def _jumps_itself(part: Part) -> bool:
    if not isinstance(part.expr, Apply) or float(part.expr.arg.slope[Pairs.UNIT, SAME]) == 0:
        return False
    arg = part.expr.arg
    variance = float(arg.q) - arg.mean**2
    return jumps(part.expr.fn, arg.mean, math.sqrt(max(variance, 0.0)))
