"""Fluctuations of chains: the paper's numbers, kinks as limits, laws and chains read off models, the report."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import kgraph
from kgraph.errors import InputError, RuleError
from kgraph.initializers import haar_orthogonal, reinitialize_weight_

REFERENCE = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())
LAWS = {"orth": "orthogonal", "gauss": "gaussian"}
CRITICAL: dict[str, Any] = {"weight_variance": 1.0, "parametrization": "ntk"}


def chain(widths: list[int], phi: type[nn.Module] = nn.Tanh, bias: bool = False) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=bias), phi())]
    return nn.Sequential(*layers[:-1])


class Hidden(nn.Module):
    """Two layers and any function of torch between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("key", LAWS)
def test_every_number_of_the_paper(key: str) -> None:
    """S3_theory: the file's rtol is 1e-3; it has eight digits, and so do we."""
    result = kgraph.fluctuations(chain([8] * 201), distribution=LAWS[key], **CRITICAL)  # type: ignore[arg-type]
    for row in REFERENCE["S3_theory"]["data"][key]:
        node = result.nodes[row["l"] - 1]
        assert pytest.approx(row["K"], rel=1e-7) == node.K
        assert node.Theta == pytest.approx(row["Theta"], rel=1e-7)
        for name, value in node.scaled.items():
            assert value == pytest.approx(row[name], rel=1e-7, abs=1e-14), (row["l"], name)


def test_asymptotics() -> None:
    """Gaussian V/K^2 tends to 2l/3, F to l/4, B to l/3; orthogonal to -2, -2/3, 2/l."""
    deep = {law: kgraph.fluctuations(chain([4] * 401), distribution=law, **CRITICAL) for law in LAWS.values()}  # type: ignore[arg-type]
    far, near = (deep["gaussian"].nodes[i].scaled for i in (399, 199))
    growth = {name: (far[name] - near[name]) / 200 for name in ("V", "F", "B")}
    assert growth == pytest.approx({"V": 2 / 3, "F": 1 / 4, "B": 1 / 3}, rel=0.01)
    flat = deep["orthogonal"].nodes[399].scaled
    assert [flat["V"], flat["F"], flat["P"]] == pytest.approx([-2, -2 / 3, -1 / 3], rel=0.02)
    assert flat["B"] == pytest.approx(2 / 400, rel=0.02)
    assert max(abs(flat["D"]), abs(flat["A"])) < 1e-3


@pytest.mark.parametrize("shape", REFERENCE["S3_aspect_rule"]["data"])
def test_rule_of_unequal_widths(shape: str) -> None:
    """Cov(z_i^2, z_j^2) of one orthogonal layer is m/(m + 2) - 1, m = max(in, out)."""
    row, (rows, cols) = REFERENCE["S3_aspect_rule"]["data"][shape], map(int, shape.split("->"))
    layer = nn.Sequential(nn.Linear(rows, cols, bias=False))
    own: dict[str, Any] = CRITICAL | {"distribution": "orthogonal"}
    exact = kgraph.fluctuations(layer, deficit="exact", **own).nodes[0]
    assert exact.relative["V"] == pytest.approx(row["exact"], rel=1e-7)
    assert kgraph.fluctuations(layer, **own).nodes[0].relative["V"] == pytest.approx(row["leading"], rel=1e-7)
    measured = kgraph.measure_fluctuations(layer, draws=20_000, **own).nodes[0]
    assert measured.relative["V"] == pytest.approx(row["exact"], abs=4 * measured.error["V"] / rows)
    assert measured.relative["V"] == pytest.approx(row["conn_zz"], abs=5e-3)
    assert pytest.approx(row["var"], abs=5e-3) == measured.K


def test_biases_and_the_input_enter_K() -> None:
    model = chain([6, 9, 5], bias=True)
    result = kgraph.fluctuations(
        model, weight_variance=1.5, bias_variance=0.2, input_q=2.0, distribution="orthogonal", parametrization="ntk"
    )
    first, second = result.nodes
    assert [first.K, first.Theta] == pytest.approx([3.2, 3.2])
    assert pytest.approx(-6 * 2 / 9 * 3.0**2) == first.V  # of the weights' part: biases do not fluctuate together
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * math.sqrt(3.2)
    assert pytest.approx(0.2 + 1.5 * float(z.tanh().square().mean()), rel=1e-3) == second.K
    assert (first.C_b, second.C_W, second.width_in, second.width_out) == (0.2, 1.5, 9, 5)


def test_ratios_do_not_depend_on_the_parametrization_without_biases() -> None:
    model = chain([8] * 6)
    forms = [kgraph.fluctuations(model, weight_variance=1.3, parametrization=form) for form in ("standard", "ntk")]
    for one, other in zip(*(form.nodes for form in forms), strict=True):
        assert one.scaled == pytest.approx(other.scaled)
    assert forms[0].nodes[3].Theta == pytest.approx(forms[1].nodes[3].Theta * 8 / 1.3)


@pytest.mark.parametrize("law", LAWS.values())
def test_a_kink_is_the_limit_of_smooth_functions(law: str) -> None:
    """hardtanh bends where it does not vanish: its phi'' are spikes that count in P and Q."""

    def smooth(sharp: float) -> Callable[[Tensor], Tensor]:
        soft = nn.functional.softplus
        return lambda u: (soft(sharp * (u + 1)) - soft(sharp * (u - 1))) / sharp - 1

    rows = [
        kgraph.fluctuations(Hidden(phi), torch.randn(2, 12), distribution=law, **CRITICAL).nodes[1].scaled  # type: ignore[arg-type]
        for phi in (nn.functional.hardtanh, smooth(100.0), smooth(400.0))
    ]
    exact, coarse, fine = rows
    assert abs(exact["P"]) > 0.05
    for name, value in exact.items():
        assert fine[name] == pytest.approx(value, abs=2e-3)
        assert abs(fine[name] - value) <= abs(coarse[name] - value) / 2 + 1e-9


def test_relu_in_closed_form() -> None:
    """He-initialized relu: V/K^2 gains 5 a layer, B/Theta^2 what <phi'^4> = 1/2 gives, and no dNTK P."""
    nodes = kgraph.fluctuations(chain([10] * 6, nn.ReLU), weight_variance=2.0, distribution="gaussian").nodes
    assert [n.scaled["V"] for n in nodes] == pytest.approx([0, 5, 10, 15, 20])
    assert [n.K for n in nodes] == pytest.approx([2.0] * 5)
    assert pytest.approx(nodes[0].Theta ** 2 * 2) == nodes[1].B
    assert all(abs(n.scaled["P"]) < 1e-12 for n in nodes)


def test_a_jump_leaves_only_K_and_V() -> None:
    result = kgraph.fluctuations(Hidden(torch.sign), torch.randn(2, 12), distribution="orthogonal", weight_variance=1.0)
    node = result.nodes[1]
    assert (node.K, node.scaled["V"]) == pytest.approx((1.0, -2.0))
    assert all(math.isnan(node.scaled[name]) for name in "DFABPQ")
    assert "jumps" in str(result)


def test_laws_are_measured() -> None:
    generator = torch.Generator().manual_seed(1)
    model = chain([20, 20, 30, 10, 10, 1])
    linear = [m for m in model if isinstance(m, nn.Linear)]
    for layer in linear[:3]:
        reinitialize_weight_(layer.weight, generator=generator)
    with torch.no_grad():
        linear[3].weight.copy_(torch.outer(torch.randn(10), torch.randn(10)))
    nodes = kgraph.fluctuations(model).nodes
    assert [n.law for n in nodes] == ["orthogonal"] * 3 + ["gaussian"] * 2
    assert [n.law_how.split(":")[0] for n in nodes] == ["measured"] * 3 + ["assumed"] * 2
    assert [n.how for n in nodes] == ["quadrature"] * 3 + ["assumed"] * 2
    assert "neither" in nodes[3].law_how and "single row" in nodes[4].law_how
    assert {n.law for n in kgraph.fluctuations(chain([16] * 9)).nodes} == {"gaussian"}  # torch's own are uniform
    assert {n.law_how for n in kgraph.fluctuations(model, distribution="orthogonal").nodes} == {"declared"}


def test_models_without_memory() -> None:
    with torch.device("meta"):
        model = chain([4096] * 4)
    nodes = kgraph.fluctuations(model, distribution="orthogonal").nodes
    assert nodes[1].scaled["V"] == pytest.approx(-1.7978818, rel=1e-6)
    assert kgraph.fluctuations(model).nodes[0].how == "assumed"


def test_convolutions_of_one_tap_are_chains() -> None:
    weight = haar_orthogonal(8, 8, torch.Generator().manual_seed(0)).float()
    dense = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 8, bias=False))
    conv = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight.copy_(weight)
        conv[0].weight.copy_(weight[:, :, None, None])
        conv[2].weight.zero_()[:, :, 1, 1] = weight
    ours, theirs = kgraph.fluctuations(conv).nodes[1], kgraph.fluctuations(dense).nodes[1]
    assert ours.scaled == pytest.approx(theirs.scaled)
    assert ours.law == "orthogonal"
    with torch.no_grad():
        conv[2].weight.zero_()[:, :, 0, 1] = weight
    with pytest.raises(RuleError, match="reads padding"):
        kgraph.fluctuations(conv)


def test_functions_are_read_whatever_way_they_are_written() -> None:
    x = torch.randn(2, 12)
    torch.manual_seed(0)
    by_hand = Hidden(lambda u: (u * torch.sigmoid(u) * 2.0).view(-1, 12))
    torch.manual_seed(0)
    named = Hidden(lambda u: 2 * nn.functional.silu(u))
    one, other = (kgraph.fluctuations(model, x).nodes[1] for model in (by_hand, named))
    assert one.scaled == pytest.approx(other.scaled)
    assert one.activation == "sigmoid+mul+mul"
    slope = Hidden(nn.PReLU(init=0.3))
    leaky = Hidden(nn.LeakyReLU(0.3))
    leaky.load_state_dict({k: v for k, v in slope.state_dict().items() if "function" not in k})
    one, other = (kgraph.fluctuations(model, x).nodes[1] for model in (slope, leaky))
    assert one.scaled == pytest.approx(other.scaled)


def test_transformed_models_and_dropout_and_flatten() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 20), nn.ReLU())
    shaped = kgraph.transform(nn.Sequential(*model, nn.Linear(20, 3)), "tat", torch.randn(2, 1, 4, 4))
    result = kgraph.fluctuations(shaped, torch.randn(2, 1, 4, 4))
    assert [n.law for n in result.nodes] == ["orthogonal"] * 3
    assert [n.K for n in result.nodes] == pytest.approx([1, 1, 1], rel=1e-6)
    assert any("dropout" in note for note in result.notes)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.b(torch.tanh(y))


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.gain)


TWICE = nn.Linear(6, 6)
BROKEN = {
    "add": (Branches(), (2, 6)),
    "mul": (Gain(), (2, 6)),
    "layer_norm": (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (2, 6)),
    "softmax": (nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1)), (2, 6)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (2, 3, 8, 8)),
    "flatten": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2)), (2, 3, 8, 8)),
    "tanh": (nn.Sequential(nn.Tanh(), nn.Linear(6, 2)), (2, 6)),
    "linear": (nn.Sequential(TWICE, nn.Tanh(), TWICE), (2, 6)),
}


@pytest.mark.parametrize("op", BROKEN)
def test_what_is_no_chain_is_refused_by_name(op: str) -> None:
    model, shape = BROKEN[op]
    with pytest.raises(RuleError, match=f"no chain .*: {op} breaks it") as caught:
        kgraph.fluctuations(model, torch.randn(shape))
    assert caught.value.node is not None and caught.value.source is not None
    if op in ("add", "mul"):
        assert caught.value.source.startswith("test_fluctuations.py:")


def test_options_out_of_their_domain() -> None:
    model = chain([4, 4])
    wrong: list[dict[str, Any]] = [
        {"distribution": "uniform"},
        {"weight_variance": -1.0},
        {"input_q": 0.0},
        {"parametrization": "mup"},
        {"deficit": "none"},
    ]
    for options in wrong:
        with pytest.raises(InputError, match=next(iter(options))):
            kgraph.fluctuations(model, **options)
    with pytest.raises(RuleError, match="no linear layer"):
        kgraph.fluctuations(nn.Identity(), torch.randn(2, 3))


def test_the_report_fits_and_says_at_what_width_the_kernel_holds() -> None:
    result = kgraph.fluctuations(chain([20] * 51), distribution="gaussian", **CRITICAL)
    text = str(result)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert "gaussian in 50 layers (declared)" in text and "28 rows hidden" in text
    assert len(result.text(all_nodes=True).splitlines()) > 55
    wide = kgraph.fluctuations(chain([math.ceil(20 * result.widening())] * 3), distribution="gaussian", **CRITICAL)
    assert abs(result.largest.scaled["V"] / wide.nodes[0].width_in) == pytest.approx(0.1, rel=0.01)
    assert result.largest.relative["V"] == pytest.approx(31.67782 / 20, rel=1e-6)
    assert "<pre" in result._repr_html_() and "V/nK²" in result._repr_html_()
    data = json.loads(json.dumps(result.to_dict()))
    assert data["nodes"][9]["scaled"]["V"] == pytest.approx(5.5235242, rel=1e-6)
    assert result["linear_3"] is result["6"] is result.nodes[3]
    with pytest.raises(InputError, match="nowhere"):
        result["nowhere"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result)
    assert "V/nK²" in console.export_text()
