"""Weights used twice, and rows that repeat: measured as they are, and never called exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph


class Tied(nn.Module):
    """Logits of a token by its own row: q = ((V - 1) d + d^2 + 2 d) / V for standard normal rows."""

    def __init__(self, words: int = 40, width: int = 64, *, tie: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        if tie:
            self.head.weight = self.table.weight
        else:
            nn.init.normal_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


IDS = torch.arange(12).reshape(2, 6)


def test_a_tied_head_is_not_exact() -> None:
    row = kgraph.analyze(Tied(), IDS).final
    assert row.how == "assumed"
    assert "tied" in row.note
    assert kgraph.analyze(Tied(tie=False), IDS).final.how == "exact"


@pytest.mark.parametrize("tie", [True, False])
def test_montecarlo_draws_ties_together(tie: bool) -> None:
    words, width = 40, 64
    found = kgraph.montecarlo(Tied(words, width, tie=tie), IDS, draws=64)
    last = list(found.nodes.values())[-1]
    right = ((words - 1) * width + width**2 + 2 * width) / words if tie else width
    assert abs(last.q - right) <= 4 * last.q_error + 0.06 * right, (last.q, right)
    assert abs(last.q - (width if tie else right)) > 8 * last.q_error or not tie


def icnr(layer: nn.Conv2d, cells: int) -> nn.Conv2d:
    with torch.no_grad():
        layer.weight.copy_(layer.weight[::cells].repeat_interleave(cells, 0))
    return layer


def test_rows_that_repeat_are_not_independent() -> None:
    """Neighbours of a cell have cosine 1 under ICNR; independent rows would give 0."""
    plain = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.PixelShuffle(2))
    repeated = nn.Sequential(icnr(nn.Conv2d(16, 64, 1, bias=False), 4), nn.PixelShuffle(2))
    with torch.no_grad():
        y = repeated(torch.randn(1, 16, 3, 3))
    torch.testing.assert_close(y[..., 0, 0], y[..., 1, 1])
    x = torch.randn(2, 16, 3, 3)
    assert kgraph.analyze(plain, x).final.how == "exact"
    row = kgraph.analyze(repeated, x).final
    assert row.how == "assumed"
    assert "repeat" in row.note


def test_zeros_and_meta_weights_do_not_count_as_repeated() -> None:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    assert kgraph.analyze(layer, torch.randn(2, 8)).final.how == "exact"
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    assert kgraph.analyze(model, torch.randn(2, 8, device="meta")).final.how == "exact"


class Chain(nn.Module):
    """One weight in every layer: "n" as it is, "t" transposed, and a tanh between two."""

    def __init__(self, ways: str, kind: str) -> None:
        super().__init__()
        self.ways, self.kind = ways, kind
        self.w = nn.Parameter(torch.randn(WIDE, WIDE, *(1, 1) * (kind == "conv")) * WIDE**-0.5)

    def layer(self, x: Tensor, turned: bool) -> Tensor:
        if self.kind == "conv":
            return (functional.conv_transpose2d if turned else functional.conv2d)(x, self.w)
        if self.kind == "einsum":
            return torch.einsum("bi,ij->bj" if turned else "bi,ji->bj", x, self.w)
        if self.kind == "matmul":
            return x @ (self.w if turned else self.w.T)
        return functional.linear(x, self.w.T if turned else self.w)

    def forward(self, x: Tensor) -> Tensor:
        for i, way in enumerate(self.ways):
            x = self.layer(torch.tanh(x) if i else x, way == "t")
        return x


WIDE = 96


@pytest.mark.parametrize("kind", ["linear", "matmul", "einsum", "conv"])
@pytest.mark.parametrize("ways", ["nt", "ntn", "tnt", "nntn"])
def test_a_weight_and_its_transpose_in_a_chain(ways: str, kind: str) -> None:
    """W^T tanh(W x) holds a multiple of x, and so on: with new weights in its place q is another."""
    torch.manual_seed(0)
    spread = (2, 2) * (kind == "conv")
    row = kgraph.analyze(Chain(ways, kind), torch.randn(2, WIDE, *spread)).final

    def q(tied: bool, draws: int = 40) -> tuple[float, float]:
        found = []
        for seed in range(draws):
            torch.manual_seed(seed)
            x = torch.randn(4, WIDE, *spread)
            models = [Chain(way, kind) for way in ways]
            for i, way in enumerate(ways):
                with torch.no_grad():
                    x = models[0 if tied else i].layer(torch.tanh(x) if i else x, way == "t")
            found.append(x.square().mean())
        drawn = torch.stack(found)
        return float(drawn.mean()), float(drawn.std()) / draws**0.5

    (right, error), (fresh, _) = q(True), q(False)
    assert row.how in ("sampled", "assumed")
    assert abs(row.q - right) <= 4 * error + 0.1 * right, (row.q, right, fresh)
    assert abs(row.q - fresh) > 0.15 * right, "what independent layers give"
