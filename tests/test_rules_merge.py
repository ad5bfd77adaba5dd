"""Sums, products, concatenations: independent, one function of a tensor, or sharing weights out of sight."""

from __future__ import annotations

import pytest
import torch
from oracles import IMAGE, VECTOR, Body, dense, disagreements, images, pixelwise, vectors
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph import algebra, entries
from kgraph.kernel import Pairs, Part
from kgraph.maps import relu as relu_map
from kgraph.roots import Root, Roots

relu = torch.relu


def gaussian(name: str, q: float = 1.0) -> Part:
    """A fresh Gaussian part whose cosines are the inputs'; positions uncorrelated."""
    c = Pairs().inputs
    cov = torch.stack([c * q, 0 * c], 1)
    slope = torch.stack([torch.full_like(c, q), 0 * c], 1)
    return Part(8, cov, slope, 0 * cov, 0.0, Roots({Root(name)}))


def varied(width: int) -> nn.Module:
    """Gains and shifts that go together, channel by channel."""
    norm, t = nn.LayerNorm(width), torch.arange(width) / width
    with torch.no_grad():
        norm.weight.copy_(1 + 0.9 * torch.sin(40 * t))
        norm.bias.copy_(0.2 + 0.6 * torch.sin(40 * t))
    return norm


VECTORS = {
    "x + x": vectors(lambda u: u + u),
    "x * x": vectors(lambda u: u * u),
    "x + relu(x)": vectors(lambda u: u + relu(u)),
    "the skip": vectors(lambda u, a: relu(u) + a(relu(u)), dense),
    "relu after a sum": vectors(lambda u, a: relu(relu(u) + a(u)), dense),
    "gate": vectors(lambda u, a, b: a(u) * torch.sigmoid(b(u)), dense, dense),
    "product of dependent": vectors(lambda u, a: u * torch.tanh(u + a(u)), dense),
    "quotient": vectors(lambda u, a: u / (1 + a(u).abs()), dense),
    "maximum": vectors(lambda u, a: torch.maximum(u, a(u)), dense),
    "where another is positive": vectors(lambda u, a: torch.where(u > 0, u, a(u)), dense),
    "glu": vectors(lambda u, a: functional.glu(a(u), -1), lambda width: nn.Linear(width, 2 * width)),
    "cat, then relu": vectors(lambda u, a: relu(torch.cat([u, u + a(u)], -1)), dense),
    "cat of x and relu(x)": vectors(
        lambda u, a: relu(a(torch.cat([u, relu(u)], -1))), lambda width: nn.Linear(2 * width, width)
    ),
    "stack of dependent": vectors(lambda u: torch.stack([relu(u), u], 1).mean(1)),
    "stack of independent": vectors(lambda u, a: torch.stack([relu(u), a(u)], 1).mean(1), dense),
    "a known tensor added": vectors(lambda u, n: relu(u + n.bias), varied),
    "a known tensor multiplied": vectors(lambda u, n: torch.tanh(3 * u * n.bias), varied),
    "one channel for all": vectors(lambda u, a: relu(u) * a(u)[:, :1], dense),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_network_agrees(name: str) -> None:
    jumps = ("slope",) if name == "where another is positive" else ()  # infinite, which no derivative tells
    assert disagreements(VECTORS[name], VECTOR, skip=jumps) == []


IMAGES = {
    "cat of positions": images(lambda u, c: torch.cat([relu(u), c(u)], 2), pixelwise),
    "cat of dependent positions": images(lambda u: torch.cat([relu(u), u], 2)),
    "squeeze and excite": images(
        lambda u, c: relu(u) * torch.sigmoid(c(relu(u).mean((2, 3), keepdim=True))), pixelwise
    ),
    "minus its own mean": images(lambda u: relu(u) - relu(u).mean((2, 3), keepdim=True)),
    "minus its own pool": images(lambda u: functional.avg_pool2d(relu(u), 3, 1, 1) - relu(u)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_positions_agree(name: str) -> None:
    assert disagreements(IMAGES[name], IMAGE) == []


@pytest.mark.parametrize("name", ["product of dependent", "x + relu(x)"])
def test_independence_in_the_place_of_knowledge_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "_common_function", lambda left, right, combine: None)
    monkeypatch.setattr(algebra, "entangled", lambda left, right: False)
    monkeypatch.setattr(Part, "independent", lambda self, other: True)
    assert disagreements(VECTORS[name], VECTOR)


def test_a_doubled_tensor_has_four_times_the_kernel() -> None:
    part = gaussian("w")
    assert torch.allclose(algebra.add(part, part).cov, 4 * part.cov)
    assert torch.allclose(algebra.add(part, gaussian("v")).cov, 2 * part.cov)


def test_x_plus_relu_x_is_one_function() -> None:
    part = gaussian("w")
    both = algebra.add(part, algebra.apply(relu_map(), part))
    assert float(both.q) == pytest.approx(2.5, rel=1e-9)  # E[x^2 (2 if x > 0 else 1)^2] = (4 + 1) / 2


def test_relu_after_a_post_activation_sum_uses_the_true_law() -> None:
    total = algebra.add(algebra.apply(relu_map(), gaussian("w")), gaussian("v"))
    result = algebra.apply(relu_map(), total)
    u, v = torch.randn(2, 2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = relu(relu(u) + v).square()
    error = float(square.std() / len(square) ** 0.5)
    assert float(result.q) == pytest.approx(float(square.mean()), abs=4 * error)
    assert abs(float(result.q) - float(total.q) / 2) > 0.3, "a zero-mean Gaussian would have half"
    assert result.how.name == "quadrature"


def test_slices_of_one_layer_are_independent() -> None:
    part = gaussian("w")
    left, right = entries.slice_part(part, 0, 4, "of 8"), entries.slice_part(part, 4, 8, "of 8")
    assert left.independent(right)
    assert not left.independent(part)
    assert torch.allclose(algebra.multiply(left, right).cov, part.cov.square())


def test_a_class_token_before_the_others() -> None:
    class Token(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.token.expand(len(x), -1, -1), x], 1)

    from oracles import SEQUENCE

    assert disagreements(lambda width: Body(lambda u, t: t(relu(u)), dense(width), Token(width)), SEQUENCE) == []


class Token(nn.Module):
    """A trained token in front of a sequence, and nothing else that is trained."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 16), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize(("trained", "ntk"), [(True, 1 / 4), (False, 0.0)])
def test_a_trained_token_has_its_part_in_the_ntk(trained: bool, ntk: float) -> None:
    """1 at one of four positions."""
    assert kgraph.analyze(Token(trained), torch.randn(2, 3, 16)).final.ntk == pytest.approx(ntk, abs=1e-12)


def test_groups_of_channels_of_several_laws_are_assumed() -> None:
    """Depthwise weights on constants beside white noise: no channel has the average of both."""

    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(64, 64, 1, groups=2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.cat([x, x.abs()], 1))

    assert kgraph.analyze(Groups(), torch.randn(2, 32, 5)).final.how == "assumed"
