"""Weights that are not independent draws: few to a unit, rows that repeat, tables tied to heads. Said, not hidden."""

from __future__ import annotations

import pytest
import torch
from gaussian_weights import with_gaussian_weights
from torch import Tensor, nn

import kgraph
from kgraph.gram.rules.repeats import repeats

IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def how(model: nn.Module, x: Tensor = IMAGES) -> str:
    return kgraph.kernels(model, x, with_ntk=False).how


@pytest.mark.parametrize("width", [1, 2, 4, 32])
def test_groups_of_few_channels_are_assumed_to_be_gaussian(width: int) -> None:
    """E[y^4] / E[y^2]^2 = 3 (1 + 2 / weights) behind a sum of few products of Gaussians."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1, groups=64 // width), nn.Tanh(), nn.Flatten()]
    assert how(nn.Sequential(*layers)) == ("assumed" if width <= 4 else "quadrature")
    w, x = (torch.randn(200_000, width, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    y = (w * x).sum(1)
    kurtosis = float(y.pow(4).mean() / y.square().mean() ** 2)
    assert (kurtosis > 4.0) == (width <= 4)  # 3 for a Gaussian


def test_rows_that_repeat_are_told_where_channels_are_read_apart() -> None:
    """Equal pixels of a cell: their correlation is 1, not 0."""
    torch.manual_seed(0)
    layer = with_gaussian_weights(nn.Conv2d(3, 32, 3, padding=1))
    model = nn.Sequential(layer, nn.PixelShuffle(2), nn.AvgPool2d(2))
    assert how(model) == "exact"
    with torch.no_grad():
        layer.weight.copy_(layer.weight[::4].repeat_interleave(4, 0))
    assert how(model) == "assumed"
    assert how(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(32, 4, 1))) == "exact"  # all channels are summed up
    assert repeats(layer.weight) and not repeats(torch.zeros(4, 3)) and not repeats(torch.randn(64, 1))


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_a_head_that_is_the_table_of_tokens() -> None:
    """q of the logits of N(0, 1) rows is ((V - 1) d + d^2 + 2 d) / V: one of V is the token's own."""
    ids = torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(0))
    assert how(Tied(False), ids) == "exact"
    assert how(Tied(True), ids) == "assumed"
    rows = torch.randn(4000, 20, 16, generator=torch.Generator().manual_seed(1))
    measured = float((rows @ rows[:, 0, :, None]).square().mean())
    assert measured == pytest.approx((19 * 16 + 16**2 + 32) / 20, rel=0.05)
    assert measured > 1.5 * 16  # what independence would give
