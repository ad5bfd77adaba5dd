"""What is said of a plan: met by what the graph affords, the reason where it is not, and what rests on assumptions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph

WIDTH = 64


class Block(nn.Module):
    """Post-activation relu(x + g(x)), or x + relu(W x)."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH) if after else nn.Identity()
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(torch.relu(self.first(x)))
        return torch.relu(x + branch) if self.after else x + branch


def network(blocks: int, *, after: bool) -> nn.Sequential:
    torch.manual_seed(0)
    body = (Block(after=after) for _ in range(blocks))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *body, nn.Linear(WIDTH, 16))


@pytest.mark.parametrize("blocks", [2, 4])
def test_plain_relus_that_stay_below_eta_leave_nothing_unmet(blocks: int) -> None:
    shaped = kgraph.transform(network(blocks, after=True), "tat", torch.randn(4, WIDTH))
    record = shaped.kgraph
    assert record.targets is not None and record.targets.negative_slope == 0
    assert record.after.final.c[0] < 0.9 and record.after.final.slope == pytest.approx(1, rel=0.01)
    assert record.ledger.unmet == ()
    assert record.promise.points[-1].c_at(0.0) <= record.after.final.c[0] + 1e-6


def test_sums_whose_means_add_up_keep_q_and_slope() -> None:
    """Measured on the emitted module, 8 draws of width 64: without constants q is 1.4 and the slope .46."""
    x = torch.randn(512, WIDTH, dtype=torch.float64)
    across = torch.randn_like(x)
    angle = 1e-2
    found = []
    for seed in range(8):
        shaped = kgraph.transform(network(4, after=False), "tat", torch.randn(4, WIDTH), seed=seed).double()
        assert shaped.kgraph.ledger.unmet == ()
        with torch.no_grad():
            out, near = shaped(x), shaped(math.cos(angle) * x + math.sin(angle) * across)
        q = float(out.square().mean())
        found.append((q, float((out - near).square().mean()) / q / (2 - 2 * math.cos(angle))))
    values = torch.tensor(found)
    errors = 4 * values.std(0) / len(values) ** 0.5 + 4 * 10 / WIDTH / 4  # ten layers, O(1 / width) each
    assert bool(((values.mean(0) - 1).abs() < errors).all())
    assert bool(((values.mean(0) - torch.tensor([1.4, 0.46])).abs() > torch.tensor([0.0, 0.3])).all())


def test_a_number_that_is_assumed_is_said_to_be_the_ground() -> None:
    width = 16
    model = nn.Sequential(
        nn.Conv2d(4, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.ReLU(),
        nn.Conv2d(width, 4, 1),
    )
    notes = kgraph.transform(model, "tat", torch.randn(4, 4, 6, 6)).kgraph.ledger.notes
    assert any("the kernel is assumed" in note and "certificate" in note for note in notes)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.ones_like(x))


def test_an_output_made_of_ones_like_the_input_does_not_depend_on_it() -> None:
    with pytest.raises(kgraph.RuleError, match="does not depend on its inputs"):
        kgraph.analyze(Constant(), torch.randn(2, WIDTH))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(torch.where(y > 1, y.abs().sqrt(), y))


def test_a_branch_that_a_choice_does_not_take_has_no_say_in_the_tangent() -> None:
    """autodiff has 0 times infinity at 0 there, a node of the quadrature."""
    torch.manual_seed(0)
    x = torch.randn(3, WIDTH)
    model = Root()
    measured = torch.stack([kgraph.empirical_ntk(Root(), x).matrix.diagonal() for _ in range(8)])
    found = kgraph.ntk(model, x).diagonal()
    assert bool(((found - measured.mean(0)).abs() < 4 * measured.std(0) / 8**0.5 + 0.05 * found).all())
