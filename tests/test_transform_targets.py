"""Targets of a transform: met, attained by the emitted module, or named in the ledger."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformed import QUICK, SLOW, chain, local_map, record, shaped

import kgraph
from kgraph import DKS, recipe
from kgraph.capture import capture
from kgraph.modules import ShapedActivation
from kgraph.passes import shape_activations
from kgraph.propagate import propagate
from kgraph.subnetworks import find_subnetworks


@pytest.mark.parametrize("method", ["dks", "tat"])
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_q_is_one_at_every_shaped_activation_or_the_ledger_says_so(name: str, method: str) -> None:
    if method == "tat" and name in SLOW[2:]:
        pytest.skip("one method is enough")
    *_, result = shaped(name, method)
    analysis, ledger = record(result).after.analysis, record(result).ledger
    sites = [row for row in analysis.nodes if isinstance(_submodule(result, row.module), ShapedActivation)]
    assert sites
    for row in sites:
        source = analysis[row.inputs[0]]
        tolerance = 0.05 if source.how in ("sampled", "assumed") else 1e-6
        named = any(row.name in line or "more (q" in line for line in ledger.unmet)
        assert named or source.q == pytest.approx(1, abs=tolerance), (row.name, source.q)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    return dict(root.named_modules()).get(path)


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_dks_slope_bound_or_the_ledger_says_so(name: str) -> None:
    *_, result = shaped(name)
    largest, unmet = record(result).after.analysis.max_slope, record(result).ledger.unmet
    assert largest is not None
    if not any("no local value" in line for line in unmet):
        assert largest <= 1.5 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["mlp", "hand_written"])
def test_dks_slope_is_attained_by_the_emitted_module(name: str) -> None:
    """An analysis of its own, from the emitted module: a bound that is not attained would shape too little."""
    _, inputs, result = shaped(name)
    again = kgraph.analyze(result.eval(), inputs)
    assert again.analysis.max_slope == pytest.approx(1.5, rel=1e-6)
    assert record(result).ledger.unmet == ()


@pytest.mark.parametrize("name", ["mlp", "two_inputs", "resnet18"])
def test_tat_leaky_c_is_attained_by_the_emitted_module(name: str) -> None:
    _, inputs, result = shaped(name, "tat")
    graph = capture(result, inputs, verify=False)
    own = find_subnetworks(graph, propagate(graph, mode="eval"), free=lambda region: False).max_c(0.0)
    targets = record(result).targets
    assert targets is not None
    assert own.value <= 0.9 * (1 + 1e-6)
    if targets.negative_slope:
        assert own.value == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU])
def test_tat_curvature_of_smooth_activations(activation: type[nn.Module]) -> None:
    """n equal layers have curvature n kappa: kappa = tau / n, checked by quadrature on the module itself."""
    result = kgraph.transform(chain(*(activation() for _ in range(3))), "tat", torch.randn(2, 16))
    sites = [m for m in result.modules() if isinstance(m, ShapedActivation)]
    assert len(sites) == 3 and record(result).ledger.unmet == ()
    for site in sites:
        q, _, slope, curvature = local_map(site)
        assert (q, slope) == pytest.approx((1, 1), abs=1e-6)
        assert curvature == pytest.approx(0.1, abs=1e-6)


def test_mixture_under_tat_uses_dks_throughout() -> None:
    result = kgraph.transform(chain(nn.ReLU(), nn.Tanh()), "tat", torch.randn(2, 16))
    assert any("DKS is used throughout" in note for note in record(result).ledger.notes)
    targets = record(result).targets
    assert targets is not None and targets.psi == pytest.approx(1.5**0.5, abs=1e-9)


def test_shortcut_weight_is_raised_where_the_target_needs_it() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.a, self.b, self.leave = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.leave(torch.tanh(x + torch.tanh(self.a(x)) * self.b(x)))

    ledger = record(kgraph.transform(Gate(), DKS(zeta=2.2), torch.randn(2, 16))).ledger
    assert ledger.unmet == () or any("zeta" in line for line in ledger.unmet)
    given = record(kgraph.transform(Gate(), DKS(zeta=2.2), torch.randn(2, 16), shortcut_weight=0.3))
    assert given.shortcut_weight == 0.3


@pytest.mark.parametrize(("name", "method"), [("mlp", "dks"), ("mlp", "tat"), ("hand_written", "dks"), ("cnn", "dks")])
def test_monte_carlo_agrees_with_the_record(name: str, method: str) -> None:
    _, inputs, result = shaped(name, method)
    measured = kgraph.montecarlo(result, inputs, draws=6, mode="eval")
    again = kgraph.analyze(result, inputs, mode="eval").analysis
    assert measured.disagreements(again) == []
    after = record(result).after.analysis.final
    assert again.final.q == pytest.approx(after.q, rel=1e-4)
    assert again.final.c == pytest.approx(after.c, abs=1e-4)


@pytest.mark.parametrize(
    ("activation", "method", "words"),
    [
        (nn.ReLU, "tat", ("negative slope 0", "largest C(0) 0.6048", "eta = 0.9")),
        (nn.Tanh, "tat", ("curvature C''(1) = 0.1", "tau = 0.3")),
        (nn.Tanh, "dks", ("slope C'(1) = 1.14471", "zeta = 1.5")),
    ],
    ids=["leaky", "smooth", "dks"],
)
def test_the_ledger_names_the_value_solved_and_its_target(
    activation: type[nn.Module], method: str, words: tuple[str, ...]
) -> None:
    result = kgraph.transform(chain(*(activation() for _ in range(3))), method, torch.randn(2, 16))
    lines = [c for c in record(result).ledger.changes if c.what == "shape activation"]
    assert len(lines) == 3 and all(word in line.why for line in lines for word in words)
    assert not any("curvature" in line.why for line in lines if activation is nn.ReLU)
    assert (lines[0].after == "negative_slope 0, output_scale 1.414") == (activation is nn.ReLU)


def test_a_deep_leaky_networks_line_has_its_slope() -> None:
    result = kgraph.transform(chain(*(nn.ReLU() for _ in range(30))), "tat", torch.randn(2, 16))
    targets = record(result).targets
    assert targets is not None and targets.negative_slope
    line = next(c for c in record(result).ledger.changes if c.what == "shape activation")
    assert line.why == f"TAT: negative slope {targets.negative_slope:.4g} for a largest C(0) eta = 0.9"
    assert line.after.startswith(f"negative_slope {targets.negative_slope:.4g}, output_scale")


class PostActivation(nn.Module):
    """relu(x + f(x)), block after block: from the second on, sums of relus and Gaussians enter the relus."""

    def __init__(self, blocks: int = 20, width: int = 64) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.leave(x)


def missed(result: nn.Module) -> str:
    """Where the plan is missed, or ""."""
    return " ".join(line for line in record(result).ledger.unmet if "is planned to be" in line)  # type: ignore[arg-type]


def test_the_plan_holds_behind_sums_that_are_not_gaussian() -> None:
    """The mean of a shortcut adds up from sum to sum: shifts and slopes of the input that is there hold the plan."""
    inputs = torch.randn(2, 64)
    result = kgraph.transform(PostActivation(), "tat", inputs).eval()
    final = record(result).after.final
    assert missed(result) == ""
    assert final.c[0] == pytest.approx(0.9, abs=0.03) and final.slope == pytest.approx(1, rel=0.01)


def test_constants_for_gaussian_inputs_alone_miss_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: q restored, and neither mean nor slope."""
    monkeypatch.setattr(recipe, "keeps", lambda method: "q")
    monkeypatch.setattr(recipe, "settle", lambda work, method, targets, planned: targets)
    result = kgraph.transform(PostActivation(), "tat", torch.randn(2, 64))
    assert "C(0) from input to linear_41 is planned to be 0.9" in missed(result)
    assert "the slope C'(1) from input to linear_41 is planned to be 1" in missed(result)
    assert record(result).after.final.slope < 0.2


def test_dks_of_a_post_activation_network_has_its_slope_at_the_output() -> None:
    """Against plain torch: weights of this draw, twelve pairs of inputs, 96 wide."""
    torch.manual_seed(0)
    model = PostActivation(blocks=12, width=96)
    result = kgraph.transform(model, "dks", torch.randn(2, 96)).eval().double()
    assert missed(result) == ""
    assert record(result).after.final.slope == pytest.approx(1.5, rel=0.01)
    x, z = torch.randn(2, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features: list[Tensor] = []
        result.get_submodule("leave").register_forward_hook(lambda _, args, out: features.append(args[0]))
        for angle in (0.0, 0.05):
            result(math.cos(angle) * x + math.sin(angle) * z)
    here, near = features
    slope = float((near - here).square().sum() / (here.square().sum() + near.square().sum()) / (1 - math.cos(0.05)))
    unlike = float(here.sum(0).square().sum() - here.square().sum()) / (63 * float(here.square().sum()))
    assert slope == pytest.approx(1.5, rel=0.15) and unlike == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_a_plan_that_holds_needs_no_word(method: str) -> None:
    assert missed(kgraph.transform(chain(*(nn.ReLU() for _ in range(5))), method, torch.randn(2, 16))) == ""


def test_pooling_is_named_where_it_parts_plan_and_analysis() -> None:
    *_, result = shaped("resnet18", "tat")
    assert f"finds {record(result).after.final.c[0]:.4g}; they part most at max_pool2d" in missed(result)
    assert "part most at adaptive_avg_pool2d" in missed(result)  # in the slope
    *_, result = shaped("cnn", "dks")
    assert "they part most at max_pool2d" in missed(result) and "average pooling would keep c" in missed(result)


def test_an_average_over_positions_keeps_what_dks_plans() -> None:
    """Without means nothing but the differences is there to be averaged: c and slope stay, q is restored.

    Of many channels: cosines of few scatter, and functions make a mean of that.
    """

    def model(channels: int) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU())
        return nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

    final = record(kgraph.transform(model(16_384), "dks", torch.randn(2, 16_384, 6, 6))).after.final
    assert final.c[0] == pytest.approx(0, abs=1e-9) and final.slope == pytest.approx(1.5, rel=1e-3)
    few = kgraph.transform(model(8), "dks", torch.randn(2, 8, 6, 6))
    assert "an average over positions keeps" in missed(few) and "no means" not in missed(few)
    tat = kgraph.transform(model(8), kgraph.TAT(eta=0.5), torch.randn(2, 8, 6, 6))
    assert "method='dks' has no means" in missed(tat)


def test_a_function_that_is_never_nearly_linear_keeps_the_value_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = shape_activations.shape_activation

    def steep(phi: Any, psi: float | None = None, *rest: Any) -> Any:
        if psi is not None and psi < 1.001:
            raise kgraph.TargetError("no constants")
        return inner(phi, psi, *rest)

    monkeypatch.setattr(shape_activations, "shape_activation", steep)
    shape_activations._solved.cache_clear()
    model = PostActivation(blocks=4, width=16)
    result = kgraph.transform(model, DKS(zeta=1.4), torch.randn(2, 16))
    targets = record(result).targets
    assert targets is not None and targets.psi == kgraph.shaping_targets(model, DKS(zeta=1.4), torch.randn(2, 16)).psi
    line = next(change for change in record(result).ledger.changes if change.what == "shape activation")
    assert f"C'(1) = {targets.psi:.6g}" in line.why
    shape_activations._solved.cache_clear()
