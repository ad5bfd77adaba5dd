"""Shares of layers in the NTK: closed forms, and the two ways to compute them against each other."""

from __future__ import annotations

import gram_reference as reference
import pytest
import torch
from torch import nn

import kgraph
from kgraph.capture import capture
from kgraph.ntk_report import _parts_by_gradient, _parts_by_runs

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


def test_gradient_and_single_runs_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 2),
    )
    x = torch.randn(2, 3, 4, 4)
    graph = capture(model, x)
    names = dict.fromkeys((name for name, _ in graph.module.named_parameters()), 1.0)

    def run(multipliers: object) -> kgraph.Kernels:
        return kgraph.kernels(graph, x, multipliers=multipliers)

    by_gradient = _parts_by_gradient(run, names)
    by_runs = _parts_by_runs(run, names)
    assert by_gradient == pytest.approx(by_runs, rel=1e-9, abs=1e-15)
    assert all(part > 0 for part in by_gradient.values())


def test_table_names_layers_and_spectrum() -> None:
    report = kgraph.ntk_report(nn.Sequential(linear(6, 8, 1.0), nn.ReLU(), linear(8, 8, 1.0)), X)
    text = str(report)
    assert "constant mode" in text and "condition number" in text and "%" in text
