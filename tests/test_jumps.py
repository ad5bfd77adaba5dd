"""Functions that jump: the slope at c = 1 is infinite, in every report, behind every rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kgraph


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u)


def network(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), Function(function), nn.Linear(64, 64, bias=False), nn.Tanh())


JUMPING: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda u: torch.round(8 * u),
    "comparison": lambda u: (u > 0.1).to(u.dtype),
    "hard threshold": lambda u: nn.functional.threshold(u, 0.3, 0.0),
    "hardshrink": nn.functional.hardshrink,
    "gate": lambda u: (u > 0.2) * torch.tanh(u),
    "residual": lambda u: torch.relu(u + torch.sign(u)),
    "where": lambda u: torch.where(u > 0.2, u, -u),
    "attended": lambda u: torch.softmax(torch.sign(u), -1),
}


@pytest.mark.parametrize("name", ["round", "comparison", "hard threshold", "hardshrink", "gate", "residual", "where"])
def test_the_slope_of_a_jump_is_infinite(name: str) -> None:
    report = kgraph.analyze(network(JUMPING[name]), torch.randn(2, 64))
    assert report.final.slope == math.inf
    assert report["linear"].slope == pytest.approx(report["linear"].slope) != math.inf
    assert math.isfinite(report.final.q) and math.isfinite(report.final.ntk)


def test_an_operation_that_is_drawn_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Function(JUMPING["attended"]))
    assert kgraph.analyze(model, torch.randn(2, 64)).final.slope == math.inf


def test_a_maximum_keeps_it() -> None:
    model = nn.Sequential(nn.Conv1d(64, 64, 1), Function(torch.sign), nn.MaxPool1d(2))
    report = kgraph.analyze(model, torch.randn(2, 64, 8))
    assert report.final.slope == math.inf


CONTINUOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu by hand": lambda u: (u > 0) * u,
    "steep": lambda u: torch.sigmoid(50 * u),
    "kink": nn.functional.softshrink,
    "out of reach": lambda u: u + (u > 40),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_kink_is_no_jump(name: str) -> None:
    assert math.isfinite(kgraph.analyze(network(CONTINUOUS[name]), torch.randn(2, 64)).final.slope)


class Shifted(nn.Module):
    """A leaky relu by hand of what is not Gaussian: drawn, with a comparison among the draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(256, 256), nn.Parameter(torch.randn(256))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.tanh(self.layer(x)) + self.shift
        return torch.where(v > 0, v, 0.1 * v)


def test_a_comparison_that_is_drawn_is_a_number() -> None:
    torch.manual_seed(0)
    model, x = Shifted(), torch.randn(64, 256)
    final = kgraph.analyze(model, x).final
    assert final.q == pytest.approx(float(model(x).detach().square().mean()), rel=4 * (2 / 256) ** 0.5)
    assert 0 < final.slope < 1  # tanh's and the leaky relu's slopes are below 1


def test_the_slope_grows_without_bound_in_networks() -> None:
    """(1 - c) / (1 - c_input) of sign is (2 / pi) acos(c_input) / (1 - c_input): 8.9 at .99, 28 at .999, by torch."""
    torch.manual_seed(0)
    weight, x, y = torch.randn(40_000, 64), torch.randn(64), torch.randn(64)
    x, y = x / x.norm(), y - (x @ y) / (x @ x) * x
    ratios = []
    for c in (0.99, 0.999):
        z = c * x + math.sqrt(1 - c * c) * y / y.norm()
        arrives = (torch.sign(weight @ x) * torch.sign(weight @ z)).mean()
        ratios.append(float(1 - arrives) / (1 - c))
    assert ratios[0] == pytest.approx(2 / math.pi * math.acos(0.99) / 0.01, rel=0.15)
    assert ratios[1] > 2 * ratios[0]


def test_reports_write_an_infinite_slope() -> None:
    report = kgraph.analyze(network(torch.sign), torch.randn(2, 64))
    assert "slope inf" in report.summary[2] and "torn apart" in report.summary[2]
    assert not any("merge" in flag.text or "collapse" in flag.text for row in report.rows for flag in row.flags)
    assert '"slope": "inf"' in report.to_json()
    assert "inf" in str(report)
    assert json.loads(report.to_json())


class Picked(nn.Module):
    """A function of two layers that has no rule of its own, between layers."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(64, 64) for _ in range(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.a(x), self.b(x)))


PICKED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "the largest half": (lambda a, b: torch.where(a >= a.topk(32)[0][..., -1:], a, 0.0), True),
    "above a threshold": (lambda a, b: torch.where(a > 0.5, a, torch.zeros_like(a)), True),
    "another's sign": (lambda a, b: a.masked_fill(b < 0, 0.0), True),
    "the larger, doubled": (lambda a, b: torch.where(a > b, a, 2 * b), True),
    "ranks": (lambda a, b: a.argsort().argsort().to(a.dtype), True),
    "the place of the largest": (lambda a, b: nn.functional.one_hot(a.argmax(-1), 64).to(a.dtype) * b, True),
    "another's order": (lambda a, b: b.gather(-1, a.sort(-1)[1]), True),
    "the larger": (lambda a, b: torch.where(a > b, a, b), False),
    "clamped": (lambda a, b: torch.where(a > 0.5, torch.full_like(a, 0.5), a), False),
    "its own order": (lambda a, b: a.gather(-1, a.sort(-1)[1]), False),
    "below the largest": (lambda a, b: a - a.max(-1, keepdim=True)[0], False),
}


@pytest.mark.parametrize("name", PICKED)
def test_drawn_functions_jump_or_not(name: str) -> None:
    """By the network itself: nearer inputs part by the root of what continuous functions do."""
    run, jump = PICKED[name]
    torch.manual_seed(0)
    net = Picked(run)
    row = kgraph.analyze(net, torch.randn(4, 64)).final
    changes = []
    with torch.no_grad():
        for shift in (1e-2, 1e-4):
            torch.manual_seed(1)
            x, direction = torch.randn(2, 4000, 64)
            net.double()
            changes.append((net((x + shift * direction).double()) - net(x.double())).square().mean())
    assert (float(changes[0] / changes[1]) < 1e3) == jump  # 1e2 or 1e4
    assert math.isinf(row.slope) == jump
