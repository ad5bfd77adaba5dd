"""Channels that differ in variance: pruned and scaled rows, masks on both sides. A wrong mean of laws is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import kgraph
from kgraph.rules.weights import uneven_columns, uneven_rows

WIDTH = 96
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers without biases, and a function of the first one's outputs and a buffer between them."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], gain: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.between = between
        self.register_buffer("t", torch.linspace(0.0, 2.0, WIDTH))
        for layer in (self.a, self.b):
            nn.init.normal_(layer.weight, std=gain * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), self.t))

    def scaled(self, rows: bool, columns: bool) -> Two:
        with torch.no_grad():
            self.a.weight.mul_(self.t[:, None] if rows else 1.0)
            self.b.weight.mul_(self.t if columns else 1.0)
        return self


def q_of(make: Callable[[], nn.Module], draws: int = 60) -> tuple[float, float]:
    """E[y^2] over networks, and its standard error."""
    found = []
    with torch.no_grad():
        for seed in range(draws):
            torch.manual_seed(seed)
            found.append(make()(X / X.square().mean(1, keepdim=True).sqrt()).square().mean())
    drawn = torch.stack(found)
    return float(drawn.mean()), float(drawn.std()) / draws**0.5


def right(q: float, make: Callable[[], nn.Module]) -> bool:
    """Within four standard errors and 3 / width of what networks have."""
    measured, error = q_of(make)
    return abs(q - measured) <= 4 * error + 3 / WIDTH * measured


def tanh(h: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(4 * h)


def relu(h: Tensor, t: Tensor) -> Tensor:
    return functional.relu(h)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("between", [tanh, relu])
def test_rows_of_unequal_variance_are_said(between: Callable[..., Tensor], rows: bool, columns: bool) -> None:
    """With t_i in rows and columns of a relu network q is E[t^4] / 2 = 1.6, and E[t^2]^2 / 2 = .9 for alike ones."""
    torch.manual_seed(0)
    model = Two(between).scaled(rows, columns)
    final = kgraph.analyze(model, X).final
    assert (final.how == "assumed") == rows
    assert (kgraph.kernels(model, X, with_ntk=False).how == "assumed") == rows
    exact = right(final.q, lambda: Two(between).scaled(rows, columns))
    assert exact or rows
    assert not (exact and rows and columns == (between is relu))  # what the label is for


def test_pruned_units_are_said_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Tanh(), nn.Conv2d(64, 8, 1))
    x = torch.randn(2, 8, 5, 5)
    prune.remove(prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0), "weight")
    row = next(row for row in kgraph.analyze(model, x).nodes if row.name.startswith("conv"))
    assert row.how == "assumed"
    assert "pruned" in row.note
    prune.random_unstructured(model[2], "weight", 0.5)
    assert not uneven_rows(model[2].weight)  # any entries: units stay alike
    assert not uneven_columns(model[2].weight)


@pytest.mark.parametrize("shape", [(512, 9), (64, 3), (16, 256), (300, 300), (10, 128), (2048, 2), (4, 2)])
@pytest.mark.parametrize("law", ["normal", "uniform", "sparse", "heavy", "orthogonal", "repeated"])
def test_draws_are_even(shape: tuple[int, int], law: str) -> None:
    """Six standard deviations, however few the entries and however heavy their tails."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        w = torch.randn(shape, generator=generator)
        if law == "uniform":
            w = torch.rand(shape, generator=generator) - 0.5
        elif law == "sparse":
            w *= torch.rand(shape, generator=generator) < 0.1
        elif law == "heavy":
            w = w.pow(3)
        elif law == "orthogonal":
            w = torch.linalg.qr(w if shape[0] >= shape[1] else w.T)[0]
        elif law == "repeated":
            w = w[: -(-len(w) // 4)].repeat_interleave(4, 0)
        assert not uneven_rows(w)
        assert not uneven_columns(w)


def test_what_counts_as_uneven() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(64, 48, generator=generator)
    assert uneven_rows(w * torch.linspace(0.2, 1.8, 64)[:, None])
    assert uneven_rows(w * (torch.arange(64) < 48)[:, None])
    assert uneven_columns(w * torch.linspace(0.2, 1.8, 48))
    assert not uneven_rows(w * torch.linspace(0.2, 1.8, 48))
    assert not uneven_rows(w * torch.linspace(0.98, 1.02, 64)[:, None])  # no number of a report shows it
    for empty in (torch.zeros(4, 4), torch.ones(1, 5), torch.randn(9), torch.empty(4, 4, device="meta")):
        assert not uneven_rows(empty)
    assert not uneven_rows(torch.ones(1).expand(8, 8))


MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a gain before and behind": lambda h, t: torch.tanh(h * t) * t,
    "a gain and its complement": lambda h, t: functional.relu(h * (t > 1)) * (t <= 1),
    "a shift, then a gain": lambda h, t: (functional.relu(h) + t) * t,
    "a choice, then a gain": lambda h, t: torch.where(t > 1, torch.tanh(h), 0.0) * t,
    "thresholds, then a gain": lambda h, t: torch.maximum(h, t) * t,
    "two terms of a mean": lambda h, t: functional.relu(h) * t + torch.sigmoid(h).square() * t.square(),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_one_buffer_that_is_read_twice(name: str) -> None:
    """The same channels meet: E[g h] and not E[g] E[h]."""
    torch.manual_seed(0)
    model = Two(MEETINGS[name])
    final = kgraph.analyze(model, X).final
    assert final.how == "assumed" or right(final.q, lambda: Two(MEETINGS[name]))
    found = kgraph.kernels(model, X / X.square().mean(1, keepdim=True).sqrt(), with_ntk=False)
    assert found.how == "assumed" or right(float(found.nngp.diagonal().mean()), lambda: Two(MEETINGS[name]))


@pytest.mark.parametrize("name", ["a gain before and behind", "a gain and its complement", "a choice, then a gain"])
def test_kernels_meet_channel_by_channel(name: str) -> None:
    torch.manual_seed(0)
    found = kgraph.kernels(Two(MEETINGS[name]), X / X.square().mean(1, keepdim=True).sqrt(), with_ntk=False)
    assert found.how == "sampled"
    assert right(float(found.nngp.diagonal().mean()), lambda: Two(MEETINGS[name]))


def test_a_buffer_that_is_read_once_stays_exact() -> None:
    torch.manual_seed(0)
    model = Two(lambda h, t: functional.relu(h) * t)
    final = kgraph.analyze(model, X).final
    assert final.how == "exact"
    assert right(final.q, lambda: Two(lambda h, t: functional.relu(h) * t))
    assert kgraph.kernels(model, X, with_ntk=False).how == "exact"


def test_a_gain_in_front_of_unequal_columns_is_said() -> None:
    """E[t^4] / 2 = 1.6 here too, where one of the two makes E[t^2] / 2 = .67."""
    torch.manual_seed(0)
    model = Two(lambda h, t: functional.relu(h) * t).scaled(rows=False, columns=True)
    assert kgraph.analyze(model, X).final.how == "assumed"
    assert kgraph.kernels(model, X, with_ntk=False).how == "assumed"
