"""Targets of a transform: met, attained by the emitted module, or named in the ledger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformed import QUICK, SLOW, chain, local_map, record, shaped

import kgraph
from kgraph import DKS
from kgraph.capture import capture
from kgraph.modules import ShapedActivation
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
    if any("max slope" in line for line in unmet):
        assert largest > 1.5
    else:
        assert largest <= 1.5 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["mlp", "hand_written", "two_inputs"])
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


def plan_note(result: nn.Module) -> str:
    """The note on what the local maps promise and what the analysis finds, or ""."""
    notes = record(result).ledger.notes  # type: ignore[arg-type]
    return next((note for note in notes if "is planned to be" in note), "")


def test_a_c_value_other_than_planned_is_said() -> None:
    """Sums of relus are not Gaussian: c rises above the plan, and above it in the finite network as well."""
    inputs = torch.randn(2, 64)
    result = kgraph.transform(PostActivation(), "tat", inputs).eval()
    note, final = plan_note(result), record(result).after.final
    planned = float(note.split("planned to be ")[1].split(",")[0])
    found = float(note.split("the analysis finds ")[1].split(" ")[0])
    assert found == pytest.approx(final.c[0], abs=1e-4) and found > 1.01 * planned
    graph = capture(result, inputs, verify=False)
    own = find_subnetworks(graph, propagate(graph, mode="eval"), free=lambda region: False)
    assert own.max_c(0.0).value == pytest.approx(0.9, rel=1e-6)  # the emitted sums, written with alpha, included
    assert "20 of 41 activations are not Gaussian" in note and "eta = 0.9" in note
    measured = kgraph.montecarlo(result, inputs, draws=6)
    assert measured[record(result).after.analysis.output].c[0] > 1.005 * planned


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_a_plan_that_holds_needs_no_note(method: str) -> None:
    assert plan_note(kgraph.transform(chain(*(nn.ReLU() for _ in range(5))), method, torch.randn(2, 16))) == ""


def test_pooling_is_named_where_it_parts_plan_and_analysis() -> None:
    *_, result = shaped("resnet18", "tat")
    note, final = plan_note(result), record(result).after.final
    assert f"finds {final.c[0]:.4g} at" in note and "they part first at max_pool2d" in note
    assert record(result).ledger.unmet == ()
    *_, result = shaped("cnn", "dks")
    assert "the slope C'(1) from input to output is planned to be 1.5" in plan_note(result)
