"""What an attack by strangers found in `kgraph.analyze`: no number that is wrong is called exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph

WIDTH = 96


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor, nn.Module, nn.Module], Tensor]) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.a, self.b)


def measured(run: Callable[[Tensor, nn.Module, nn.Module], Tensor], draws: int = 60) -> Tensor:
    """q of drawn networks, on inputs of mean square 1."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        x = torch.randn(8, WIDTH)
        with torch.no_grad():
            found.append(Net(run)(x / x.square().mean(1, keepdim=True).sqrt()).square().mean())
    return torch.stack(found)


def through(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


WRONG = {
    "positive weights": lambda x, a, b: through(b.weight.abs(), torch.relu(a(x))),
    "softmax of weights": lambda x, a, b: through(torch.softmax(30 * b.weight, -1), torch.relu(a(x))),
    "a symmetric weight twice": lambda x, a, b: through(
        a.weight + a.weight.t(), torch.relu(through(a.weight + a.weight.t(), x))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_counted_is_said(name: str) -> None:
    torch.manual_seed(0)
    row = kgraph.analyze(Net(WRONG[name]), torch.randn(2, WIDTH)).final
    q = measured(WRONG[name])
    assert abs(float(q.mean()) / row.q - 1) > 0.2  # the very number that must not be called exact
    assert row.how == "assumed" and "weight" in row.note


CROSSED = {
    "differences": lambda x, a, b: (a(x)[:, :16, None] - a(x)[:, None, :16]).flatten(1),
    "sums behind relu": lambda x, a, b: torch.relu(a(x)[:, :16, None] + a(x)[:, None, :16]).flatten(1),
    "pairs of two": lambda x, a, b: torch.relu(a(x)[:, :16, None] + b(x)[:, None, :16]).flatten(1),
    "bilinear pooling": lambda x, a, b: (torch.relu(a(x))[:, :16, None] * torch.relu(a(x))[:, None, :16]).flatten(1),
}


@pytest.mark.parametrize("name", CROSSED)
def test_a_tensor_against_itself_over_two_axes(name: str) -> None:
    torch.manual_seed(0)
    row = kgraph.analyze(Net(CROSSED[name]), torch.randn(2, WIDTH)).final
    q = measured(CROSSED[name], 200)
    error = float(row.note.removeprefix("+-")) if row.how == "sampled" and row.note else 0.0
    allowed = 4 * (error + float(q.std() / q.mean()) / 200**0.5) + 4 / WIDTH
    assert row.how == "assumed" or abs(float(q.mean()) / row.q - 1) < allowed, (row.how, row.q, float(q.mean()))


def test_an_ntk_that_draws_do_not_give_is_no_number() -> None:
    """W^T W x: its parameters' directions are not drawn, and 0 would be a lie."""
    torch.manual_seed(0)
    report = kgraph.analyze(Net(lambda x, a, b: through(a.weight.t(), torch.relu(a(x)))), torch.randn(2, WIDTH))
    assert report.final.how in ("sampled", "assumed")
    assert report.final.ntk != report.final.ntk
    assert report["linear"].ntk > 0
