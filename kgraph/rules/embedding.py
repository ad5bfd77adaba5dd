"""Embeddings: rows are independent draws, so two different tokens have cosine 0 and a token with itself 1.

Probe pairs enter here: a pair of inputs with cosine c stands for embeddings with that cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.kernel import DIFF, SAME, Kernel, Part
from kgraph.roots import Root, Roots
from kgraph.rules.linear import mean_square
from kgraph.rules.table import Context, rule


@rule(aten.embedding.default)
def embedding(context: Context, weight: Tensor, ids: Tensor, padding_idx: int = -1, *_: object) -> Kernel:
    rows = token_rows(weight, padding_idx)
    q, mean = mean_square(rows), float(rows.detach().double().mean())
    c = context.pairs.inputs
    cov = torch.empty(len(c), 2, dtype=torch.float64)
    cov[:, SAME] = mean**2 + c * (q - mean**2)
    cov[:, DIFF] = mean**2
    slope = torch.zeros_like(cov)
    slope[:, SAME] = q - mean**2
    ntk = torch.zeros_like(cov)
    ntk[:, SAME] = c * (q if context.parametrization == "ntk" else 1.0)
    size = weight.shape[1]
    part = Part(size, cov, slope, ntk, mean, Roots({Root(context.argument_name(0))}))
    positions = tuple((("b" if i == 0 else "p", n),) if n > 1 else () for i, n in enumerate(ids.shape))
    return Kernel((part,), (*positions, (("c", size),)))


def token_rows(table: Tensor, padding_idx: int = -1) -> Tensor:
    """The rows that stand for tokens: all but the padding's, which PyTorch makes zero."""
    if not 0 <= padding_idx < len(table) or len(table) == 1:
        return table
    return torch.cat([table[:padding_idx], table[padding_idx + 1 :]])
