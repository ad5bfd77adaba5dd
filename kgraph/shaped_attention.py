"""Attention that is a multiple of the identity at initialization."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kgraph.checks import finite
from kgraph.errors import InputError


class ShapedAttention(nn.Module):
    """Attention that starts as a multiple of the identity (value-skipinit, shaped attention).

        A' = alpha I + beta (A(X) - C),   C = A at zero logits under the same mask

    With zero query weights A(X) = C bit for bit, so at initialization A' = alpha I: q and c of the values
    pass unchanged through the layer. It costs a second attention call, for C. Attention dropout acts on A
    only, so with dropout in train mode A - C is zero at initialization in the mean only.

    Args:
        heads: number of heads; alpha and beta are learnable, one of each a head.
        alpha, beta: their initial values.

    Shapes: query, key, value [..., heads, length, features] as in ``scaled_dot_product_attention``, with as
        many queries as keys (self-attention) and as many value heads as query heads; same as value.
    Raises: InputError where the two lengths or the number of heads do not fit.
    Source: He et al. 2023, arXiv 2302.10322; Noci et al. 2023, arXiv 2306.17759.
    """

    def __init__(self, heads: int, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        if heads < 1:
            raise InputError(f"heads must be at least 1, got {heads}")
        self.alpha = nn.Parameter(torch.full((heads, 1, 1), finite("alpha", alpha)))
        self.beta = nn.Parameter(torch.full((heads, 1, 1), finite("beta", beta)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """``A' value``, arguments as those of ``scaled_dot_product_attention``."""
        heads = self.alpha.shape[0]
        if query.shape[-2] != value.shape[-2] or value.shape[-3] != heads:
            shapes = f"query {tuple(query.shape)} and value {tuple(value.shape)}"
            raise InputError(f"ShapedAttention of {heads} heads needs self-attention, got {shapes}")
        attend = functools.partial(
            F.scaled_dot_product_attention, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
        centre = attend(torch.zeros_like(query), key, value)
        change = attend(query, key, value, dropout_p=dropout_p if self.training else 0.0) - centre
        return (self.alpha * value + self.beta * change).to(value.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.alpha.shape[0]}"
