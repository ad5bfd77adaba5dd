"""Measurements on finite networks: what they say of themselves, and what they allow for finite width."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import kgraph
from kgraph.monte_carlo import MonteCarlo


def chain(width: int, inputs: int = 64) -> nn.Module:
    """Layers of tanh, which bend the kernel (a relu would keep the mean of q at every width)."""
    sizes = [inputs, width, width, 32]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, 0, (2 / layer.in_features) ** 0.5)
    return nn.Sequential(*layers[:-1])


def measured(model: nn.Module, *shape: int, draws: int = 16) -> tuple[MonteCarlo, kgraph.report.Report]:
    example = torch.randn(2, *shape)
    report = kgraph.analyze(model, example, mode="eval")
    return kgraph.montecarlo(model, example, mode="eval", draws=draws), report


def test_fluctuations_fall_with_the_width() -> None:
    """2 / width behind one Gaussian layer of inputs with a fixed q."""
    for width in (64, 256):
        found, _ = measured(chain(width), 64)
        assert found["linear"].fluctuation == pytest.approx(2 / width, rel=0.5)
        assert found["linear"].width == width


def test_nothing_is_allowed_behind_linear_layers_alone() -> None:
    found, report = measured(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 8)
    assert set(found.allowances(report.analysis).values()) == {0.0}
    assert found.disagreements(report.analysis) == []


def test_the_allowance_covers_what_width_does_and_falls_with_it() -> None:
    found, report = measured(chain(8), 64, draws=64)
    assert found.disagreements(report.analysis) == []
    assert max(found.allowances(report.analysis).values()) > 0.1
    wide, of_wide = measured(chain(512), 64)
    assert max(wide.allowances(of_wide.analysis).values()) < 0.02


def test_few_input_channels_do_not_hide_a_wrong_rule() -> None:
    """Three channels of fixed q: their number bounds no allowance."""
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 1))
    found, report = measured(model, 3, 8, 8)
    assert found.disagreements(report.analysis) == []
    rows = tuple(replace(row, q=1.3 * row.q) if row.op == "conv2d" else row for row in report.nodes)
    assert found.disagreements(replace(report.analysis, nodes=rows))


def test_channels_are_found_in_every_layout() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 24, 1), nn.LayerNorm(24), nn.Linear(24, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    found, _ = measured(Last(), 3, 6, 6, draws=2)
    assert [node.width for node in found.nodes.values()] == [3, 24, 24, 24, 40, 40]


def test_a_table_of_embeddings_keeps_its_mean() -> None:
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.add_(0.5)
    before = model[0].weight.detach().clone()
    found = kgraph.montecarlo(model, torch.randint(0, 300, (2, 4)), mode="eval", draws=4)
    assert found["embedding"].c[0] == pytest.approx(0.25 / 1.25, abs=0.02)
    assert torch.equal(before, model[0].weight)
