"""Softmax attention: exact where the attention is uniform, drawn on the real head shapes otherwise.

Uniform attention (queries or keys of zero) averages the values over all positions; causal attention averages
over the first l positions, so that one position in T is left as it was.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kgraph.canonical import aten
from kgraph.kernel import Kernel
from kgraph.rules.pool import average
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
    length = value.shape[-2]
    # causal: position l averages l of them; the harmonic mean of 1..T gives the mean of 1/l over positions
    window = length / sum(1 / (at + 1) for at in range(length)) if is_causal else float(length)
    return replace(value.one(), parts=(average(value.merged, window),))
