"""Linear layers: closed forms, the finite network, shared layers, the NTK."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SEQUENCE, VECTOR, biased, dense, disagreements, ntk_ratio, vectors
from torch import nn

import kgraph
from kgraph.capture import capture
from kgraph.kernel import Pairs
from kgraph.propagate import propagate
from kgraph.rules import linear
from kgraph.rules.table import rule
from kgraph.summarize import summarize

relu = torch.relu

BODIES = {
    "plain": vectors(lambda u: u),
    "called twice": vectors(lambda u, a: a(u) + a(u), dense),
    "its own square": vectors(lambda u, a: a(u) * a(u), dense),
    "applied to its own output": vectors(lambda u, a: a(relu(a(u))), dense),
    "sum of two depths of one layer": vectors(lambda u, a: a(u) + a(relu(a(u))), dense),
    "means of 0.5 and 0.3": vectors(
        lambda u, a, b: relu(a(u) + b(u)), lambda w: biased(dense(w)), lambda w: biased(dense(w), 0.3)
    ),
    "matmul": vectors(lambda u, a: relu(u) @ a.weight.T, dense),
    "addmm": vectors(lambda u, a: torch.addmm(a.bias, relu(u), a.weight), dense),
    "einsum": vectors(lambda u, a: torch.einsum("bc,dc->bd", relu(u), a.weight), dense),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(BODIES[name], VECTOR) == []


def test_positions_keep_apart() -> None:
    assert disagreements(vectors(lambda u, a: a(relu(u)), dense), SEQUENCE) == []


def test_without_the_bias_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "bias_moments", lambda bias: (0.0, 0.0))
    assert disagreements(BODIES["means of 0.5 and 0.3"], VECTOR)


def test_a_layer_taken_as_another_at_its_second_call_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "once", lambda part, key, make: make(part))
    monkeypatch.setattr("kgraph.kernel.Part.independent", lambda self, other: self is not other)
    assert disagreements(BODIES["called twice"], VECTOR)


def test_second_moments_are_those_of_the_tensors() -> None:
    model = nn.Linear(64, 32)
    row = kgraph.analyze(model, torch.randn(2, 64)).final
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    q = 64 * weight.square().mean() + bias.square().mean()
    c = (0.5 * 64 * weight.square().mean() + bias.square().mean()) / q
    assert row.q == pytest.approx(float(q), rel=1e-12)
    assert row.c[1] == pytest.approx(float(c), rel=1e-12)
    assert row.how == "exact"


def test_relu_chain_has_the_arc_cosine_kernel() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
    row = kgraph.analyze(model, torch.randn(2, 64)).final
    theta = math.acos(0.5)
    expected = (math.sin(theta) + (math.pi - theta) * 0.5) / math.pi
    assert row.c[1] == pytest.approx(expected, rel=1e-12)
    assert row.slope == pytest.approx(1.0, rel=1e-12)


def test_slope_is_the_derivative_of_c() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    graph = capture(model, torch.randn(2, 64))
    near = summarize(graph, propagate(graph, pairs=Pairs(cosines=(1 - 1e-6,)))).final
    assert near.slope == pytest.approx((1 - near.c[0]) / 1e-6, rel=1e-4)


NTK = {
    "relu": vectors(lambda u, a: a(relu(u)), dense),
    "one layer twice": vectors(lambda u, a: a(u) + relu(a(u)), dense),
    "a gate": vectors(lambda u, a, b: a(u) * torch.sigmoid(b(u)), dense, dense),
}


@pytest.mark.parametrize("name", NTK)
def test_the_ntk_is_that_of_the_network(name: str) -> None:
    ratio = ntk_ratio(NTK[name], VECTOR)
    assert ratio.value == pytest.approx(1.0, abs=4 * ratio.error + 8 / VECTOR.width)
    assert ratio.error < 0.15


def test_two_rules_for_one_operation_are_refused() -> None:
    with pytest.raises(kgraph.RuleError, match="two rules"):
        rule(torch.ops.aten.linear.default)(lambda context, x: x)
