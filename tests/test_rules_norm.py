"""Normalization layers, their gains and shifts, and what a nonlinearity makes of the result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracles import IMAGE, VECTOR, Body, dense, disagreements, images, ntk_ratio, vectors
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.rules import table

relu = torch.relu
aten = torch.ops.aten


def waves(width: int) -> Tensor:
    return torch.sin(40 * torch.arange(width) / width)


def layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width)


def trained(width: int) -> nn.Module:
    """A layer norm whose gains and shifts go together, channel by channel."""
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.9 * waves(width))
        norm.bias.copy_(0.2 + 0.6 * waves(width))
    return norm


def running(width: int) -> nn.Module:
    """A batch norm with statistics, gains and shifts of their own."""
    norm = nn.BatchNorm2d(width)
    with torch.no_grad():
        norm.running_mean.copy_(0.3 + 0.5 * waves(width))  # type: ignore[union-attr]
        norm.running_var.copy_(1.6 + 1.3 * waves(width).roll(5))  # type: ignore[union-attr]
        norm.weight.copy_(1 + 0.5 * waves(width).roll(9))
        norm.bias.copy_(0.2 - 0.4 * waves(width))
    return norm


VECTORS = {
    "layer norm": vectors(lambda u, n: n(relu(u)), layer_norm),
    "layer norm, relu": vectors(lambda u, n: relu(n(relu(u))), layer_norm),
    "layer norm, trained, tanh": vectors(lambda u, n: torch.tanh(n(u)), trained),
    "layer norm, trained, relu": vectors(lambda u, n: relu(n(relu(u)) - 0.5), trained),
    "layer norm of a cat": lambda w: Body(
        lambda u, n: n(torch.cat([3 * relu(u), u], -1)), dense(w), nn.LayerNorm(2 * w)
    ),
    "rms norm": vectors(lambda u, n: n(relu(u)), lambda width: nn.RMSNorm(width)),
    "normalize": vectors(lambda u: functional.normalize(relu(u), dim=-1) * u.shape[-1] ** 0.5),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_network_agrees(name: str) -> None:
    skip = ("slope",) if name == "normalize" else ()  # drawn: the derivative of one network by another
    assert disagreements(VECTORS[name], VECTOR, skip=skip) == []


NORMS = {
    "group of all": lambda width: nn.GroupNorm(1, width),
    "groups of 8": lambda width: nn.GroupNorm(width // 8, width),
    "groups of 2": lambda width: nn.GroupNorm(width // 2, width),
    "groups of 1": lambda width: nn.GroupNorm(width, width),
    "instance": lambda width: nn.InstanceNorm2d(width),
    "batch, running": running,
}


LARGE = replace(IMAGE, positions=(10, 10))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("after", [lambda u: u, relu], ids=["", "relu"])
def test_images_agree(name: str, after) -> None:
    assert disagreements(images(lambda u, n: after(n(relu(u))), NORMS[name]), LARGE) == []


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_agrees_with_a_background(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 1), nn.ReLU(), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 1))
    inputs = torch.randn(2, 64, 6, 6)
    report = kgraph.analyze(model, inputs, mode=mode)
    measured = kgraph.montecarlo(model, inputs, mode=mode, draws=16)
    assert measured.disagreements(report.analysis) == []


def test_a_norm_that_keeps_the_mean_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rms = table.find_rule(aten.rms_norm.default)
    monkeypatch.setitem(table._RULES, aten.layer_norm.default, lambda context, x, shape, *_: rms(context, x, shape))
    assert disagreements(VECTORS["layer norm"], VECTOR)


def test_running_statistics_taken_as_batch_statistics_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = table.find_rule(aten.batch_norm.default)

    def wrong(context, x, weight, bias, mean, variance, *rest):
        return right(context, x, weight, bias, None, None, *rest)

    monkeypatch.setitem(table._RULES, aten.batch_norm.default, wrong)
    assert disagreements(images(lambda u, n: n(relu(u)), running), IMAGE)


def test_layer_norm_subtracts_the_mean() -> None:
    """After a relu the mean is sqrt(1/(2 pi)); a rule without it (an RMS norm) is far off."""
    body = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.LayerNorm(64, eps=0.0))
    row = kgraph.analyze(body, torch.randn(2, 64)).final
    relu_c0 = mean_square = 1 / math.pi  # c(0) of a relu, and m^2 / q
    assert row.c[0] == pytest.approx((relu_c0 - mean_square) / (1 - mean_square), abs=1e-9)
    assert abs(row.c[0] - relu_c0) > 0.3


def test_the_ntk_behind_a_norm_is_that_of_the_network() -> None:
    ratio = ntk_ratio(vectors(lambda u, n, a: a(relu(n(relu(u)))), layer_norm, dense), VECTOR)
    assert ratio.value == pytest.approx(1.0, abs=4 * ratio.error + 8 / VECTOR.width)
    assert ratio.error < 0.15


def test_a_batch_norm_of_channels_that_are_dead_or_alive_says_that_one_variance_is_assumed() -> None:
    """Behind relu(W relu(V x)) the channels' variances differ: of dead ones the norm makes as much as of others."""

    def behind(*layers: nn.Module) -> str:
        model = nn.Sequential(nn.Linear(64, 64, bias=False), *layers, nn.BatchNorm1d(64)).train()
        node = kgraph.analyze(model, torch.randn(8, 64)).nodes[-1]
        return f"{node.how} {node.note}"

    assert behind(nn.ReLU(), nn.Linear(64, 64, bias=False)).startswith("exact")
    assert behind(nn.ReLU()).startswith("exact")  # unrelated inputs share nothing in front of the relu
    assert "channels of many variances" in behind(nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU())


@pytest.mark.parametrize(("share", "how"), [(1.0, "assumed"), (0.5, "exact")])
def test_what_a_norm_leaves_of_its_input_is_noise(share: float, how: str) -> None:
    """x - x / sigma of q = 1.01: (sigma - 1)^2 = 2.5e-5 is left, and 1 / (2 C) = 8e-3 of sigma's noise with C = 64."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(64, 64, bias=False), nn.LayerNorm(64, 1e-12, elementwise_affine=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x - share * self.norm(x)

    model = Left()
    with torch.no_grad():
        model.layer.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.layer.weight.mul_((1.01 / 64 / model.layer.weight.square().mean()).sqrt())
    found = kgraph.analyze(model, torch.randn(2, 64)).final
    assert found.how == how
    assert found.q == pytest.approx((1.01**0.5 - share) ** 2, rel=1e-3)
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        measured = float(model(x).square().mean())
    assert (abs(measured / found.q - 1) < 0.1) == (how == "exact")


def test_a_gain_beside_what_it_stands_on_is_assumed() -> None:
    """sin(3 (BN(x) - x)): the tangent of the gain is x itself, and E[f'^2 x^2] is no E[f'^2] E[x^2]."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(64)
            nn.init.constant_(self.norm.weight, 0.7)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3 * (self.norm(x) - x))

    found = kgraph.analyze(Beside().eval(), torch.randn(2, 64)).final
    by_bias = 4.5 * (1 + math.exp(-1.62))  # f' = 3 cos(.9 x)
    by_gain = 4.5 * (1 + math.exp(-1.62) * (1 - 1.8**2))
    assert abs(found.ntk / (by_bias + by_gain) - 1) > 0.1
    assert found.how == "assumed"
