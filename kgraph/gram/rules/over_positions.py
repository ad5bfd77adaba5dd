"""Layers over the positions, the same for every channel: the token mixing of an MLP-Mixer.

    y_t = sum_j W_tj u_j + b_t,    K'(t, t') = sum_jj' W_tj W_t'j' K(j, j') + b_t b_t'

One small W for all channels stays what it is however wide the model: the kernel is that for its actual values, and W is
a known map of positions. The gradient by W moves all channels together, means included, which a normalization behind
takes out again and no law of one channel shows: there is no NTK.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kgraph.gram.build import moved
from kgraph.gram.field import Field
from kgraph.gram.places import Mix
from kgraph.gram.rules.merge import as_known, combine, plus
from kgraph.gram.rules.table import Context
from kgraph.gram.value import Value, place_start, roles, single_place
from kgraph.how import assumed


def sums_positions(x: Value) -> bool:
    """Whether a layer over the last dimension sums positions and keeps channels."""
    return roles(x.axes[-1]) == {"p"} and any("c" in roles(axis) for axis in x.axes[:-1])


def position_layer(context: Context, x: Value, weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> Value:
    """``weight @ u + bias`` along the last dimension; ``weight`` [out, in].

    Raises:
        RuleError: the NTK is asked for.
    """
    context.refuse_ntk([names[0]], "a layer over positions")
    x = single_place(x, len(x.axes) - 1)
    op = Mix(place_start(x.axes, len(x.axes) - 1), weight.detach().double())

    def mapped(u: Field) -> Field:
        linear = moved(u, op)
        return replace(linear, how=linear.how | assumed(f"{names[0]} as it is"))

    result = x.each(mapped, (*x.axes[:-1], (("p", len(weight)),)), x.split)
    return result if bias is None else combine(result, as_known(context, bias, result, names[1]), plus)
