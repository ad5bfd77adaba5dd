"""Cosine classifiers, casts of constructors, and odd arguments: models and calls that strangers wrote."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph

WIDTH, INPUTS = 128, 32


class CosineHead(nn.Module):
    """Logits are features of unit length times the weight's rows, of unit length or not."""

    def __init__(self, unit_rows: bool, scaled: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(INPUTS, WIDTH, bias=False)
        self.rows = nn.Parameter(torch.randn(64, WIDTH))
        self.scale = nn.Parameter(torch.tensor(10.0)) if scaled else 1.0
        self.unit_rows = unit_rows

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(torch.relu(self.enter(x)), dim=-1)
        return self.scale * F.linear(features, F.normalize(self.rows, dim=-1) if self.unit_rows else self.rows)


def _white(rows: int) -> Tensor:
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(0))
    return x * (INPUTS**0.5 / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("method", ["tat", "dks"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("unit_rows", [True, False])
def test_cosine_classifiers(unit_rows: bool, scaled: bool, method: str) -> None:
    """Cosines stay cosines, E[y^2] = 1 / n, and that is no q = 1, which is said; of other rows q = 1 holds."""
    q, draws = 1 / WIDTH if unit_rows else 1.0, []
    for seed in range(4):
        shaped = kgraph.transform(CosineHead(unit_rows, scaled), method, torch.randn(2, INPUTS), seed=seed)
        draws.append(float(shaped(_white(500)).detach().square().mean()))
        assert math.isclose(shaped.kgraph.after.final.q, q, rel_tol=1e-6)
        assert (
            any(
                "q is not 1 at the output" in line and "size that a norm gave" in line
                for line in shaped.kgraph.ledger.unmet
            )
            == unit_rows
        )
    measured = torch.tensor(draws)
    assert abs(float(measured.mean()) - q) < q * 4 / WIDTH + 4 * float(measured.std()) / len(draws) ** 0.5
