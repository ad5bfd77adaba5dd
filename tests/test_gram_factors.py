"""Gains of norms straight in front of a nonlinearity: their part of the NTK against networks of finite width."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from gaussian_weights import with_gaussian_weights
from gram_montecarlo import SIGMAS
from torch import Tensor, nn

import kgraph
from kgraph.gram.factors import Factor, factors, holds_factor
from kgraph.gram.field import Known, Leaf, Product, Sum
from kgraph.gram.kinds import mapped
from kgraph.maps import pointwise
from kgraph.maps.tangent import homogeneous

WIDTH, DRAWS = 256, 16
Net = TypeVar("Net", bound=nn.Module)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def network(activation: Callable[[], nn.Module], bias: float = 0.0) -> nn.Sequential:
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight.fill_(0.8)
        norm.bias.fill_(bias)
    return nn.Sequential(nn.Linear(8, WIDTH), norm, activation(), nn.Linear(WIDTH, 16))


def part(model: nn.Module, name: str) -> dict[str, float | Tensor]:
    return {own: float(own == name) for own, _ in model.named_parameters()}


@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("parameter", ["1.weight", "1.bias"])
def test_part_of_a_norm(name: str, bias: float, parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four standard errors and 5 / width a layer; a gradient independent of the field is not, for gains."""
    torch.manual_seed(0)
    model = network(ACTIVATIONS[name], bias)
    alone = part(model, parameter)
    found = kgraph.ntk(model, X, multipliers=alone)
    draws = [kgraph.empirical_ntk(network(ACTIVATIONS[name], bias), X, multipliers=alone).matrix for _ in range(DRAWS)]
    measured, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / DRAWS**0.5
    allowed = SIGMAS * error + 2 * 2.5 / WIDTH * found.diagonal().max()
    assert bool(((found - measured).abs() <= allowed).all())
    if parameter == "1.weight":
        monkeypatch.setattr(mapped, "factors", lambda u: None)
        assert bool(((kgraph.ntk(model, X, multipliers=alone) - measured).abs() > allowed).any())


class Scaled(nn.Module):
    """A residual sum whose branch is scaled by a vector, straight into a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.branch, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        return self.out(torch.tanh(h + self.scale * self.branch(torch.relu(h))))


def test_what_is_not_known_is_assumed() -> None:
    assert kgraph.kernels(Scaled(), X).how == "assumed"
    assert kgraph.kernels(without_biases(Scaled()), X, with_ntk=False).how != "assumed"
    assert kgraph.kernels(with_gaussian_weights(network(nn.ReLU)), X).how == "exact"


def test_factors_are_found() -> None:
    t, c, b = (
        Leaf(()),
        Known((), data=torch.full((1, 3), 2.0), own={"ntk": 3.0}),
        Known((), data=torch.full((1, 3), 0.75)),
    )
    alone = factors(t)
    assert alone is not None and alone.still is t and not alone.each and not holds_factor(t)
    inner = Product((), left=t, right=c)
    outer = factors(
        Sum((), terms=((1.0, Product((), left=Sum((), terms=((1.0, inner), (1.0, b))), right=c)), (-2.0, b)))
    )
    assert outer is not None and not holds_factor(outer.still)
    assert outer.each == (Factor(0.0, 2.0, c), Factor(-1.5, 2.0, c))
    uneven = Product((), left=t, right=Known((), data=torch.arange(3.0)[None], own={"ntk": 1.0}))
    assert factors(uneven) is None and holds_factor(uneven)


class Twice(nn.Module):
    """Two gains with a shift between them, and two functions of the result, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.mid, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)
        self.inner, self.outer = nn.Parameter(torch.full((WIDTH,), 0.8)), nn.Parameter(torch.full((WIDTH,), 1.3))
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.9))

    def forward(self, x: Tensor) -> Tensor:
        z = self.outer * (self.inner * self.read(x) + self.shift)
        return self.out(torch.relu(self.mid(torch.tanh(z)) + self.mid(torch.relu(z))))


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_part_of_a_gain_behind_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each against its own shift: within four standard errors and 5 / width a layer; one shift for both is not."""
    torch.manual_seed(0)
    alone = part(Twice(), name)
    found = kgraph.kernels(Twice(), X, multipliers=alone)
    assert found.how in ("exact", "quadrature") and found.ntk is not None
    draws = torch.stack([kgraph.empirical_ntk(Twice(), X, multipliers=alone).matrix for _ in range(DRAWS)])
    allowed = SIGMAS * draws.std(0) / DRAWS**0.5 + 3 * 2.5 / WIDTH * found.ntk.diagonal().max()
    assert bool(((found.ntk - draws.mean(0)).abs() <= allowed).all())
    by_factor = mapped.by_factor
    monkeypatch.setattr(mapped, "by_factor", lambda fn, b: by_factor(fn, 0.0 if b else 1.17))
    wrong = kgraph.ntk(Twice(), X, multipliers=alone)
    assert bool(((wrong - draws.mean(0)).abs() > allowed).any())


def test_homogeneous_functions() -> None:
    assert homogeneous(pointwise("relu")) and homogeneous(pointwise("leaky_relu", 0.1))
    assert not homogeneous(pointwise("tanh")) and not homogeneous(pointwise("gelu_exact"))


def without_biases(model: Net) -> Net:
    """`kgraph.analyze` knows that the first layer's are uniform; in `kgraph.kernels` functions with kinks do not."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            break
    return with_gaussian_weights(model)


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("name", ["relu", "tanh", "prelu"])
def test_analyze_agrees(name: str, bias: float, parametrization: str) -> None:
    """Inputs of q = 1, with one another at c = 0: the diagonal of the NTK is what `kgraph.analyze` reports."""
    model = without_biases(network(nn.PReLU if name == "prelu" else ACTIVATIONS[name], bias))
    x = torch.eye(8, dtype=torch.float64)[:3] * 8**0.5
    found = kgraph.kernels(model, x, parametrization=parametrization).ntk
    reported = kgraph.analyze(model, x.float(), parametrization=parametrization).final.ntk
    assert found is not None and reported == pytest.approx(float(found.diagonal().mean()), rel=1e-7)


def test_analyze_of_stored_statistics() -> None:
    """BatchNorm in eval mode is a map of every channel; its gain is a factor too."""
    norm = nn.BatchNorm1d(WIDTH)
    model = without_biases(nn.Sequential(nn.Linear(8, WIDTH), norm, nn.Tanh(), nn.Linear(WIDTH, 16))).eval()
    x = torch.eye(8, dtype=torch.float64)[:3] * 8**0.5
    found = kgraph.kernels(model, x, parametrization="ntk").ntk
    reported = kgraph.analyze(model, x.float(), parametrization="ntk").final.ntk
    assert found is not None and reported == pytest.approx(float(found.diagonal().mean()), rel=1e-6)


class Typed(nn.Module):
    """Token, type and position embeddings, as in BERT: one row of types for all positions, a row each of places."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.kind, self.place = nn.Embedding(9, WIDTH), nn.Embedding(2, WIDTH), nn.Embedding(5, WIDTH)
        self.out = nn.Linear(WIDTH, 16)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.out(torch.tanh(self.token(ids) + self.kind(torch.zeros_like(ids[:1])) + self.place(places))).mean(1)


@pytest.mark.parametrize("name", ["kind.weight", "place.weight"])
def test_one_row_for_all_positions(name: str) -> None:
    """Within four standard errors, 5 / width a layer and the draws' own; a row for each position is 1/5 of it or so."""
    torch.manual_seed(0)
    model, ids = Typed(), torch.tensor([[0, 1, 2, 3, 4], [5, 1, 6, 7, 8]])
    alone = part(model, name)
    found = kgraph.ntk(model, ids, multipliers=alone)
    draws = torch.stack([kgraph.empirical_ntk(Typed(), ids, multipliers=alone).matrix for _ in range(DRAWS)])
    allowed = SIGMAS * draws.std(0) / DRAWS**0.5 + (2 * 2.5 / WIDTH + 4 * (5 / 8192) ** 0.5) * found.diagonal().max()
    assert bool(((found - draws.mean(0)).abs() <= allowed).all())
    other = kgraph.ntk(model, ids, multipliers=part(model, "place.weight" if name == "kind.weight" else "kind.weight"))
    assert bool(((other - draws.mean(0)).abs() > allowed).any())
