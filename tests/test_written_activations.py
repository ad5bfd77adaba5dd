"""Activations written out with comparisons: one function each, never a Scale in one of its branches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kgraph

WIDTH = 64
LEAKY: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "masks": lambda y: y * (y > 0) + 0.1 * y * (y <= 0),
    "numbers": lambda y: y * (y > 0).float() + 0.1 * y * (y <= 0).float(),
    "lerp": lambda y: torch.lerp(0.1 * y, y, (y > 0).float()),
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda y: torch.where(y > 0, y, torch.expm1(y)),
    "two functions": lambda y: torch.where(y > 0, torch.tanh(y), torch.sin(y)),
    "chosen by another comparison": lambda y: torch.where((y > 0) & (y < 9), y, 0.05 * y * torch.sigmoid(y)),
}


class Net(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fn(self.second(self.fn(self.first(x)))))


@pytest.mark.parametrize("fn", LEAKY.values(), ids=LEAKY.keys())
@pytest.mark.parametrize("method", ["dks", "tat"])
def test_a_leaky_relu_is_one_however_it_is_written(fn: Callable[[Tensor], Tensor], method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    shaped = kgraph.transform(Net(fn), method, x)
    torch.manual_seed(0)
    plain = kgraph.transform(Net(nn.LeakyReLU(0.1)), method, x)
    assert shaped.kgraph.ledger.counts() == plain.kgraph.ledger.counts()
    assert not shaped.kgraph.ledger.unmet
    with torch.no_grad():
        torch.testing.assert_close(shaped(x), plain(x))
        assert float((shaped(x) + shaped(-x)).norm() / shaped(x).norm()) > 0.05  # no linear network


@pytest.mark.parametrize("fn", SMOOTH.values(), ids=SMOOTH.keys())
def test_two_branches_of_a_choice_are_shaped_as_one(fn: Callable[[Tensor], Tensor]) -> None:
    """C'(1) as finite differences of the emitted module have it: a jump between branches would make it large."""
    torch.manual_seed(0)
    shaped = kgraph.transform(Net(fn), "dks", torch.randn(4, WIDTH)).double()
    assert shaped.kgraph.ledger.counts()["shape activation"] == 2
    x, across = torch.randn(2, 512, WIDTH, dtype=torch.float64)
    angle = 1e-2
    with torch.no_grad():
        near, out = shaped(math.cos(angle) * x + math.sin(angle) * across), shaped(x)
    slope = float((near - out).square().mean() / out.square().mean() / (2 - 2 * math.cos(angle)))
    assert slope == pytest.approx(1.5, rel=0.35)  # of one draw at width 64


@pytest.mark.parametrize("method", ["dks", "tat"])
def test_a_function_that_jumps_is_left_and_said_to_be_unmet(method: str) -> None:
    model = nn.Sequential(*(m for _ in range(2) for m in (nn.Linear(16, 16), nn.Threshold(0.5, 0.0))), nn.Linear(16, 4))
    shaped = kgraph.transform(model, method, torch.randn(4, 16))
    assert sum("jumps" in line for line in shaped.kgraph.ledger.unmet) == 2


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.many(torch.relu(x)) if len(x) > 2 else self.few(x)


def test_a_forward_that_asks_for_the_batch_size_is_said_to_take_other_paths() -> None:
    x = torch.randn(3, 16)
    said = "of a batch of 1 the forward takes another path than of 3"
    assert said in kgraph.transform(ByBatch(), "dks", x).kgraph.ledger.unmet[0]
    assert said in str(kgraph.analyze(ByBatch(), x))
    with pytest.raises(kgraph.InputError, match="takes another path"):
        kgraph.kernels(ByBatch(), x)
