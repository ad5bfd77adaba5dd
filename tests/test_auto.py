"""`method="auto"`: what is chosen, and that the result is that of the method named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class FeaturesAveraged(nn.Module):
    """A mean over channels pools no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).mean(1, keepdim=True))


IMAGES, VECTORS = torch.randn(2, 3, 8, 8), torch.randn(2, 8)
POOLED = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 4))
PLAIN = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
STRIDED = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 4, 3))


@pytest.mark.parametrize(
    ("model", "x", "method"),
    [
        (Averaged(), IMAGES, kgraph.DKS()),
        (POOLED, IMAGES, kgraph.DKS()),
        (PLAIN, VECTORS, kgraph.TAT()),
        (STRIDED, IMAGES, kgraph.TAT()),
        (FeaturesAveraged(), VECTORS, kgraph.TAT()),
    ],
)
def test_the_method_follows_from_the_graph(model: nn.Module, x: Tensor, method: kgraph.DKS | kgraph.TAT) -> None:
    chosen: Any = kgraph.transform(model, example_inputs=x)
    named: Any = kgraph.transform(model, method, x)
    assert chosen.kgraph.method == method and chosen.kgraph.ledger.changes == named.kgraph.ledger.changes
    assert any(line.startswith(f"method 'auto' is {type(method).__name__}") for line in chosen.kgraph.ledger.notes)
    assert not any("auto" in line for line in named.kgraph.ledger.notes)
    assert torch.equal(chosen.eval()(x), named.eval()(x))
    assert kgraph.shaping_targets(model, "auto", x) == kgraph.shaping_targets(model, method, x)


def test_auto_stands_alone() -> None:
    with pytest.raises(kgraph.InputError, match="Auto and EdgeOfChaos both set"):
        kgraph.transform(PLAIN, ["auto", "edge-of-chaos"], VECTORS)
