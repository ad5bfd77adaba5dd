"""NTKChaos: what it sets, where it puts r, and that its parameter groups train the NTK form step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph import NTKChaos
from kgraph.errors import InputError, TargetError
from kgraph.meanfield.order_chaos import activation_moments
from kgraph.modules import ShapedActivation
from kgraph.parent_scale import ParentScale

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
DOUBLE = torch.float64


def mlp(width: int = 400, activation: type[nn.Module] = nn.ReLU, norm: str = "") -> nn.Sequential:
    """Three weight layers; a LayerNorm in front of ("pre") or behind ("post") each activation."""
    layers: list[nn.Module] = []
    for fan_in in (16, width):
        own = {"pre": [nn.LayerNorm(width), activation()], "post": [activation(), nn.LayerNorm(width)]}
        layers += [nn.Linear(fan_in, width), *own.get(norm, [activation()])]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def activations(model: nn.Module) -> list[ShapedActivation]:
    return [module for module in model.modules() if isinstance(module, ShapedActivation)]


def moments_of(model: nn.Module) -> list[tuple[float, float]]:
    found = [activation_moments(module) for module in activations(model)]
    return [(m.mean, m.second) for m in found]


def test_weights_biases_and_activations() -> None:
    shaped: Any = kgraph.transform(mlp(), "ntk-chaos", X)
    record = shaped.kgraph
    assert record.method == NTKChaos() and not record.ledger.unmet
    for layer, fan_in in zip([shaped.get_submodule(n) for n in "024"], (16, 400, 400), strict=True):
        assert float(layer.weight.detach().double().std()) == pytest.approx(math.sqrt(0.99 / fan_in), rel=0.05)
    assert float(shaped.get_submodule("2").bias.detach().std()) == pytest.approx(0.1, rel=0.15)
    for mean, second in moments_of(shaped):
        assert abs(mean) < 1e-9 and second == pytest.approx(1, abs=1e-9)
    for node in record.after.nodes:
        if node.op == "linear":
            assert node.q == pytest.approx(1, abs=0.15)  # the weights' own mean square
    assert "r = 1.45227, chaos" in record.ledger.changes[0].why
    assert shaped.kgraph.ledger.counts() == {"balance activation": 2, "draw linear": 3}


@pytest.mark.parametrize("r", [0.5, 1.0, 1.3])
def test_wanted_r_is_what_the_ntk_has(r: float) -> None:
    """Theta(x, x) = (1 - r^L) / (1 - r) in the limit; L = 3."""
    shaped: Any = kgraph.transform(mlp(8), NTKChaos(r=r), X)
    x = torch.nn.functional.normalize(torch.randn(3, 16, dtype=DOUBLE)) * 4
    variances = {f"{i}.weight": 0.99 / n for i, n in ((0, 16), (2, 8), (4, 8))} | {f"{i}.bias": 0.01 for i in (0, 2, 4)}
    theta = kgraph.ntk(shaped, x, parametrization="ntk", variances=variances)
    assert torch.allclose(theta.diagonal(), torch.tensor(1 + r + r * r, dtype=DOUBLE), rtol=1e-9)


def test_unreachable_r_names_the_range_and_the_layer() -> None:
    with pytest.raises(TargetError, match=r"r = 2 is out of reach: .*\(0, 1\.45227\] \(at node 'relu'\)"):
        kgraph.transform(mlp(8), NTKChaos(r=2.0), X)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.PReLU, nn.Softplus])
def test_other_activations(activation: type[nn.Module]) -> None:
    shaped: Any = kgraph.transform(mlp(64, activation), NTKChaos(form="standardized"), X)
    assert shaped.kgraph.ledger.counts()["balance activation"] == 2
    assert torch.isfinite(shaped(X)).all()
    if activation is not nn.PReLU:
        assert all(second == pytest.approx(1, abs=1e-9) for _, second in moments_of(shaped))


def test_norms_go_as_the_theory_says() -> None:
    """In front: nothing is left of it. Behind: the activation is normalized, though the others are standardized."""
    pre: Any = kgraph.transform(mlp(norm="pre"), NTKChaos(form="standardized"), X)
    post: Any = kgraph.transform(mlp(norm="post"), NTKChaos(form="standardized"), X)
    assert all(mean == pytest.approx(1 / math.sqrt(math.pi), abs=1e-9) for mean, _ in moments_of(pre))
    assert all(mean == pytest.approx(0, abs=1e-9) for mean, _ in moments_of(post))
    assert not [m for m in (*pre.modules(), *post.modules()) if isinstance(m, nn.LayerNorm)]
    assert "LayerNorm behind it was the normalized form" in str(post.kgraph.ledger.changes)
    wanted: Any = kgraph.transform(mlp(norm="post"), NTKChaos(r=1.1), X)
    r = [activation_moments(a).r(0.1) for a in activations(wanted)]
    assert r == pytest.approx([1.1, 1.1], abs=1e-9)


def test_layers_without_bias_keep_q() -> None:
    model = nn.Sequential(nn.Linear(16, 900, bias=False), nn.ReLU(), nn.Linear(900, 4, bias=False))
    shaped: Any = kgraph.transform(model, NTKChaos(beta=0.5), X)
    assert float(shaped.get_submodule("2").weight.detach().double().std()) == pytest.approx(1 / 30, rel=0.05)
    rates = {group["name"]: group["lr"] for group in kgraph.param_groups(shaped, lr=1.0)}
    assert rates == pytest.approx({"0.weight": 1 / 16, "2.weight": 1 / 900})


def test_decoder_gets_graph_parametrization_and_the_fan_in_of_its_bulk() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(16, 256, 4, 1, 0), nn.BatchNorm2d(256), nn.ReLU(), nn.ConvTranspose2d(256, 8, 4, 2, 1)
        )

    x = torch.randn(2, 16, 1, 1)
    shaped: Any = kgraph.transform(build(), NTKChaos(), x)
    assert len([m for m in shaped.modules() if isinstance(m, ParentScale)]) == 1  # the first has one parent everywhere
    std = [float(shaped.get_submodule(n).weight.detach().double().std()) for n in "03"]
    assert std == pytest.approx([math.sqrt(0.99 / 16), math.sqrt(0.99 / (256 * 4))], rel=0.05)
    uniform: Any = kgraph.transform(build(), NTKChaos(graph=False), x)
    assert not [m for m in uniform.modules() if isinstance(m, ParentScale)]
    for node in shaped.kgraph.after.nodes:
        if node.op in ("conv_transpose2d", "ParentScale"):
            assert node.q == pytest.approx(1, abs=0.35)
    assert shaped.kgraph.after.final.q == pytest.approx(1, abs=0.1)
    assert uniform.kgraph.after.final.q < 0.9  # borders and all


def test_what_is_left_alone_is_said() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return torch.sigmoid(self.c(torch.relu(h + self.b(torch.relu(h)))))

    ledger = kgraph.transform(Residual(), NTKChaos(), X).kgraph.ledger
    assert any("not 1, at the input of" in line for line in ledger.unmet)
    assert any("output nonlinearity" in change.why for change in ledger.kept)


class NTKForm(nn.Module):
    """z = c W a + beta b with unit normal parameters, beside the standard model that it equals."""

    def __init__(self, model: nn.Sequential, beta: float) -> None:
        super().__init__()
        self.model = model
        self.scales = [math.sqrt((1 - beta**2) / layer.weight.shape[1]) for layer in self.layers()]
        with torch.no_grad():
            self.weights = nn.ParameterList([m.weight / c for m, c in zip(self.layers(), self.scales, strict=True)])
            self.biases = nn.ParameterList([m.bias / beta for m in self.layers()])
        self.beta = beta

    def layers(self) -> list[Any]:
        return [m for m in self.model.children() if isinstance(m, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        at = 0
        for module in self.model.children():
            if isinstance(module, nn.Linear):
                x = self.scales[at] * x @ self.weights[at].T + self.beta * self.biases[at]
                at += 1
            else:
                x = module(x)
        return x


def test_sgd_follows_the_ntk_parametrization() -> None:
    """reference ntk_param_equivalence: the same functions after every one of 50 steps."""
    beta, eta = 0.3, 0.4
    generator = torch.Generator().manual_seed(1)
    model = mlp(32, nn.Tanh).double()
    shaped: Any = kgraph.transform(model, NTKChaos(beta=beta), X.double())
    children = [shaped.get_submodule(name) for name in "01234"]
    reference = NTKForm(nn.Sequential(*children), beta)
    x, y = (torch.randn(16, n, generator=generator, dtype=DOUBLE) for n in (16, 5))
    ours = torch.optim.SGD(kgraph.param_groups(shaped, lr=eta))
    theirs = torch.optim.SGD([*reference.weights, *reference.biases], lr=eta)
    start = float((shaped(x) - y).square().mean().detach())
    worst = 0.0
    for _ in range(50):
        worst = max(worst, float((shaped(x) - reference(x)).abs().max().detach()))
        for network, optimizer in ((shaped, ours), (reference, theirs)):
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            optimizer.step()
    assert worst < 1e-12
    assert float((shaped(x) - y).square().mean().detach()) < 0.5 * start  # and it learnt
    plain = torch.optim.SGD(shaped.parameters(), lr=eta)  # negative control: one rate for all
    for optimizer, network in ((plain, shaped), (theirs, reference)):
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
    assert float((shaped(x) - reference(x)).abs().max().detach()) > 1e-3


def test_layer_dependent_rates() -> None:
    """S^(-l/2), l = 0 next to the input, S the product of a layer's strides over both dimensions."""
    layers = [nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.ReLU()] * 3
    model = nn.Sequential(*[type(m)(4, 4, 4, 2, 1) if isinstance(m, nn.ConvTranspose2d) else m for m in layers[:-1]])
    x = torch.randn(2, 4, 4, 4)
    plain = {g["name"]: g["lr"] for g in kgraph.param_groups(model, lr=2.0, beta=0.1, example_inputs=x)}
    assert plain == pytest.approx(
        {f"{i}.{k}": 2.0 * v for i in (0, 2, 4) for k, v in (("weight", 0.99 / 16), ("bias", 0.01))}
    )
    scaled = kgraph.param_groups(model, lr=2.0, beta=0.1, example_inputs=x, stride_exponent=0.5)
    for group in scaled:
        assert group["lr"] == pytest.approx(plain[group["name"]] * 4.0 ** (-int(group["name"][0]) / 4))
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3))
    groups = kgraph.param_groups(encoder, lr=1.0, beta=0.0, example_inputs=torch.randn(2, 3, 9, 9), stride_exponent=0.5)
    assert groups[2]["lr"] == pytest.approx(2 / 36)  # positions become fewer


def test_groups_cover_every_parameter() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.PReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
    groups = kgraph.param_groups(model, lr=0.5, beta=0.1, example_inputs=X)
    assert [g["name"] for g in groups] == [name for name, _ in model.named_parameters()]
    assert {g["name"]: g["lr"] for g in groups}["1.weight"] == 0.5
    torch.optim.Adam(groups)
    with pytest.raises(InputError, match="not made by NTKChaos"):
        kgraph.param_groups(model, lr=0.5, example_inputs=X)


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": -0.1}, {"r": 0.0}, {"form": "whitened"}], ids=str)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        NTKChaos(**options)


def test_composes_with_nothing_that_sets_the_same() -> None:
    with pytest.raises(InputError, match="both set the model's"):
        kgraph.transform(mlp(), [NTKChaos(), "dks"], X)
    from kgraph.passes.base import Pipeline

    recipe = str(Pipeline(NTKChaos().passes()))
    assert [line.split("(")[0] for line in recipe.splitlines()] == [
        "1. NoteNorms",
        "2. RemoveNorms",
        "3. BalanceActivations",
        "4. DrawNTK",
        "5. GraphParametrize",
    ]
