"""Deep models: the numbers are those of the recursions, and nothing depends on Python's recursion limit."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

import kgraph
from kgraph import DKS, TAT
from kgraph.capture import capture
from kgraph.kernel import Gaussian, Part, Sum
from kgraph.nonlinear import Region
from kgraph.passes.base import Workspace
from kgraph.passes.scale_residuals import _Lengths
from kgraph.roots import Root, Roots
from kgraph.skeleton import Step
from kgraph.subnetworks import Subnetworks, find_subnetworks
from kgraph.sweep import Array, Maps, Program, Value, combine
from kgraph.targets import solve_targets

DEPTH = 300


class Block(nn.Module):
    """h + Linear(relu(Linear(h)))."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(torch.relu(self.first(h)))


def chain(depth: int, activation: type[nn.Module], width: int = 8) -> nn.Module:
    pairs = [module for _ in range(depth) for module in (nn.Linear(width, width), activation())]
    return nn.Sequential(*pairs, nn.Linear(width, width))


def subnetworks(model: nn.Module, width: int = 8) -> Subnetworks:
    work = Workspace(capture(model, torch.randn(2, width), verify=False))
    return find_subnetworks(work.graph, work.propagation())


def leaky_c(c: float, slope: float) -> float:
    root = math.sqrt((1 - c) * (1 + c))
    return c + (1 - slope) ** 2 / (math.pi * (1 + slope**2)) * (root - c * math.acos(c))


def test_a_chain_of_300_layers_meets_the_closed_recursions() -> None:
    """slope psi^L = zeta, curvature L kappa = tau, C(0) = C_a^L(0) = eta."""
    found = subnetworks(chain(DEPTH, nn.Tanh))
    assert solve_targets(found, DKS(zeta=1.5)).psi == pytest.approx(1.5 ** (1 / DEPTH), rel=1e-12)
    tat = solve_targets(found, TAT(tau=0.3, eta=0.9))
    assert tat.kappa == pytest.approx(0.3 / DEPTH, rel=1e-12)
    c = 0.0
    for _ in range(DEPTH):
        c = leaky_c(c, tat.negative_slope or 0.0)
    assert c == pytest.approx(0.9, rel=1e-9)


def test_a_residual_network_of_300_blocks_meets_the_closed_recursion() -> None:
    """Plain sums share by q, so a block has slope s + (1 - s) psi; the steepest way ends inside the last branch."""
    model = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(DEPTH)), nn.Linear(8, 4))
    found = subnetworks(model)
    shares = [step.weights[0] for step in found.steps if step.kind == "sum"]
    psi = solve_targets(found, DKS(zeta=1.5)).psi
    assert len(shares) == DEPTH and psi is not None
    assert psi * math.prod(share + (1 - share) * psi for share in shares[:-1]) == pytest.approx(1.5, rel=1e-10)


def test_a_deep_stream_read_by_an_activation_is_transformed() -> None:
    """The stream's sums are nested as deeply as the network; whether it is Gaussian is found without recursion."""
    blocks = [Block() for _ in range(DEPTH)]
    model = nn.Sequential(nn.Linear(8, 8), *blocks, nn.ReLU(), nn.Linear(8, 4))
    shaped = kgraph.transform(model, "tat", torch.randn(2, 8))
    record = shaped.kgraph
    assert not record.ledger.unmet
    assert record.ledger.counts()["weight residual sum"] == DEPTH
    assert record.emitted.final.q == pytest.approx(1, abs=1e-4)


def test_the_transform_of_a_deep_chain_keeps_q_at_one() -> None:
    record = kgraph.transform(chain(100, nn.Tanh), "tat", torch.randn(2, 8)).kgraph
    inputs = [row.q for row in record.emitted.nodes if row.op == "linear"]
    assert len(inputs) == 101 and not record.ledger.unmet
    assert_allclose(inputs, 1.0, atol=1e-4)


class Nested(nn.Module):
    """tanh(a) is read by itself and as a part of gelu(tanh(a)): one region is a function of the other's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.a(x))
        return self.c(u + self.b(nn.functional.gelu(u)))


def test_a_region_that_contains_another_is_shaped() -> None:
    shaped = kgraph.transform(Nested(), "tat", torch.randn(2, 8))
    assert shaped.kgraph.ledger.counts()["shape activation"] == 2
    assert not shaped.kgraph.ledger.unmet
    assert shaped(torch.randn(3, 8)).shape == (3, 8)


# --- the sweep against all starts at once, none dropped -----------------------------------------------------------


class _Squares:
    """Two numbers with the curvature's maps, of random strengths; contracting ones among them."""

    start: tuple[float, ...] = (1.0, 0.0)
    constant: tuple[float, ...] = (0.0, 0.0)

    def __init__(self, strengths: dict[Region, tuple[float, float]]) -> None:
        self.strengths = strengths

    def nonlinear(self, region: Region, x: Value) -> Value:
        psi, kappa = self.strengths[region]
        return psi * x[0], psi * x[1] + kappa * x[0] ** 2

    def product(self, x: Value, y: Value) -> Value:
        return x[0] + y[0], x[1] + y[1] + 2 * x[0] * y[0]


def dense_largest(steps: tuple[Step, ...], starts: tuple[int, ...], maps: Maps, component: int) -> float:
    """Every start at every step."""
    values: list[Value] = []
    for index, step in enumerate(steps):
        missing = tuple(np.full(len(starts), np.nan) for _ in maps.start)
        value = combine(step, [values[i] for i in step.inputs], maps) if step.inputs else missing
        value = tuple(component.copy() for component in value)
        if index in starts:
            for array, begin in zip(value, maps.start, strict=True):
                array[starts.index(index)] = begin
        values.append(value)
    table: Array = np.array([value[component] for value in values])
    return float(np.nanmax(table))


def random_skeleton(seed: int) -> tuple[tuple[Step, ...], dict[Region, tuple[float, float]]]:
    """A stream with nonlinear layers, sums, products and long skips."""
    rng = np.random.default_rng(seed)
    nodes = torch.fx.Graph()
    steps, strengths = [Step(nodes.placeholder("x"), "start")], {}
    for index in range(1, 60):
        node = nodes.placeholder(f"n{index}")
        back = tuple(int(max(0, index - 1 - rng.integers(0, 4))) for _ in range(2))
        kind = rng.choice(["nonlinear", "pass", "sum", "product", "largest"], p=[0.4, 0.2, 0.3, 0.03, 0.07])
        if kind == "nonlinear":
            region = Region(node, node, (node,), None, False)  # type: ignore[arg-type]
            strengths[region] = (float(rng.uniform(0.7, 1.2)), float(rng.uniform(0, 0.5)))
            steps.append(Step(node, kind, (index - 1,), region=region))
        elif kind == "pass":
            steps.append(Step(node, kind, (index - 1,)))
        else:
            share = float(rng.uniform(0, 1))
            weights = (share * 0.95, (1 - share) * 0.95) if kind == "sum" else ()
            steps.append(Step(node, str(kind), (index - 1, back[0]), weights))
    return tuple(steps), strengths


@pytest.mark.parametrize("seed", range(20))
def test_the_sweep_finds_what_all_starts_give(seed: int) -> None:
    steps, strengths = random_skeleton(seed)
    starts = tuple(i for i, step in enumerate(steps) if not step.inputs or len(step.inputs) > 1 or i % 7 == 0)
    maps = _Squares(strengths)
    for component in (0, 1):
        value, start, end = Program(steps, starts).largest(maps, component)
        assert value == pytest.approx(dense_largest(steps, starts, maps, component), rel=1e-12)
        assert start in starts and end >= start


# --- the pieces ----------------------------------------------------------------------------------------------------


def test_names_are_free_and_in_order() -> None:
    work = Workspace(capture(chain(1, nn.Tanh), torch.randn(2, 8), verify=False))
    names = [work.add_module("scale", nn.Identity()) for _ in range(4)]
    assert names == ["scale", "scale_1", "scale_2", "scale_3"]
    assert work.add_module("0", nn.Identity()) == "0_1"  # the user's own


def test_lengths_since_parting() -> None:
    """The shortcut has none, the branch two affine layers and an activation, however deep the network."""
    work = Workspace(capture(nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 8), verify=False))
    lengths = _Lengths(work)
    sums = [node for node in work.nodes if node.target is torch.ops.aten.add.Tensor]
    found = [lengths.since_parting(*node.args[:2]) for node in sums]  # type: ignore[arg-type]
    assert found == [(0, 3)] * 3


def part(name: str, *terms: Part, cuts: tuple[tuple[str, int, int], ...] = ()) -> Part:
    zero = torch.zeros(6, 2, dtype=torch.float64)
    expr = Sum(tuple((1.0, term) for term in terms)) if terms else Gaussian()
    roots = Roots.union([Roots({Root(name, cuts)}), *(term.roots for term in terms)])
    return Part(1, zero, zero, zero, roots=roots, expr=expr)


def test_a_sum_nested_beyond_the_recursion_limit() -> None:
    deep = part("x")
    for i in range(1500):
        deep = part(f"w{i}", deep)
    assert deep.gaussian
    assert not deep.independent(part("w77")) and deep.independent(part("other"))


def test_independence_with_and_without_cuts() -> None:
    low, high, whole = part("w", cuts=(("c", 0, 4),)), part("w", cuts=(("c", 4, 8),)), part("w")
    expected = {(0, 1): True, (0, 2): False, (1, 2): False}
    for (i, one), (j, other) in combinations(enumerate((low, high, whole)), 2):
        assert one.independent(other) is other.independent(one) is expected[i, j]
