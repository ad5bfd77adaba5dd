"""What the sampled rule runs, counted: every operation once a batch of draws, equal points once, branches once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph import draws, fields
from kgraph.kernel import Apply, Gaussian, Pairs, Part, Product, Sum
from kgraph.maps import Pointwise
from kgraph.rules import runs
from kgraph.rules.sampled import Sampler

STEPS = 3
COSINES = (0.0, 0.5, 0.9)


class Ode(nn.Module):
    """Heun's method: one field, read twice a step."""

    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 16)
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(STEPS):
            first = self.field(x)
            x = x + (first + self.field(x + first / STEPS)) / (2 * STEPS)
        return self.head(x)


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Times that every region was run, by sampled node."""
    counts: dict[int, int] = {}
    execute, sample = Sampler._execute, Sampler.sample

    def counted(self: Sampler, *args: Any) -> Any:
        counts[len(counts) - 1] += 1
        return execute(self, *args)

    def sampled(self: Sampler, node: Any) -> Any:
        counts[len(counts)] = 0
        return sample(self, node)

    monkeypatch.setattr(Sampler, "_execute", counted)
    monkeypatch.setattr(Sampler, "sample", sampled)
    return counts


def test_all_draws_go_through_an_operation_together(executions: dict[int, int]) -> None:
    """A first run, one of the other points, one with the derivatives: for 16 draws of 7 points each."""
    kgraph.analyze(Ode(), torch.randn(2, 8))
    assert len(executions) > STEPS
    assert max(executions.values()) == 3


def test_together_and_one_by_one_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, executions: dict[int, int]
) -> None:
    model, x = Ode(), torch.randn(2, 8)
    together = kgraph.analyze(model, x).final
    executions.clear()
    monkeypatch.setattr(runs, "MOST_ENTRIES", 1)
    alone = kgraph.analyze(model, x).final
    # a draw runs three cosines, one point of the background and, for equal inputs give equal numbers, two derivatives
    assert max(executions.values()) <= 16 * (len(COSINES) + 1 + 2)
    for name in ("q", "c", "slope", "ntk"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), rel=1e-9, nan_ok=True)
    assert alone.note == together.note


def test_random_operations_are_run_one_by_one(executions: dict[int, int]) -> None:
    """Negative control: a mask belongs to an input, and one batch would draw it once for all."""
    kgraph.analyze(Ode(dropout=0.3), torch.randn(2, 8), mode="train")
    assert max(executions.values()) > 16 * len(COSINES)


def test_an_ode_agrees_with_networks_of_its_kind() -> None:
    """Networks drawn anew, by PyTorch alone: q and c at the output within four standard errors and 1/width."""
    width, networks = 128, 200
    found = []
    for _ in range(networks):
        a, b = torch.randn(2, 64, 8)
        with torch.no_grad():
            model = Ode(width).eval()
            one, two = model(a), model(0.5 * a + 0.75**0.5 * b)
        found.append(torch.stack([one.square().mean(), (one * two).mean()]))
    q, crossed = torch.stack(found).mean(0).tolist()
    error_q, error_k = (torch.stack(found).std(0) / networks**0.5).tolist()
    row = kgraph.analyze(Ode(width), torch.randn(2, 8)).final
    slack = 8 * q / width  # one field in six places
    assert row.q == pytest.approx(q, abs=4 * error_q + slack)
    assert row.c[1] * row.q == pytest.approx(crossed, abs=4 * error_k + slack)


def test_shared_branches_are_visited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """x <- x * tanh(x) + x, written out, has 3^n terms."""
    visits = 0
    inner = draws.made_of

    def counted(part: Part) -> tuple[Part, ...]:
        nonlocal visits
        visits += 1
        return inner(part)

    monkeypatch.setattr(draws, "made_of", counted)
    depth, cov = 12, torch.ones(len(Pairs().inputs), 2, dtype=torch.float64)
    leaf = Part(1, cov, cov, cov, expr=Gaussian())
    part = leaf
    for _ in range(depth):
        squashed = Part(1, cov, cov, cov, expr=Apply(Pointwise(torch.tanh), part))
        product = Part(1, cov, cov, cov, expr=Product(part, squashed))
        part = Part(1, cov, cov, cov, expr=Sum(((1.0, part), (0.1, product))))
    assert draws.leaves_of(part) == {leaf}
    assert visits <= 2 * 5 * depth
    draws.restart()


def test_equal_inputs_are_differentiated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input and itself: one derivative of a function for slope and NTK, at both sides; a pair apart takes two."""
    count, inner = 0, fields.value_and_derivative

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return inner(*args)

    monkeypatch.setattr(fields, "value_and_derivative", counted)
    q = torch.ones(len(Pairs().inputs), 2, dtype=torch.float64)
    q[:, 1] = 0.0
    q[0, 0] = 0.5
    leaf = Part(1, q, q, q, expr=Gaussian())
    squashed = Part(1, q, q, q, expr=Apply(Pointwise(torch.tanh), leaf))
    part = Part(1, q, q, q, expr=Product(squashed, Part(1, q, q, q, expr=Sum(((2.0, squashed), (0.5, leaf))))))
    drawn = fields.FieldDraws(0)
    rows = len(q)
    for name, row in (("slope", rows + Pairs.UNIT), ("ntk", rows + Pairs.SELF)):
        at_a, at_b = drawn.tangents(part, (4, 6), (False, False), name, row)
        assert at_a is at_b
    assert count == 1
    at_a, at_b = drawn.tangents(part, (4, 6), (False, False), "slope", 0)
    assert count == 2
    assert not torch.equal(at_a, at_b)
    u, (first, second) = torch.tanh, drawn.values(leaf, (4, 6), (False, False))
    direction = drawn.tangents(leaf, (4, 6), (False, False), "slope", 0)
    for tangent, at, along in ((at_a, first, direction[0]), (at_b, second[0], direction[1])):
        by_hand = (1 - u(at) ** 2) * (4 * u(at) + 0.5 * at) + 0.5 * u(at)
        torch.testing.assert_close(tangent, by_hand * along)
    draws.restart()


def test_several_draws_are_those_of_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and every part is visited once for all of them."""
    cov = torch.tensor([[1.0, 0.2], [1.0, 0.2], [0.4, 0.1]], dtype=torch.float64)
    leaf = Part(1, cov, cov, cov, expr=Gaussian())
    squashed = Part(1, cov, cov, cov, expr=Apply(Pointwise(torch.tanh), leaf))
    part = Part(1, cov, cov, cov, expr=Product(squashed, leaf))
    visits, inner = 0, fields.FieldDraws._draw

    def counted(*args: Any) -> Any:
        nonlocal visits
        visits += 1
        return inner(*args)

    monkeypatch.setattr(fields.FieldDraws, "_draw", counted)
    together = fields.FieldDraws(range(5))
    first, second = together.values(part, (5, 2, 3), (False, True, False))
    tangents = together.tangents(part, (5, 2, 3), (False, True, False), "ntk", 2)
    assert visits == 3
    for seed in range(5):
        alone = fields.FieldDraws(seed)
        own = alone.values(part, (2, 3), (True, False))
        assert torch.equal(own[0], first[seed])
        assert torch.equal(own[1], second[:, seed])
        for one, several in zip(alone.tangents(part, (2, 3), (True, False), "ntk", 2), tangents, strict=True):
            assert torch.equal(one, several[seed])
    draws.restart()
