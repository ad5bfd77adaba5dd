"""Gates written as one operation."""

from __future__ import annotations

import torch

from kgraph.canonical import aten
from kgraph.gram.rules.merge import combine, times
from kgraph.gram.rules.pointwise import apply_all
from kgraph.gram.rules.reindex import chunk
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import Value
from kgraph.maps import Pointwise

_SIGMOID = Pointwise(torch.sigmoid)


@rule(aten.glu.default)
def glu(context: Context, x: Value, dim: int = -1) -> Value:
    """``a sigmoid(b)`` of the two halves along a dimension."""
    value, gate = chunk(context, x, 2, dim)
    return combine(value, apply_all(_SIGMOID, gate), times)
