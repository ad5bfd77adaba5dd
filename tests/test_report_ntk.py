"""The NTK column: closed forms of deep networks, the finite network through norms, and that every view shows it."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from synthetic import relu_chain
from torch import Tensor, nn

import kgraph
from kgraph.analysis import NodeKernel
from kgraph.errors import InputError
from kgraph.report import Report
from kgraph.rules import group_norm, norm
from kgraph.rules.norm import Removed

WIDTH = 32


def deep(depth: int, gain: float, activation: type[nn.Module], *, bias: bool = False) -> nn.Module:
    """``depth`` linear layers of fan_in E[W^2] = gain, activations between them."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layer = nn.Linear(WIDTH, WIDTH, bias=bias)
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(gain))
        if bias:
            nn.init.zeros_(layer.bias)
        layers += [layer, activation()] if i < depth - 1 else [layer]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("depth", [1, 2, 5, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_and_relu_networks(depth: int, bias: bool) -> None:
    """Theta_L = L n for orthogonal linear layers and for He's relu layers: relu halves K and T alike, sw2 = 2 doubles.

    With biases in PyTorch's parametrization every layer adds 1. In the NTK parametrization n is sw2: L and 2 L, and
    biases of variance 0 add nothing. (Jacot et al. 2018; Arora et al. 2019.) Weights are float32: rel 1e-6.
    """
    inputs = torch.randn(2, WIDTH)
    for gain, activation in ((1.0, nn.Identity), (2.0, nn.ReLU)):
        model = deep(depth, gain, activation, bias=bias)
        standard = kgraph.analyze(model, inputs)
        assert standard.final.ntk == pytest.approx(depth * (WIDTH + bias), rel=1e-6)
        assert standard.analysis.parametrization == "standard"
        other = kgraph.analyze(model, inputs, parametrization="ntk")
        assert other.final.ntk == pytest.approx(depth * gain, rel=1e-6)
        assert other.analysis.parametrization == "ntk" and "ntk parametrization" in str(other)
        layers = [node.ntk for node in standard.nodes if node.op == "linear"]
        assert layers == pytest.approx([(i + 1) * (WIDTH + bias) for i in range(depth)], rel=1e-6)


def test_the_finite_deep_linear_network_has_that_ntk_exactly() -> None:
    """Orthogonal layers keep every norm: sum of squared gradients is n per layer, draw by draw."""
    model = deep(4, 1.0, nn.Identity)
    x = torch.randn(1, WIDTH)
    x = x / x.square().mean().sqrt()
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x)[0]]
    finite = sum(float(g.square().sum()) for row in rows for g in row) / WIDTH
    assert finite == pytest.approx(kgraph.analyze(model, x.repeat(2, 1)).final.ntk, rel=1e-5)
    assert finite != pytest.approx(kgraph.analyze(model, x.repeat(2, 1), parametrization="ntk").final.ntk, rel=0.5)


def test_unknown_parametrization() -> None:
    with pytest.raises(InputError, match="parametrization"):
        kgraph.analyze(deep(2, 1.0, nn.ReLU), torch.randn(2, WIDTH), parametrization="mup")


def normed(kind: str, width: int = 64) -> nn.Module:
    norms = {
        "batch": lambda: nn.BatchNorm2d(width),
        "instance": lambda: nn.InstanceNorm2d(width, affine=True),
        "group": lambda: nn.GroupNorm(4, width),
    }
    layers = [nn.Conv2d(8, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), norms[kind](), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 8, 1))


PLACES, DRAWS = 6, 96


def finite(kind: str) -> tuple[float, float]:
    """Mean squared gradient of an output of the finite network in train mode, through its statistics; its error.

    The batch is of unrelated images, as the analysis takes it.
    """
    model, values = normed(kind).train(), []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -(layer.in_channels**-0.5), layer.in_channels**-0.5, generator)
        x = torch.randn(24, 8, PLACES, PLACES, generator=generator)
        outputs = model(x / x.square().mean(1, keepdim=True).sqrt())[0, :, 2, 3]
        rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in outputs]
        values.append(sum(float(g.square().sum()) for row in rows for g in row) / len(rows))
    measured = torch.tensor(values)
    return float(measured.mean()), float(measured.std()) / DRAWS**0.5


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_norms_subtract_the_ntk_of_the_mean_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 4 standard errors and 5 %, the order of 1/width + 1/entries of a statistic."""

    def predicted() -> float:
        return kgraph.analyze(normed(kind), torch.randn(2, 8, PLACES, PLACES), mode="train").final.ntk

    measured, error = finite(kind)
    own = predicted()
    assert abs(measured - own) < 4 * error + 0.05 * own
    for module in (norm, group_norm):
        monkeypatch.setattr(module, "Removed", lambda cov, slope, ntk: Removed(cov, slope, 0 * ntk))
    left_in = predicted()
    if kind != "group":  # negative control; the mean of 16 channels has little NTK of its own
        assert abs(measured - left_in) > 4 * error + 0.05 * left_in


# ---- where it is shown


@pytest.fixture(scope="module")
def report() -> Report:
    return kgraph.analyze(deep(3, 2.0, nn.ReLU), torch.randn(2, WIDTH))


def test_it_is_the_last_field() -> None:
    last = fields(NodeKernel)[-1]
    assert last.name == "ntk" and math.isnan(last.default)  # type: ignore[arg-type]


def test_table_and_summary_name_the_parametrization(report: Report) -> None:
    text = report.text()
    head = next(line for line in text.splitlines() if line.startswith("name")).split()
    assert head.index("ntk") == head.index("slope") + 1
    last = next(line for line in text.splitlines() if line.startswith("linear_2"))
    assert "96" in last.split()
    assert "NTK 96 (standard parametrization)" in " ".join(text.split())
    assert "ntk: the NTK of an input with itself, standard parametrization" in text


def test_html_json_csv_and_networkx(report: Report) -> None:
    page = report.to_html()
    assert '<th class="n" title="ntk: the NTK of an input with itself, standard parametrization">ntk</th>' in page
    assert "NTK = 96" in page and "<td" in page and ">96</td>" in page
    data = json.loads(report.to_json())
    assert data["parametrization"] == "standard"
    assert data["nodes"][-1]["ntk"] == pytest.approx(96, rel=1e-6)
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert float(lines[-1]["ntk"]) == report.final.ntk
    assert report.to_networkx().nodes[report.final.name]["ntk"] == report.final.ntk
    assert Report.from_json(report.to_json()).final.ntk == report.final.ntk


def test_comparison_shows_both() -> None:
    comparison = kgraph.transform(deep(3, 2.0, nn.ReLU), "tat", torch.randn(2, WIDTH)).kgraph.comparison
    text = comparison.text(width=300)
    assert text.count("NTK 96 (standard parametrization)") == 2
    data = comparison.to_dict()
    assert data["before"]["nodes"][-1]["ntk"] == pytest.approx(96, rel=1e-6)
    assert data["after"]["nodes"][-1]["ntk"] == pytest.approx(96, rel=1e-6)
    assert comparison.to_html().count("NTK = 96") >= 2


def test_reports_written_without_it_are_read(report: Report) -> None:
    data = json.loads(report.to_json())
    del data["parametrization"]
    for node in data["nodes"]:
        del node["ntk"]
    old = Report.from_json(json.dumps(data))
    assert all(math.isnan(node.ntk) for node in old.nodes) and old.analysis.parametrization == "standard"
    assert "ntk" not in old.text() and "NTK" not in old.text()
    assert "ntk" not in Report(relu_chain(3)).text()


def test_it_may_be_infinite_or_unknown(report: Report) -> None:
    nodes = (replace(report.nodes[0], ntk=math.inf), replace(report.nodes[1], ntk=math.nan), *report.nodes[2:])
    odd = Report(replace(report.analysis, nodes=nodes))
    assert Report.from_json(odd.to_json()).to_json() == odd.to_json()
    assert "inf" in odd.text() and odd.to_html()


def test_a_reshape_keeps_it_and_is_folded() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deep(2, 2.0, nn.ReLU)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).unsqueeze(1).flatten(1)

    rows = {row.node.op: row for row in kgraph.analyze(Flat(), torch.randn(2, WIDTH)).rows}
    assert rows["unsqueeze"].folded and rows["unsqueeze"].node.ntk == rows["linear"].node.ntk


class Scaled(nn.Module):
    """One trained number in front of a norm over channels, which undoes it, with a layer before or without."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64) if layer else nn.Identity()
        self.number, self.norm = nn.Parameter(torch.tensor(0.5)), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.number * self.layer(x))


@pytest.mark.parametrize(("layer", "how"), [(True, "exact"), (False, "assumed")])
def test_a_number_that_a_norm_undoes_is_not_exact(layer: bool, how: str) -> None:
    """Its gradient is 0: beside those of a layer's weights it is nothing, alone it is everything."""
    net, x = Scaled(layer).double(), torch.randn(4, 64, dtype=torch.float64)
    row = kgraph.analyze(net, x).final
    net(x).square().sum().mul(0.5).backward()
    assert net.number.grad is not None and abs(float(net.number.grad)) < 1.0  # by eps alone; without the norm 512
    assert row.how == how
