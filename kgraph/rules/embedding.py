"""Embeddings: rows are independent draws, so two different tokens have cosine 0 and a token with itself 1.

Probe pairs enter here: a pair of inputs with cosine c stands for embeddings with that cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.kernel import DIFF, SAME, Kernel, Part, Root
from kgraph.rules.linear import mean_square
from kgraph.rules.table import Context, rule


@rule(aten.embedding.default)
def embedding(context: Context, weight: Tensor, ids: Tensor, *_: object) -> Kernel:
    q, mean = mean_square(weight), float(weight.detach().double().mean())
    c = context.pairs.inputs
    cov = torch.empty(len(c), 2, dtype=torch.float64)
    cov[:, SAME] = mean**2 + c * (q - mean**2)
    cov[:, DIFF] = mean**2
    slope = torch.zeros_like(cov)
    slope[:, SAME] = q - mean**2
    ntk = torch.zeros_like(cov)
    ntk[:, SAME] = c * (q if context.parametrization == "ntk" else 1.0)
    size = weight.shape[1]
    part = Part(size, cov, slope, ntk, mean, frozenset({Root(context.argument_name(0))}))
    positions = tuple((("b" if i == 0 else "p", n),) if n > 1 else () for i, n in enumerate(ids.shape))
    return Kernel((part,), (*positions, (("c", size),)))
