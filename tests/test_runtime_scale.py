"""An equalized learning rate survives a transform: the scale stays in the forward, the parameter is drawn for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Equalized(nn.Module):
    """``x @ (W * scale)``, the scale a number, a buffer or a divisor (Karras et al. 2018, arXiv 1710.10196)."""

    scale: Tensor

    def __init__(self, kind: str, n_in: int = 32, n_out: int = 32) -> None:
        super().__init__()
        self.kind, self.weight, self.bias = (
            kind,
            nn.Parameter(torch.randn(n_out, n_in)),
            nn.Parameter(torch.zeros(n_out)),
        )
        self.register_buffer("scale", torch.tensor(math.sqrt(2 / n_in)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "buffer":
            weight = self.weight * self.scale
        elif self.kind == "number in front":
            weight = math.sqrt(2 / x.shape[1]) * self.weight
        else:
            weight = self.weight / math.sqrt(x.shape[1]) * math.sqrt(2)
        return functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("distribution", ["suo", "gaussian"])
@pytest.mark.parametrize("kind", ["buffer", "number in front", "divided"])
def test_the_scale_is_kept(kind: str, distribution: str) -> None:
    """The computed weight has variance 1 / fan_in, its parameter 1 / 2: gradients see the scale as before."""
    model = nn.Sequential(Equalized(kind), nn.Tanh(), Equalized(kind), nn.Tanh(), nn.Linear(32, 4))
    shaped = kgraph.transform(model, "dks", X, distribution=distribution)
    assert not shaped.kgraph.ledger.unmet
    factor = math.sqrt(2 / 32)
    for name in ("0.weight", "2.weight"):
        weight = shaped.get_parameter(name).detach().double()
        assert float((weight * factor).square().mean()) * 32 == pytest.approx(1, rel=1e-5)
        assert any(note.startswith(f"{name} is used times") for note in shaped.kgraph.ledger.notes)
    with torch.no_grad():
        first = functional.linear(X, shaped.get_parameter("0.weight") * factor)
        shaped.get_parameter("0.weight").mul_(3.0)
    seen: list[Tensor] = []
    shaped.get_submodule("1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    shaped(X)
    assert torch.allclose(seen[0], 3 * first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["edge-of-chaos", "ntk-chaos"])
@pytest.mark.parametrize("kind", ["buffer", "number in front", "divided"])
def test_the_scale_is_kept_by_systems(kind: str, method: str) -> None:
    """What each layer computes is what the same layer without a scale gets: the same seed, the weight itself drawn."""
    scaled = nn.Sequential(Equalized(kind), nn.Tanh(), Equalized(kind), nn.Tanh(), nn.Linear(32, 4))
    plain = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        for name in ("0.bias", "2.bias"):
            plain.get_parameter(name).zero_()  # as the scaled layers have it
    shaped, oracle = kgraph.transform(scaled, method, X), kgraph.transform(plain, method, X)
    ledger = shaped.kgraph.ledger
    assert "remove weight normalization" not in ledger.counts() and ledger.unmet == oracle.kgraph.ledger.unmet
    for name in ("0.weight", "2.weight"):
        assert torch.allclose(shaped.get_parameter(name) * math.sqrt(2 / 32), oracle.get_parameter(name), atol=1e-6)
        assert any(note.startswith(f"{name} is used times") for note in ledger.notes)
    with torch.no_grad():
        assert torch.allclose(shaped(X), oracle(X), atol=1e-5)


def test_a_norm_of_the_weight_is_still_removed() -> None:
    """Weight standardization would normalize the new weight away: no plain factor."""

    class Standardized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            centred = self.weight - self.weight.mean(1, keepdim=True)
            return functional.linear(x, centred / centred.std(1, keepdim=True) * 0.1, self.bias)

    shaped = kgraph.transform(nn.Sequential(Standardized(32, 32), nn.Tanh(), nn.Linear(32, 4)), "dks", X)
    assert "remove weight normalization" in shaped.kgraph.ledger.counts()
    assert not [note for note in shaped.kgraph.ledger.notes if "is used times" in note]
