"""Maps of positions as matrices of one axis: what position models that average over positions ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram.layout import NeedsFull, Run, by_input
from kgraph.gram.places import Gather, Insert, Mix, PlaceMap, Places, Relabel
from kgraph.gram.rows import Rows

Ops = tuple[PlaceMap | None, PlaceMap | None]


def matrix_of(op: Gather | Mix, size: int) -> Tensor:
    """The linear map of one axis of ``size`` positions, [outputs, size]."""
    if isinstance(op, Mix):
        return op.matrix.double()
    matrix = torch.zeros(len(op.index), size, dtype=torch.float64)
    inside = op.index >= 0
    matrix[torch.arange(len(op.index))[inside], op.index[inside]] = 1.0
    return matrix


def tap_matrix(run: Run, outputs: int, inputs: int) -> Tensor:
    """One tap along one axis: which output reads which input."""
    out, read = torch.arange(outputs)[run[0]], torch.arange(inputs)[run[1]]
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    matrix[out, read] = 1.0
    return matrix


def pair_of_matrices(ops: Ops, pu: Places, pv: Places) -> tuple[int, Tensor, Tensor, bool]:
    """Axis, the maps on either side (None: the identity), and whether the axis goes."""
    known = [op for op in ops if op is not None]
    axis, drop = known[0].axis, known[0].drop  # type: ignore[union-attr]
    if pu != pv or any((op.axis, op.drop) != (axis, drop) for op in known):  # type: ignore[union-attr]
        raise NeedsFull
    left, right = (torch.eye(pu[axis]).double() if op is None else matrix_of(op, pu[axis]) for op in ops)  # type: ignore[arg-type]
    if left.shape != right.shape:
        raise NeedsFull
    return axis, left, right, drop


def same_kind(ops: Ops) -> PlaceMap | None:
    """The op of both sides where it re-labels or copies; None where it is a map of one axis."""
    left, right = ops
    if not any(isinstance(op, (Relabel, Insert)) for op in ops):
        return None
    if left is None or right is None or not (left is right or left.same_as(right)):
        raise NeedsFull
    return left


def averages(rows: Rows, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Known tensors [N or 1, C, *places] at the rows' first and second input."""
    left, right = by_input(rows, rows.first, x), by_input(rows, rows.second, y)
    if left.shape[2:] != right.shape[2:]:
        raise NeedsFull
    return left, right
