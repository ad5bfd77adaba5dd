"""Shares of layers in the NTK: closed forms, and the two ways to compute them against each other."""

from __future__ import annotations

import sys

import gram_reference as reference
import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.gram.options import Asked

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(fan_in: int, fan_out: int, std: float) -> nn.Module:
    spec = {"W_std": std, "b_std": None}
    return reference.set_moments(nn.Linear(fan_in, fan_out, bias=False), spec, fan_in)


def test_linear_chain_shares_alike_in_ntk_parametrization() -> None:
    """sw2 = 1 and no bias: every layer adds K to the NTK, so each of five has a fifth."""
    model = nn.Sequential(*(linear(6 if i == 0 else 32, 32, 1.0) for i in range(5)))
    report = kgraph.ntk_report(model, X, parametrization="ntk")
    assert [row.share for row in report.layers] == pytest.approx([0.2] * 5, abs=1e-14)
    assert [row.multiplier for row in report.layers] == pytest.approx([1.0] * 5, abs=1e-13)
    gram = X @ X.T / 6
    assert report.constant_share == pytest.approx(float(gram.mean() / gram.diagonal().mean()), rel=1e-13)


def test_growing_chain_in_standard_parametrization() -> None:
    """Layer l adds fan_in_l K_(l-1) prod of later sw2: 6 K for the first, 32 * 2^(l-1) K of the others over 2^(l-1)."""
    model = nn.Sequential(linear(6, 32, 2**0.5), linear(32, 32, 2**0.5), linear(32, 32, 2**0.5))
    expected = torch.tensor([6.0 * 4, 32.0 * 2 * 2, 32.0 * 4])
    report = kgraph.ntk_report(model, X)
    found = torch.tensor([row.share for row in report.layers])
    assert torch.allclose(found.double(), (expected / expected.sum()).double(), atol=1e-14)


def test_balanced_multipliers_balance() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    report = kgraph.ntk_report(model, X)
    factors = {row.layer: row.multiplier for row in report.layers}
    multipliers = {name: factors[name.rpartition(".")[0]] for name, _ in model.named_parameters()}
    balanced = kgraph.ntk_report(model, X, multipliers=multipliers)
    assert max(row.share for row in report.layers) > 0.4  # negative control: it was not balanced before
    assert [row.share for row in balanced.layers] == pytest.approx([1 / 3] * 3, rel=1e-9)
    assert float(balanced.ntk.diagonal().mean()) == pytest.approx(float(report.ntk.diagonal().mean()), rel=1e-9)


class Mixed(nn.Module):
    """A norm's gain in front of a nonlinearity, PReLU, a scaling vector; perhaps softmax attention."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.read, self.norm, self.act = nn.Linear(6, 16), nn.LayerNorm(16), nn.PReLU(16)
        self.branch, self.scale, self.out = nn.Linear(16, 16), nn.Parameter(torch.full((16,), 0.3)), nn.Linear(16, 2)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True) if attends else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(torch.tanh(self.norm(self.read(x))))
        h = self.scale * self.act(h.movedim(-1, 1)).movedim(1, -1)
        return self.out(h if self.attend is None else self.attend(h, h, h, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("attends", [False, True])
def test_tangents_of_layers_are_what_walks_of_their_own_give(attends: bool) -> None:
    """Also where draws stand between: the same random numbers serve every tangent. All add up to the NTK."""
    torch.manual_seed(0)
    model, x = Mixed(attends), torch.randn(2, 3, 6) if attends else torch.randn(3, 6)
    names = [name for name, _ in model.named_parameters()]
    whole = kgraph.kernels(model, x)
    assert whole.ntk is not None and (whole.how in ("sampled", "assumed")) == attends
    shares = {row.layer: row.share for row in kgraph.ntk_report(model, x).layers}
    for layer, share in shares.items():
        ntk = kgraph.ntk(model, x, multipliers={name: float(name.rpartition(".")[0] == layer) for name in names})
        assert share == pytest.approx(float(ntk.diagonal().mean() / whole.ntk.diagonal().mean()), rel=1e-9)
    assert all(share > 0 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1.0, rel=0.05 if attends else 1e-12)
    if attends:
        return
    knobs = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in names}
    total = kgraph.ntk(model, x, multipliers=knobs).diagonal().mean() / whole.ntk.diagonal().mean()
    slopes = torch.autograd.grad(total, list(knobs.values()))  # the NTK is linear in every multiplier
    for layer, share in shares.items():
        own = [slope for name, slope in zip(names, slopes, strict=True) if name.rpartition(".")[0] == layer]
        assert share == pytest.approx(float(torch.stack(own).sum()), rel=1e-9)


def test_layers_in_pieces_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    expected = kgraph.ntk_report(model, X)
    module = sys.modules["kgraph.layer_ntk"]
    monkeypatch.setattr(module, "bytes_of_a_row", lambda *_: Asked().memory_gib * 2**30 / (3 * len(X) ** 2))
    found = kgraph.ntk_report(model, X)
    assert [(row.layer, row.share) for row in found.layers] == [
        (row.layer, pytest.approx(row.share, rel=1e-13)) for row in expected.layers
    ]


def test_table_names_layers_and_spectrum() -> None:
    report = kgraph.ntk_report(nn.Sequential(linear(6, 8, 1.0), nn.ReLU(), linear(8, 8, 1.0)), X)
    text = str(report)
    assert "constant mode" in text and "condition number" in text and "%" in text
