"""Embeddings: rows of a table, and what the table's own mean and padding row do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import RuleError
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


class Chosen(nn.Module):
    """Rows of a table that activations choose: the largest of them, the nearest row, or a level of each."""

    def __init__(self, by: str, width: int = 64) -> None:
        super().__init__()
        self.by, self.layer, self.table = by, nn.Linear(width, width, bias=False), nn.Embedding(width, width)
        nn.init.normal_(self.layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.by == "largest":
            return self.table(h.argmax(-1))
        if self.by == "row of a matrix":
            return self.table.weight[h.argmin(-1)]
        if self.by == "nearest, straight through":
            nearest = self.table(torch.cdist(h, self.table.weight).argmin(-1))
            return h + (nearest - h).detach()
        return self.table((h > 0).long()[:, :8].cumsum(1)[:, -1])  # how many of eight are positive


@pytest.mark.parametrize("by", ["largest", "row of a matrix", "nearest, straight through", "a count"])
def test_rows_that_activations_choose(by: str) -> None:
    """c is the chance that two inputs choose one row, which falls like the root of 1 - c: not the inputs' cosine."""
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    row = kgraph.analyze(Chosen(by), x).final
    assert row.how == "assumed"
    assert "table" in row.note
    assert not math.isfinite(row.slope)  # distances have no derivative of this kind at all
    agree = []
    with torch.no_grad():
        for seed in range(40):
            torch.manual_seed(seed)
            one, other = torch.randn(2, 50, 64)
            model, near = Chosen(by), 0.9 * one + 0.19**0.5 * other
            a, b = model(one), model(near)
            agree.append((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
    drawn = torch.stack(agree)
    right, error = float(drawn.mean()), float(drawn.std()) / len(drawn) ** 0.5
    assert row.c[2] == pytest.approx(right, abs=4 * error + 0.12)  # of the rows of one table
    assert by == "a count" or right < 0.78, "and not .9"
    with pytest.raises(RuleError):
        kgraph.kernels(Chosen(by), x, with_ntk=False)


def test_a_bag_of_rows_that_activations_choose_is_refused() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.table((x > 0).long())

    for call in (kgraph.analyze, kgraph.kernels):
        with pytest.raises(RuleError, match="activations"):
            call(Bag(), torch.randn(2, 6))
