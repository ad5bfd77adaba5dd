"""Local targets against reference numbers: modified ResNets and plain chains, read off the graph."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import modresnet
import pytest
import torch
import zoo
from torch import nn

import kgraph
from kgraph import DKS, TAT
from kgraph.capture import capture
from kgraph.errors import InputError, TargetError
from kgraph.passes.base import Workspace
from kgraph.passes.scale_residuals import reweight
from kgraph.recipe import is_free, prepare
from kgraph.subnetworks import Subnetworks, find_subnetworks
from kgraph.targets import ShapingTargets, solve_targets

Row = dict[str, Any]
ROWS: list[Row] = json.loads((Path(__file__).parent / "reference" / "dks_local_targets.json").read_text())["targets"]
BY_ARCH = {row["arch"]: row for row in ROWS}
TOLERANCE = 1e-8


def by_graph() -> dict[tuple[str, bool], list[Row]]:
    """Rows that share one graph: they differ by the weight of the shortcuts only (0 removes them)."""
    found: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in ROWS:
        _, weight = modresnet.build(row["arch"]) if row["arch"].startswith("vanilla") else (None, _weight(row))
        found[row["arch"].partition("_w")[0], weight == 0].append(row)
    return found


def _weight(row: Row) -> float:
    return float(row["arch"].partition("_w")[2] or 0)


GRAPHS = by_graph()


def prepared(arch: str) -> Workspace:
    model, weight = modresnet.build(arch)
    return prepare(capture(model, modresnet.example(arch), verify=False), weight)


def subnetworks(work: Workspace) -> Subnetworks:
    return find_subnetworks(work.graph, work.propagation(), free=is_free)


def assert_row(row: Row, dks: ShapingTargets, tat: ShapingTargets) -> None:
    assert dks.psi == pytest.approx(row["psi"], abs=TOLERANCE)
    assert tat.kappa == pytest.approx(row["kappa"], abs=TOLERANCE)
    assert tat.negative_slope == pytest.approx(row["negative_slope"], abs=TOLERANCE)
    assert dks.attained == pytest.approx(1.5, abs=TOLERANCE)
    assert " -> " in dks.binding
    if row["negative_slope"] == 0:
        assert tat.attained == pytest.approx(row["max_c0_at_relu"], abs=TOLERANCE)
    else:
        assert tat.attained == pytest.approx(0.9, abs=TOLERANCE)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: g[0] + ("_vanilla" if g[1] else ""))
def test_every_reference_row(graph: tuple[str, bool]) -> None:
    rows = GRAPHS[graph]
    work = prepared(rows[0]["arch"])
    for row in rows:
        if not graph[1]:
            assert reweight(work, _weight(row))
        found = subnetworks(work)
        assert_row(row, solve_targets(found, DKS()), solve_targets(found, TAT()))


@pytest.mark.parametrize("arch", ["modresnet18_v2_w0.0", "modresnet18_v1_w0.8", "modresnet18_v2_w0.95", "vanilla10"])
def test_public_call(arch: str) -> None:
    model, weight = modresnet.build(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dks, tat = (kgraph.shaping_targets(model, m, modresnet.example(arch), weight) for m in ("dks", "tat"))
    assert_row(BY_ARCH[arch], dks, tat)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@lru_cache(maxsize=1)
def _skeleton() -> Subnetworks:
    return subnetworks(prepared("modresnet18_v2_w0.5"))


def test_wrong_sum_rule_misses_the_reference() -> None:
    """Negative control: weights w instead of w^2 in a sum."""
    right = _skeleton()
    steps = tuple(
        replace(step, weights=tuple(w**0.5 for w in step.weights)) if step.kind == "sum" else step
        for step in right.steps
    )
    row = BY_ARCH["modresnet18_v2_w0.5"]
    assert solve_targets(right, DKS()).psi == pytest.approx(row["psi"], abs=TOLERANCE)
    with pytest.raises(TargetError):
        solve_targets(replace(right, steps=steps), DKS())
    wrong = solve_targets(replace(right, steps=steps), DKS(zeta=1e6))
    assert abs((wrong.psi or 0.0) - (solve_targets(right, DKS(zeta=1e6)).psi or 0.0)) > 1e-3


def test_every_maximum_grows_with_its_local_value() -> None:
    found = _skeleton()
    assert found.max_slope(1.0).value <= found.max_slope(1.01).value <= found.max_slope(1.1).value
    assert found.max_curvature(0.01).value <= found.max_curvature(0.02).value
    assert found.max_c(0.0).value >= found.max_c(0.3).value >= found.max_c(1.0).value


def test_published_constants_of_a_resnet101() -> None:
    """eta = .75, shortcut weight .6; the published slope is of the whole network's map alone."""
    work = prepared("modresnet101_v2_w0.8")
    assert reweight(work, 0.6)
    tat = solve_targets(subnetworks(work), TAT(eta=0.75, tau=0.2))
    assert tat.negative_slope == pytest.approx(0.6291800290346146, abs=2e-3)


class Gated(nn.Module):
    """Two gated linear units: a product of two branches has slope 2 whatever the activations are."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.gates = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.values = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.leave = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.enter(x))
        for gate, value in zip(self.gates, self.values, strict=True):
            x = torch.tanh(gate(x)) * value(x)
        return self.leave(x)


def test_unmet_target_names_the_subnetwork_and_its_minimum() -> None:
    with pytest.raises(TargetError, match=r"zeta = 1\.5: the subnetwork \w+ -> \w+ has at least 4") as caught:
        kgraph.shaping_targets(Gated(), "dks", torch.randn(2, 8))
    assert "shortcut" in str(caught.value)


def test_unmet_target_of_a_network_with_sigmoid_gates() -> None:
    model, inputs = zoo.build("swiglu")
    with pytest.raises(TargetError, match=r"zeta = 1\.5: the subnetwork \w+ -> \w+ has at least 2\."):
        kgraph.shaping_targets(model, "dks", inputs)
    assert (kgraph.shaping_targets(model, DKS(zeta=3.5), inputs).psi or 0) > 1


def test_no_activation_to_shape() -> None:
    with pytest.raises(InputError, match="no activation"):
        kgraph.shaping_targets(nn.Linear(4, 4), "dks", torch.randn(2, 4))


def test_hand_written_activation_is_no_product() -> None:
    """x * relu6(x + 3) is one function of x: its subnetworks have slope psi, not 2."""
    model, inputs = zoo.build("hand_written")
    found = kgraph.shaping_targets(model, DKS(zeta=1.5), inputs)
    assert found.psi == pytest.approx(1.5 ** (1 / 3), abs=1e-9)


class HandAttention(nn.Module):
    """Attention written out, and stochastic depth: neither is a product of two branches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.query(x) @ self.key(x).transpose(-1, -2) * 0.25).softmax(-1)
        x = weights @ self.value(x)
        mask = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.9).div_(0.9)
        return self.leave(torch.tanh(x * mask))


def test_attention_weights_and_masks_are_no_products() -> None:
    found = kgraph.shaping_targets(HandAttention(), "dks", torch.randn(2, 5, 16))
    assert found.psi == pytest.approx(1.5, abs=1e-9)
