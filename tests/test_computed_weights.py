"""Weights that a forward computes: a normalization may go with its parameter drawn anew, a mask or a constraint not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import kgraph

X = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


class Computed(nn.Module):
    """Two layers; the weight of the second is computed."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.compute = nn.Linear(24, 24), nn.Linear(24, 24), compute
        self.register_buffer("mask", torch.ones(24, 24).tril())

    def forward(self, x: Tensor) -> Tensor:
        mask = self.get_buffer("mask")
        x = torch.relu(functional.linear(x, self.compute(self.first.weight, mask)))
        return functional.linear(x, self.compute(self.second.weight, mask), self.second.bias)


def jacobian(model: nn.Module) -> Tensor:
    return torch.autograd.functional.jacobian(lambda x: model(x[None])[0], X[0])


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_a_mask_stays(method: str) -> None:
    """An autoregressive network (MADE): no output depends on a later input."""
    model = Computed(lambda weight, mask: weight * mask)
    assert not jacobian(model).triu(1).any()
    shaped = kgraph.transform(model, method, X)
    assert not jacobian(shaped).triu(1).any() and jacobian(shaped).tril().any()
    assert any("first.weight" in line and "kept" in line for line in shaped.kgraph.ledger.unmet)
    assert "remove weight normalization" not in shaped.kgraph.ledger.counts()


def test_signs_stay() -> None:
    shaped = kgraph.transform(Computed(lambda weight, _: functional.softplus(weight)), "tat", X)
    assert bool((jacobian(shaped) >= 0).all())
    assert any("softplus" in line for line in shaped.kgraph.ledger.unmet)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_pruned_entries_stay_pruned() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    prune.random_unstructured(model[0], "weight", 0.8)
    shaped = kgraph.transform(model, "tat", X)
    (gradient,) = torch.autograd.grad(shaped(X).square().sum(), [shaped.get_parameter("0.weight_orig")])
    assert float((gradient != 0).double().mean()) <= 0.2 + 1e-9
    assert any("weight_orig" in line for line in shaped.kgraph.ledger.unmet)


@pytest.mark.parametrize(
    "compute",
    [
        lambda weight, _: functional.normalize(weight, dim=1),
        lambda weight, _: (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True),
    ],
)
def test_normalizations_go(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    shaped = kgraph.transform(Computed(compute), "tat", X)
    assert shaped.kgraph.ledger.counts()["remove weight normalization"] == 2
    assert not shaped.kgraph.ledger.unmet


def test_a_transposed_weight_is_drawn_in_its_place() -> None:
    shaped = kgraph.transform(Computed(lambda weight, _: weight.t()), "tat", X)
    assert "remove weight normalization" not in shaped.kgraph.ledger.counts()
    weight = shaped.get_parameter("second.weight").detach()
    assert float(weight.square().mean() * 24) == pytest.approx(1, rel=1e-3)
    code = jacobian(shaped)
    assert torch.isfinite(code).all()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def test_a_lost_constraint_is_unmet() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))

    held, normed = network(), network()
    nn.utils.parametrize.register_parametrization(held[0], "weight", Symmetric())
    nn.utils.parametrizations.weight_norm(normed[0])
    assert any("0.weight is held" in line for line in kgraph.transform(held, "tat", X).kgraph.ledger.unmet)
    assert not kgraph.transform(normed, "tat", X).kgraph.ledger.unmet
