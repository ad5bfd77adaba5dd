"""Attention: drawn where queries and keys decide, exact where they are zero."""

from __future__ import annotations

import pytest
import torch
from oracles import SEQUENCE, Body, Build, dense, disagreements
from torch import Tensor, nn
from torch.nn import functional

from kgraph.rules import table
from kgraph.rules.spatial import over_positions

relu = torch.relu
aten = torch.ops.aten


def heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 4, -1).transpose(1, 2)


def attention(gain: float = 1.5, **options) -> Build:
    """Self-attention of four heads whose weights have variance gain / width."""

    def body(qkv: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(*(heads(t) for t in qkv.chunk(3, -1)), **options)
        return out.transpose(1, 2).flatten(2)

    def build(width: int) -> nn.Module:
        layer = nn.Linear(width, 3 * width)
        nn.init.normal_(layer.weight, 0, (gain / width) ** 0.5)
        return Body(body, layer)

    return build


def uniform(*, causal: bool = False) -> Build:
    """Queries of zero."""

    def body(u: Tensor, q: nn.Module, v: nn.Module) -> Tensor:
        out = functional.scaled_dot_product_attention(heads(q(u)), heads(u), heads(v(relu(u))), is_causal=causal)
        return out.transpose(1, 2).flatten(2)

    def zero(width: int) -> nn.Module:
        layer = nn.Linear(width, width)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    return lambda width: Body(body, dense(width), zero(width), dense(width))


LAYERS = {
    "full": attention(),
    "causal": attention(is_causal=True),
    "masked": attention(attn_mask=torch.ones(8, 8).tril(2).bool()),
    "scaled to nothing": attention(scale=1e-9),
    "uniform": uniform(),
    "uniform, causal": uniform(causal=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(LAYERS[name], SEQUENCE) == []


@pytest.mark.parametrize("name", ["full", "causal"])
def test_uniform_attention_in_the_place_of_softmax_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(context, query, key, value, *_, **__):
        return over_positions(value.one(), [2], [torch.full((8, 8), 1 / 8, dtype=torch.float64)])

    monkeypatch.setitem(table._RULES, aten.scaled_dot_product_attention.default, wrong)
    assert disagreements(LAYERS[name], SEQUENCE)
