"""Words of a summary about language models: norms set q, and logits have a first loss."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph


class Language(nn.Module):
    """A table of small rows, a norm, layers, and a head that is (or is not) followed by more."""

    def __init__(self, spread: float, norm: bool, gain: float) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 500, bias=False)
        self.norm = nn.LayerNorm(64) if norm else nn.Identity()
        nn.init.normal_(self.table.weight, std=spread)
        nn.init.normal_(self.head.weight, std=gain / 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.layer(self.norm(self.table(ids))))))


IDS = torch.arange(12).reshape(2, 6)


def test_a_norm_behind_a_small_embedding_is_no_explosion() -> None:
    report = kgraph.analyze(Language(0.01, True, 1.0), IDS)
    assert "explodes" not in report.summary[1]
    assert "norms set it" in report.summary[1]
    assert not report.flagged("explodes")


def test_an_explosion_behind_the_norm_is_one() -> None:
    """Negative control: a head of gain 60 makes q 3600 behind norms that have set it to 1."""
    report = kgraph.analyze(Language(0.01, True, 60.0), IDS)
    assert "explodes" in report.summary[1]
    assert report.flagged("explodes")


@pytest.mark.parametrize("gain", [0.5, 1.2])
def test_the_first_loss_is_that_of_networks(gain: float) -> None:
    torch.manual_seed(0)
    losses = []
    for seed in range(30):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits = Language(0.02, True, gain)(IDS).flatten(0, 1)
        losses.append(functional.cross_entropy(logits, torch.randint(0, 500, (len(logits),))))
    line = kgraph.analyze(Language(0.02, True, gain), IDS).summary[1]
    found = re.search(r"first loss of about ([\d.]+) \(log V = ([\d.]+)\)", line)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(torch.stack(losses).mean()), abs=0.15)
    assert float(found[2]) == pytest.approx(math.log(500), abs=0.01)


def test_classes_are_no_vocabulary() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 100))
    assert "log V" not in kgraph.analyze(model, torch.randn(2, 16)).summary[1]
