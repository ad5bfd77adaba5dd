"""Embeddings: rows are independent draws, so two different tokens have cosine 0 and a token with itself 1.

Probe pairs enter here: a pair of inputs with cosine c stands for embeddings with that cosine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.errors import RuleError
from kgraph.kernel import DIFF, SAME, Kernel, Part
from kgraph.roots import Root, Roots
from kgraph.rules.table import Context, rule
from kgraph.rules.weights import mean_square


@rule(aten.embedding.default)
def embedding(context: Context, weight: Tensor, ids: Tensor | Kernel, padding_idx: int = -1, *_: object) -> Kernel:
    if isinstance(ids, Kernel):  # computed from activations: two inputs have one row as often as their ids agree
        return context.sample()
    rows = token_rows(weight, padding_idx)
    q, mean = mean_square(rows), float(rows.detach().double().mean())
    c = context.pairs.inputs
    cov = torch.empty(len(c), 2, dtype=torch.float64)
    cov[:, SAME] = mean**2 + c * (q - mean**2)
    cov[:, DIFF] = mean**2
    slope = torch.zeros_like(cov)
    slope[:, SAME] = q - mean**2
    ntk = torch.zeros_like(cov)
    ntk[:, SAME] = c * (q if context.parametrization == "ntk" else 1.0) * context.speed("weight")
    size = weight.shape[1]
    part = Part(size, cov, slope, ntk, mean, Roots({Root(context.argument_name(0))}))
    positions = tuple((("b" if i == 0 else "p", n),) if n > 1 else () for i, n in enumerate(ids.shape))
    return Kernel((part,), (*positions, (("c", size),)))


@rule(aten.embedding_bag.padding_idx)
def embedding_bag(
    context: Context, weight: Tensor, ids: Tensor | Kernel, offsets: Tensor, _: bool = False, mode: int = 0, *rest: Any
) -> tuple[Kernel, None, None, None]:
    """Sum (mode 0) or mean (1) of the rows of n tokens, taken to differ: q - mean^2 grows by n, or falls by it."""
    if isinstance(ids, Kernel):
        hint = "Look the rows up in an nn.Embedding, and sum them"
        raise context.error("there is no rule for an embedding bag of tokens that are computed from activations", hint)
    weights, last_offset, padding_idx = (*rest[1:], None, False, None)[:3] if len(rest) < 4 else rest[1:4]
    if mode > 1 or weights is not None:
        what = "the maximum" if mode > 1 else "a weighted sum"
        raise RuleError(f"kgraph does not know {what} of an embedding bag", node=context.node.name)
    bags = len(offsets) - bool(last_offset)
    n = ids.numel() / max(bags, 1)
    one = embedding(context, weight, ids, -1 if padding_idx is None else padding_idx).parts[0]
    share, shift = (n, n) if mode == 0 else (1 / n, 1.0)
    cov = (one.cov - one.mean**2) * share + (one.mean * shift) ** 2
    part = replace(one, cov=cov, slope=one.slope * share, ntk=one.ntk * share, mean=one.mean * shift)
    axes = ((("b", bags),) if bags > 1 else (), (("c", weight.shape[1]),))
    return Kernel((part,), axes), None, None, None


def token_rows(table: Tensor, padding_idx: int = -1) -> Tensor:
    """The rows that stand for tokens: all but the padding's, which PyTorch makes zero."""
    if not 0 <= padding_idx < len(table) or len(table) == 1:
        return table
    return torch.cat([table[:padding_idx], table[padding_idx + 1 :]])
