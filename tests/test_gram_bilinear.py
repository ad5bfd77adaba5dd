"""Bilinear layers and sums written with indices: closed forms, the same layers otherwise, plain Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import KGraphError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64)
GRAM = X @ X.T / 6
SEQUENCE = torch.randn(2, 5, 8, generator=GENERATOR, dtype=torch.float64)


class Pair(nn.Module):
    """a(x)^T W b(x), or of one layer with itself."""

    def __init__(self, shared: bool, written: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 48, bias=False)
        self.b = self.a if shared else nn.Linear(6, 48, bias=False)
        self.meet, self.written = nn.Bilinear(48, 48, 24), written

    def forward(self, x: Tensor) -> Tensor:
        if self.written:
            return torch.einsum("oij,ni,nj->no", self.meet.weight, self.a(x), self.b(x)) + self.meet.bias
        return self.meet(self.a(x), self.b(x))


def moment(p: Tensor) -> float:
    return float(p.detach().double().square().mean())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_bilinear_is_the_product_of_kernels(shared: bool, written: bool) -> None:
    """K' = sw2 K_a K_b + sb2; T' = n^2 K_a K_b + 1 + sw2 (T_a K_b + K_a T_b), also where both sides are one layer."""
    model = Pair(shared, written)
    found = kgraph.kernels(model, X)
    ka, kb = (6 * moment(layer.weight) * GRAM for layer in (model.a, model.b))
    sw2, sb2 = 48**2 * moment(model.meet.weight), moment(model.meet.bias)
    assert found.how == "exact"
    torch.testing.assert_close(found.nngp, sw2 * ka * kb + sb2, rtol=1e-12, atol=0)
    expected = 48**2 * ka * kb + 1 + sw2 * 6 * GRAM * (ka + kb)
    torch.testing.assert_close(found.ntk, expected, rtol=1e-12, atol=0)


def test_bilinear_against_the_finite_network() -> None:
    model, total = Pair(shared=True).double(), []
    for _ in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 1 / math.sqrt(p[0].numel()), generator=GENERATOR)
            y = model(X)
            total.append(y @ y.T / 24)
    mean, error = torch.stack(total).mean(0), torch.stack(total).std(0) / math.sqrt(40)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 / (p.square().mean().sqrt() * math.sqrt(p[0].numel())))
    found = kgraph.nngp(model, X)
    assert bool(((found - mean).abs() < 4 * error + 4 / 48 * found.diagonal().max()).all())
    assert not bool(((found.diagonal() / 2 - mean.diagonal()).abs() < 4 * error.diagonal()).all())


class Indexed(nn.Module):
    def __init__(self, forward: Callable[[Indexed, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(12, 8) / 3)
        self.heads = nn.Parameter(torch.randn(8, 4, 16) / 3)
        self.q, self.k, self.v = (nn.Linear(8, 64, bias=False) for _ in range(3))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _attention(m: Indexed, x: Tensor, indexed: bool) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    if indexed:
        a = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 4, -1)
        return torch.einsum("bhij,bhjd->bihd", a, v).flatten(2)
    return (torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v).transpose(1, 2).flatten(2)


SAME: dict[str, tuple[Callable[[Indexed, Tensor], Tensor], Callable[[Indexed, Tensor], Tensor]]] = {
    "linear": (lambda m, x: torch.einsum("bnd,od->bno", x, m.w), lambda m, x: x @ m.w.T),
    "weight first": (lambda m, x: torch.einsum("od,bnd->bno", m.w, x), lambda m, x: x @ m.w.T),
    "product": (
        lambda m, x: torch.einsum("bnd,bnd->bnd", m.q(x), m.k(x)),
        lambda m, x: m.q(x) * m.k(x),
    ),
    "attention": (lambda m, x: _attention(m, x, True), lambda m, x: _attention(m, x, False)),
}


@pytest.mark.parametrize("name", SAME)
def test_einsum_is_what_it_writes(name: str) -> None:
    indexed, plain = (Indexed(forward) for forward in SAME[name])
    kwargs = {"with_ntk": name != "attention", "seed": 1}
    found, expected = (kgraph.kernels(m, SEQUENCE, **kwargs) for m in (indexed, plain))
    torch.testing.assert_close(found.nngp, expected.nngp, rtol=1e-9, atol=0)
    if expected.ntk is not None:
        torch.testing.assert_close(found.ntk, expected.ntk, rtol=1e-9, atol=0)


def test_einsum_with_heads_in_the_weight() -> None:
    """d -> (h, e): a linear layer of fan-in 8; K' = 8 E[w^2] K, T' = 8 K."""
    model = Indexed(lambda m, x: torch.einsum("bnd,dhe->bhne", x, m.heads))
    found = kgraph.kernels(model, SEQUENCE[:, :1], positions="full")
    gram = (SEQUENCE[:, 0] @ SEQUENCE[:, 0].T) / 8
    torch.testing.assert_close(found.nngp.reshape(2, 2), 8 * moment(model.heads) * gram, rtol=1e-12, atol=0)
    assert found.ntk is not None
    torch.testing.assert_close(found.ntk.reshape(2, 2), 8 * gram, rtol=1e-12, atol=0)


def test_an_einsum_without_a_rule_is_named() -> None:
    model = Indexed(lambda m, x: torch.einsum("bnd,bme->bnmde", m.q(x)[..., :4], m.k(x)[..., :4]).flatten(1))
    with pytest.raises(KGraphError, match="einsum"):
        kgraph.nngp(model, SEQUENCE)
