"""Shaping PReLU: the solved slope is written into its parameter, which stays what it was in the state dict."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformed import chain, record

import kgraph
from kgraph.capture import capture
from kgraph.emitted import EmittedModule
from kgraph.modules import ShapedActivation
from kgraph.propagate import propagate
from kgraph.subnetworks import find_subnetworks

WIDTH, DEPTH = 16, 30


class Functional(nn.Module):
    """F.prelu with slopes that belong to the model, one set for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.slopes, self.leave = nn.Parameter(torch.linspace(0.1, 0.5, WIDTH)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.prelu(layer(x), self.slopes)
        return self.leave(x)


def unequal() -> nn.Module:
    model = chain(*(nn.PReLU(WIDTH) for _ in range(DEPTH)))
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            module.weight.data.copy_(torch.linspace(-0.5, 1.0, WIDTH))
    return model


MODELS = {
    "one": lambda: chain(*(nn.PReLU() for _ in range(DEPTH))),
    "channels": unequal,
    "linear": lambda: chain(*(nn.PReLU(init=1.0) for _ in range(DEPTH))),
    "function": Functional,
}
INPUTS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pytree


@cache
def shaped(name: str, method: str) -> tuple[nn.Module, EmittedModule]:
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, kgraph.transform(model, method, INPUTS)


def slopes(result: EmittedModule) -> list[Tensor]:
    """The parameters handed to shaped activations."""
    calls = [n for n in result.graph.nodes if isinstance(_module(result, n), ShapedActivation)]
    return [result.get_parameter(str(n.args[1].target)) for n in calls]


def _module(result: EmittedModule, node: Any) -> nn.Module | None:
    return result.get_submodule(str(node.target)) if node.op == "call_module" else None


def inputs_of_activations(analysis: kgraph.analysis.Analysis) -> list[float]:
    return [analysis[row.inputs[0]].q for row in analysis.nodes if row.op == "prelu"]


@pytest.mark.parametrize("method", ["tat", "dks"])
@pytest.mark.parametrize("name", MODELS)
def test_targets_are_met_by_the_emitted_module(name: str, method: str) -> None:
    _, result = shaped(name, method)
    again = kgraph.analyze(result.eval(), INPUTS).analysis
    q = inputs_of_activations(again)
    assert len(q) == DEPTH and q == pytest.approx([1.0] * DEPTH, abs=1e-6)
    assert record(result).ledger.unmet == ()
    assert again.max_slope is not None
    if method == "dks":
        assert again.max_slope <= 1.5 * (1 + 1e-6) and again.max_slope == pytest.approx(1.5, rel=1e-6)
    else:
        assert again.max_slope == pytest.approx(1, abs=1e-6)
        graph = capture(result, INPUTS, verify=False)
        own = find_subnetworks(graph, propagate(graph, mode="eval"), free=lambda region: False).max_c(0.0)
        assert own.value == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_slope_solved_by_tat_is_the_parameter(name: str) -> None:
    _, result = shaped(name, "tat")
    targets = record(result).targets
    assert targets is not None and targets.negative_slope is not None and 0 < targets.negative_slope < 1
    for weight in slopes(result):
        assert isinstance(weight, nn.Parameter) and weight.requires_grad
        assert torch.equal(weight.detach(), torch.full_like(weight, targets.negative_slope))


@pytest.mark.parametrize("method", ["tat", "dks"])
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keys_survive_and_slopes_learn(name: str, method: str) -> None:
    model, result = shaped(name, method)
    assert set(result.state_dict()) == set(model.state_dict())
    copy.deepcopy(result).load_state_dict(model.state_dict(), strict=True)
    learner = copy.deepcopy(result)
    learner(INPUTS).square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in slopes(learner))


def test_the_module_computes_what_the_ledger_says() -> None:
    """u -> sqrt(2 / (1 + a^2)) prelu_a(u), and the ledger names the slope before, after, and its parameter."""
    _, result = shaped("one", "tat")
    a = slopes(result)[0].detach()
    site = next(m for m in result.modules() if isinstance(m, ShapedActivation))
    u = torch.linspace(-3, 3, 13)
    assert torch.allclose(site(u, a), (2 / (1 + a * a)).sqrt() * torch.where(u > 0, u, a * u), atol=1e-6)
    changes = [c for c in record(result).ledger.changes if c.what == "shape activation"]
    assert len(changes) == DEPTH
    assert changes[0].before == "prelu of slope 0.25"
    assert changes[0].after.startswith(f"negative_slope {float(a):.4g} (1.weight, still a parameter)")
    assert "eta = 0.9" in changes[0].why and "curvature" not in changes[0].why
    _, unequal = shaped("channels", "tat")
    before = [c.before for c in record(unequal).ledger.changes if c.what == "shape activation"]
    assert before[0] == "prelu of slope 0.25 +- 0.46"


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_monte_carlo_agrees_with_the_shaped_module(method: str) -> None:
    model = chain(*(nn.PReLU(128) for _ in range(3)), width=128)
    result = kgraph.transform(model, method, torch.randn(2, 128)).eval()
    measured = kgraph.montecarlo(result, torch.randn(2, 128), draws=8)
    assert measured.disagreements(kgraph.analyze(result, torch.randn(2, 128)).analysis) == []


def test_the_records_report_is_that_of_the_emitted_module() -> None:
    for method in ("tat", "dks"):
        _, result = shaped("channels", method)
        again, after = kgraph.analyze(result.eval(), INPUTS).final, record(result).after.final
        assert (again.q, again.slope, again.ntk) == pytest.approx((after.q, after.slope, after.ntk), rel=1e-9)
        assert again.c == pytest.approx(after.c, abs=1e-9)


def test_other_slopes_are_noticed() -> None:
    """Negative control: with PReLU's own start in place of the solved slope nothing is as it should be."""
    _, result = shaped("one", "dks")
    spoiled = copy.deepcopy(result).eval()
    spoiled.load_state_dict(
        {k: torch.full_like(v, 0.25) if v.numel() == 1 else v for k, v in spoiled.state_dict().items()}
    )
    again = kgraph.analyze(spoiled, INPUTS).analysis
    assert record(spoiled).stale and not record(result).stale
    assert abs(min(inputs_of_activations(again)) - 1) > 1e-2
    assert again.max_slope is not None and again.max_slope > 1.6


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_shaping_twice_changes_nothing(method: str) -> None:
    _, once = shaped("one", method)
    twice = kgraph.transform(once, method, INPUTS)
    assert record(twice).ledger.unmet == () and set(twice.state_dict()) == set(once.state_dict())
    for one, two in zip(slopes(once), slopes(twice), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_copies_pickles_and_half_precision() -> None:
    _, result = shaped("channels", "tat")
    expected = result.eval()(INPUTS)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for module in (copy.deepcopy(result), torch.load(file, weights_only=False)):
        assert torch.equal(module(INPUTS), expected)
    half = copy.deepcopy(result).bfloat16()(INPUTS.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.1)


class Composite(nn.Module):
    """u tanh(prelu(u)): no leaky relu, so that the slope stays and the constants are solved for it."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.bend = nn.PReLU(count)
        if count > 1:
            self.bend.weight.data.copy_(torch.linspace(0.1, 0.4, count))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.bend(x))


def test_a_slope_inside_a_larger_function_is_kept() -> None:
    model = chain(Composite(), Composite())
    result = kgraph.transform(model, "dks", INPUTS)
    assert record(result).ledger.unmet == () and set(result.state_dict()) == set(model.state_dict())
    assert [float(weight.detach()) for weight in slopes(result)] == [0.25, 0.25]
    again = kgraph.analyze(result.eval(), INPUTS).analysis
    assert again.max_slope == pytest.approx(1.5, rel=1e-6)


class Twice(nn.Module):
    """Two learnable slopes in one function."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.PReLU(), nn.PReLU(init=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


KEPT = {
    "several learnable slopes": Twice,
    "differ from channel to channel": lambda: Composite(WIDTH),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_shaped_is_named(reason: str) -> None:
    ledger = record(kgraph.transform(chain(KEPT[reason](), nn.Tanh()), "dks", INPUTS)).ledger
    assert any(reason in line and "not shaped" in line for line in ledger.unmet)
    assert any(reason in entry.why for entry in ledger.kept)


def test_keep_relu_concerns_relus_only() -> None:
    """A PReLU's start is no choice of the user's as a relu is: its slope is solved all the same."""
    result = kgraph.transform(chain(nn.PReLU()), kgraph.DKS(keep_relu=True), INPUTS)
    other = kgraph.transform(chain(nn.PReLU()), kgraph.DKS(), INPUTS)
    assert torch.equal(slopes(result)[0], slopes(other)[0])


def test_the_meta_device_holds_no_slope() -> None:
    with torch.device("meta"):
        model = chain(nn.PReLU())
    ledger = record(kgraph.transform(model, "tat", INPUTS.to("meta"))).ledger
    assert any("1.weight is on the meta device" in line for line in ledger.unmet)
