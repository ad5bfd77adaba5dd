"""Means and sums over dimensions: of positions, of channels, of tensors side by side.

The channels of a layer are independent draws of one law, so that of n of them

    E[mean v_a mean v_b] = m^2 + (K - m^2) / n        (slope and NTK: divided by n)

exactly. Channels that other operations have made (copies, positions laid out as channels) may depend on each other,
and are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from kgraph import algebra
from kgraph.alignment import aligned
from kgraph.canonical import aten, operation_name
from kgraph.kernel import Gaussian, Kernel, Part, Unknown
from kgraph.roots import Roots
from kgraph.rules.pointwise import COPIES, is_pointwise
from kgraph.rules.spatial import over_positions
from kgraph.rules.table import Context, rule

_FRESH = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding")
_KEPT = ("transpose", "permute", "t", "dropout")


@rule(aten.mean.dim, aten.sum.dim_IntList)
def mean(context: Context, x: Kernel, dim: Sequence[int] | int | None, keepdim: bool = False, **_: object) -> Kernel:
    if not isinstance(x, Kernel) or dim is None:
        return context.sample()
    dims = sorted({d % len(x.axes) for d in (dim if isinstance(dim, Sequence) else [dim])})
    averages = context.node.target is aten.mean.dim
    if x.joined is not None and dims == [x.joined[0]] and all(piece.shape[dims[0]] == 1 for piece in x.joined[1]):
        total = _of_joined(x.joined[1], averages)
        return context.sample() if total is None else _without(total, [] if keepdim else dims)
    by_role = {role: [d for d in dims if any(own == role for own, _ in x.axes[d])] for role in "bcp"}
    if by_role["b"] or set(by_role["c"]) & set(by_role["p"]):
        return context.sample()
    if by_role["c"] and not _independent_channels(context.node.args[0], x, by_role["c"]):
        return context.sample()
    places = [d for d in dims if d not in by_role["c"]]
    rows = [torch.full((1, x.shape[d]), 1 / x.shape[d] if averages else 1.0, dtype=torch.float64) for d in places]
    result = over_positions(x, places, rows) if places else x
    if by_role["c"]:
        result = _over_channels(result, by_role["c"], averages)
    return _without(result, [] if keepdim else dims)


def _without(x: Kernel, dims: Sequence[int]) -> Kernel:
    split = x.split if x.split is None else x.split - sum(d < x.split for d in dims)
    return Kernel(x.parts, tuple(axis for d, axis in enumerate(x.axes) if d not in dims), split)


def _of_joined(pieces: tuple[Kernel, ...], averages: bool) -> Kernel | None:
    """The sum of tensors that were stacked; None where only draws would tell."""
    weight = 1 / len(pieces) if averages else 1.0
    total = pieces[0].with_parts(*(algebra.scale(part, weight) for part in pieces[0].parts))
    for piece in pieces[1:]:
        pairs, axes, split = aligned(total, piece)
        if any(algebra.entangled(left, right) for left, right in pairs):
            return None
        parts = tuple(algebra.add(left, right, 1.0, weight) for left, right in pairs)
        total = Kernel(parts, axes, split if len(parts) > 1 else None)
    return total


def _independent_channels(source: object, x: Kernel, dims: Sequence[int]) -> bool:
    """Whether all channels go, and are draws of their own: made by layers, and moved and shaped since."""
    kept = [role for d, axis in enumerate(x.axes) if d not in dims for role, _ in axis]
    if "c" in kept or any(role != "c" for d in dims for role, _ in x.axes[d]):
        return False
    if any(not one.independent(two) for i, one in enumerate(x.parts) for two in x.parts[i + 1 :]):
        return False
    return isinstance(source, fx.Node) and _made_by_layers(source)


def _made_by_layers(source: fx.Node) -> bool:
    queue, seen = [source], {source}
    while queue:
        node = queue.pop()
        name = operation_name(node)
        if name in _FRESH or node.op == "get_attr":
            continue
        if name not in _KEPT and node.target not in COPIES and not is_pointwise(node.target):
            return False
        queue += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return True


def _over_channels(x: Kernel, dims: Sequence[int], averages: bool) -> Kernel:
    count = sum(part.size for part in x.parts)
    weight = 1 / count if averages else 1.0
    mean = weight * sum(part.size * part.mean for part in x.parts)

    def total(name: str, centred: bool) -> torch.Tensor:
        terms = [part.size * (getattr(part, name) - centred * part.mean**2) for part in x.parts]
        return weight**2 * torch.stack(terms).sum(0) + centred * mean**2

    law = Gaussian() if all(part.gaussian for part in x.parts) else Unknown("Gaussian after averaging channels")
    part = Part(
        size=1,
        cov=total("cov", True),
        slope=total("slope", False),
        ntk=total("ntk", False),
        mean=mean,
        roots=Roots.union(part.roots for part in x.parts),
        expr=law,
        how=x.how,
    )
    axes = tuple(() if d in dims else axis for d, axis in enumerate(x.axes))
    return replace(x, parts=(part,), axes=axes, split=None)
