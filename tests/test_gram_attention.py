"""Attention, and transformers' embeddings, against brute force.

The logits are sums over the channels of one head: its size is the width that the allowance is about.
"""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_weights import with_gaussian_weights
from gram_montecarlo import Case, Net, check_nngp, dense, sequences, tokens
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

import kgraph

HEADS, SIZE = 2, 256
EMBED = HEADS * SIZE


def split(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], HEADS, SIZE).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, EMBED)


def attention(kind: str, *, causal: bool = False) -> Net:
    """Embedded sequences, one attention, and the mean over positions. Kinds: fused, written, uniform, linear."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (split(t) for t in (m.q(y), m.k(y), m.v(y)))
        if kind == "fused":
            mixed = scaled_dot_product_attention(q, k, v, is_causal=causal)
        elif kind == "uniform":
            mixed = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1e-9)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(SIZE), -1) @ v
        return m.o(joined(mixed))[:, :2].mean(1)

    layers = {name: dense(EMBED, EMBED) for name in "qkvo"}
    return Net(forward, a=dense(6, EMBED), **layers)


def case(right: Net, wrong: Net, layers: int = 3) -> Case:
    return Case(lambda: right, lambda: wrong, sequences, layers, SIZE, 150)


def test_fused() -> None:
    check_nngp(case(attention("fused"), attention("uniform")))


def test_causal() -> None:
    check_nngp(case(attention("fused", causal=True), attention("fused")))


def test_written_out() -> None:
    check_nngp(case(attention("written"), attention("uniform")))


def test_queries_are_the_keys() -> None:
    """Tied: logits of a position with itself have a mean of sqrt(d) q; over small inputs it is not yet a maximum."""

    def net(tied: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = 0.2 * m.a(x)
            q, k, v = (split(t) for t in (m.q(y), (m.q if tied else m.k)(y), m.v(m.a(x))))
            return joined(scaled_dot_product_attention(q, k, v)).mean(1)

        return Net(forward, a=dense(6, EMBED, bias=False), **{n: dense(EMBED, EMBED, bias=False) for n in "qkv"})

    check_nngp(case(net(True), net(False), 2))


def test_multihead_attention() -> None:
    def net(right: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            return (m.mha(y, y, y, need_weights=False)[0] if right else m.o(m.v(y)))[:, :2].mean(1)

        layers = {"o": dense(EMBED, EMBED), "v": dense(EMBED, EMBED)}
        mha = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        return Net(forward, a=dense(6, EMBED), mha=mha, **layers)

    check_nngp(case(net(True), net(False)))


def test_residual_attention_and_norm() -> None:
    """x + attention(x), LayerNorm, relu, mean over positions."""

    def net(right: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            q, k, v = (split(m.q(y)), split(m.k(y)), split(m.v(y)))
            z = joined(scaled_dot_product_attention(q, k, v, scale=None if right else 1e-9))
            return relu(m.norm(y + m.o(z))).mean(1)

        layers = {name: dense(EMBED, EMBED) for name in "qkvo"}
        return Net(forward, a=dense(6, EMBED), norm=nn.LayerNorm(EMBED), **layers)

    check_nngp(case(net(True), net(False)))


def dropped(p: float, *, fused: bool = True) -> Net:
    """Attention weights dropped in training: one mask for an input, head, query and key."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (split(t) for t in (m.q(y), m.k(y), m.v(y)))
        if fused:
            mixed = scaled_dot_product_attention(q, k, v, dropout_p=p if m.training else 0.0)
        else:
            mixed = m.drop(torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(SIZE), -1)) @ v
        return m.o(joined(mixed))[:, :2].mean(1)

    layers = {name: dense(EMBED, EMBED) for name in "qkvo"}
    return Net(forward, a=dense(6, EMBED), drop=nn.Dropout(p), **layers)


@pytest.mark.parametrize("fused", [True, False])
def test_dropped_weights(fused: bool) -> None:
    right, wrong = (lambda: dropped(0.5, fused=fused)), (lambda: dropped(0.1, fused=fused))
    check_nngp(Case(right, wrong, sequences, 3, SIZE, 150, train=True))


def test_a_class_token_is_one_for_all_inputs() -> None:
    """As in a ViT: a parameter expanded over the batch in front of the patches, one projection for q, k and v."""

    def net(right: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            token = m.token.expand(len(y), -1, -1)
            y = torch.cat([token, y] if right else [y, y.mean(1, keepdim=True)], 1)
            q, k, v = m.qkv(y).reshape(len(y), -1, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
            return m.o(joined(scaled_dot_product_attention(q, k, v)))[:, 0]

        token = nn.Parameter(torch.randn(1, 1, EMBED, generator=torch.Generator().manual_seed(0)))
        return Net(forward, a=dense(6, EMBED), qkv=dense(EMBED, 3 * EMBED), o=dense(EMBED, EMBED), token=token)

    check_nngp(case(net(True), net(False)))


class Positions(nn.Module):
    """Token and position embeddings, LayerNorm, a linear layer."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(5, EMBED), nn.Embedding(4, EMBED)
        self.norm, self.out = nn.LayerNorm(EMBED), nn.Linear(EMBED, EMBED)
        self.positions = positions

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        if self.positions:
            x = x + self.place(torch.arange(ids.shape[1]))
        return relu(self.out(self.norm(x))).mean(1)


def test_embeddings() -> None:
    check_nngp(Case(lambda: Positions(True), lambda: Positions(False), tokens, 2, EMBED))


def self_attention(scale: float, *, shared: bool = True) -> Net:
    """Queries, keys and values are the embedded sequence itself, or (not ``shared``) the values another one."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.softmax(y @ y.transpose(1, 2) * scale, -1) @ (y if shared else m.v(x))

    return Net(forward, a=dense(6, EMBED, bias=False), v=dense(6, EMBED, bias=False)).double()


def test_logits_divided_by_their_width_are_known() -> None:
    """A = softmax(K) of one input's positions, and K' = A K A^T: nothing is drawn, whoever the values are."""
    x = sequences()
    model = self_attention(1 / EMBED)
    found = kgraph.kernels(model, x, with_ntk=False, positions="full")
    k = torch.einsum("aic,bjc->abij", x, x) / 6 * float(model.a.weight.detach().square().mean()) * 6
    a = torch.softmax(torch.stack([k[i, i] for i in range(len(x))]), -1)
    torch.testing.assert_close(found.nngp, torch.einsum("aik,abkl,bjl->abij", a, k, a))
    assert found.how == "exact"


def test_values_that_share_weights_with_logits_are_assumed_independent_of_them() -> None:
    """The number is that of values with weights of their own, and its row says so."""
    x = 0.3 * sequences()  # logits of a position with itself have a mean of sqrt(d) q
    own, borrowed = (kgraph.kernels(self_attention(EMBED**-0.5, shared=s), x, with_ntk=False) for s in (False, True))
    assert (own.how, borrowed.how) == ("sampled", "assumed")
    scale = float(own.nngp.diagonal(dim1=0, dim2=1).max())
    torch.testing.assert_close(borrowed.nngp, own.nngp, rtol=0, atol=0.05 * scale)


def test_a_known_matrix_over_positions() -> None:
    """Causal means by a buffer: K'(t, t') = sum M_ts M_t's' K(s, s')."""

    class Averaged(nn.Module):
        def __init__(self, trained: bool) -> None:
            super().__init__()
            matrix = torch.ones(4, 4, dtype=torch.float64).tril() / 4
            self.a = with_gaussian_weights(dense(6, EMBED, bias=False).double())
            if trained:
                self.matrix = nn.Parameter(matrix)
            else:
                self.register_buffer("matrix", matrix)

        def forward(self, x: Tensor) -> Tensor:
            return relu(self.matrix @ self.a(x))[:, -1]

    x = sequences()
    mean = x.mean(1)
    plain = nn.Sequential(dense(6, EMBED, bias=False).double(), nn.ReLU())
    model = Averaged(False)
    plain[0].load_state_dict(model.a.state_dict())
    found, expected = kgraph.kernels(model, x), kgraph.kernels(plain, mean)
    assert found.ntk is not None and expected.ntk is not None
    assert found.how == "exact"
    torch.testing.assert_close(found.nngp, expected.nngp)
    torch.testing.assert_close(found.ntk, expected.ntk)
    with pytest.raises(kgraph.errors.RuleError, match="the part of matrix in the NTK"):
        kgraph.ntk(Averaged(True), x)
    assert kgraph.kernels(Averaged(True), x, with_ntk=False).how == "assumed"
