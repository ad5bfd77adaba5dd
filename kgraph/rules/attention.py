"""Softmax attention: exact where the attention is uniform, drawn on the real head shapes otherwise.

Uniform attention (queries or keys of zero) averages the values over all positions, so that every position holds the
same; causal attention averages over the first l positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.kernel import Kernel
from kgraph.rules.spatial import over_positions
from kgraph.rules.table import Context, rule


@rule(aten.scaled_dot_product_attention.default)
def attention(
    context: Context,
    query: Kernel | Tensor,
    key: Kernel | Tensor,
    value: Kernel | Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: object,
) -> Kernel:
    zero = any(isinstance(t, Kernel) and float(t.merged.q) == 0.0 for t in (query, key))
    if not (zero and isinstance(value, Kernel) and mask is None) or (dropout_p and context.mode == "train"):
        return context.sample()
    rows = torch.ones(context.shape[-2], value.shape[-2], dtype=torch.float64)
    rows = rows.tril() if is_causal else rows
    return over_positions(value.one(), [len(value.axes) - 2], [rows / rows.sum(1, keepdim=True)])
