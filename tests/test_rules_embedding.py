"""Embeddings: rows of a table, and what the table's own mean and padding row do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.rules import embedding

IDS = torch.randint(0, 400, (2, 6), generator=torch.Generator().manual_seed(0))


def language(mean: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Embedding(400, 256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    with torch.no_grad():
        model[0].weight.add_(mean)
    return model


def wrong_nodes(model: nn.Module) -> list[tuple[str, str, float, float, float]]:
    report = kgraph.analyze(model, IDS, mode="eval")
    return kgraph.montecarlo(model, IDS, mode="eval", draws=16).disagreements(report.analysis)


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_the_network_agrees(mean: float) -> None:
    assert wrong_nodes(language(mean)) == []


def test_a_table_without_its_mean_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language(0.7)
    measured = kgraph.montecarlo(model, IDS, mode="eval", draws=16)
    monkeypatch.setattr(embedding, "mean_square", lambda table: 1.0)
    assert measured.disagreements(kgraph.analyze(model, IDS, mode="eval").analysis)


def test_the_padding_row_is_no_token() -> None:
    table = nn.Embedding(5, 64, padding_idx=2)
    row = kgraph.analyze(nn.Sequential(table, nn.Identity()), torch.tensor([[0, 1, 3]])).nodes[-1]
    others: Tensor = table.weight[[0, 1, 3, 4]].detach().double()
    assert row.q == pytest.approx(float(others.square().mean()), rel=1e-12)


def test_two_tokens_have_the_cosine_of_the_probes() -> None:
    row = kgraph.analyze(nn.Sequential(nn.Embedding(4000, 64), nn.Identity()), torch.tensor([[0, 1, 3]])).nodes[-1]
    assert row.c == pytest.approx((0.0, 0.5, 0.9), abs=1e-3)
    assert row.how == "exact"
