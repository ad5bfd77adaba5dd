"""Weights whose rows are not independent of one another: what reads channels apart is told that some are alike.

Sub-pixel upsampling is often started with equal rows (ICNR, Aitken et al. 2017, arXiv 1707.02937), so that the pixels
of a cell are one number; a layer that sums over all channels does not see it, for its own weights are independent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kgraph.gram.align import CHANNELS, DRAWN_CHANNELS
from kgraph.gram.field import Field, Grouped, Known, ZeroSums
from kgraph.gram.rules.table import Context, parameters_behind
from kgraph.gram.value import Value
from kgraph.how import EXACT, How, assumed
from kgraph.rules.weights import UNEVEN_COLUMNS, assumed_of, off_centre, sums_to_zero, uneven_columns, uneven_rows


def warned(context: Context, x: Value) -> Value:
    """The same, called "assumed" where rows of the weight behind it repeat."""
    return x.each(lambda u: _warned(context, u), x.axes, x.split)


def draws_of(context: Context, name: str, weight: Tensor, u: Field) -> How:
    """What is taken for granted when the weight [out, ...] of a layer on ``u`` counts as draws about zero."""
    node = context.named.get(name)
    declared = name in context.variances
    uneven = not declared and context.measured(uneven_rows, name, weight)
    own = EXACT if declared else assumed_of(node, context.measured(off_centre, name, weight), uneven)
    if own is EXACT and not declared and _read_apart(u) and context.measured(uneven_columns, name, weight):
        own = UNEVEN_COLUMNS
    fixed = node is not None and not parameters_behind(context, node)
    return own | assumed(f"the buffer {name} as independent draws of its own variance") if fixed else own


def zero_sums_of(context: Context, name: str, units: Tensor) -> ZeroSums | None:
    """What is known of a weight [units, ...] whose units sum to 0; None of others, and of declared variances."""
    if name in context.variances or not context.measured(sums_to_zero, name, units):
        return None
    node = context.named.get(name)
    return ZeroSums(units[0].numel(), node is not None and node.op == "get_attr")


def _read_apart(u: Field) -> bool:
    """Whether channels of a field differ in law: known ones, ranges of several, or known tensors went in."""
    return isinstance(u, (Known, Grouped)) or not u.roots.isdisjoint({CHANNELS, DRAWN_CHANNELS})


def _warned(context: Context, u: Field) -> Field:
    repeating = [name for name in sorted(u.names) if _repeats(context, name)]
    if not repeating:
        return u
    return replace(u, how=u.how | assumed(f"channels apart as independent, though rows of {repeating[0]} repeat"))


def _repeats(context: Context, name: str) -> bool:
    known = context.engine.repeats
    if name not in known:
        parameters = dict(context.module.named_parameters(remove_duplicate=False))
        known[name] = name in parameters and repeats(parameters[name].detach())
    return known[name]


def repeats(weight: Tensor) -> bool:
    """Whether some rows of a weight are equal, and not zero."""
    if weight.ndim < 2 or len(weight) < 2:
        return False
    rows = weight.flatten(1)
    rows = rows[rows.any(1)]
    first = rows[:, 0].sort().values
    if not bool((first[1:] == first[:-1]).any()):
        return False
    return len(torch.unique(rows, dim=0)) < len(rows)
