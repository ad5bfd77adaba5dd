"""Order and chaos against independent calculations: mpmath, exact sums of squared weights, closed forms."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph import NTKChaos
from kgraph.errors import InputError
from kgraph.meanfield.order_chaos import activation_moments, balanced, fixed_point, frequency_for, fully_connected

BETA = 0.7


def test_frequency_of_an_activation_that_is_nearly_constant_at_small_scales() -> None:
    # E[w^2 sin^2(w u)] / E[cos^2(w u)] = w^2 tanh(w^2); cos(u / 1024) varies by 1e-6 only, yet it is no constant
    w = frequency_for(torch.cos, 1.0, beta=0.1)
    assert 0.99 * w**2 * math.tanh(w**2) == pytest.approx(1.0, rel=1e-9)  # quadrature is good to 1e-9


def test_moments_of_an_activation_with_an_offset_keep_their_digits() -> None:
    # tanh(u) + 1e4 in doubles has rounding 1e-12; E[s^2] - E[s]^2 would have 1e8 * 1e-16 / .4, that is 3e-8
    shifted = activation_moments(lambda u: torch.tanh(u) + 1e4)
    assert shifted.variance == pytest.approx(activation_moments(torch.tanh).variance, rel=1e-10)


def sin_dual(c: Any) -> tuple[Any, Any]:
    return mpmath.sinh(c) / mpmath.sinh(1), mpmath.cosh(c) / mpmath.sinh(1)


def relu_dual(c: Any) -> tuple[Any, Any]:
    """Of the normalized relu: E[relu relu] less its mean's square 1 / (2 pi), over its variance."""
    angle, mean2 = mpmath.acos(c), 1 / (2 * mpmath.pi)
    raw = (mpmath.sqrt(1 - c * c) + (mpmath.pi - angle) * c) / (2 * mpmath.pi)
    variance = mpmath.mpf(1) / 2 - mean2
    return (raw - mean2) / variance, (mpmath.pi - angle) / (2 * mpmath.pi) / variance


@pytest.mark.parametrize("name", ["sin", "relu"])
def test_recursion_keeps_the_digits_of_cosines_near_one(name: str) -> None:
    phi, dual = (balanced(torch.sin), sin_dual) if name == "sin" else (balanced("relu", "normalized"), relu_dual)
    depth, cosine = 150, 1 - 1e-9
    found = fully_connected(phi, depth, cosine, BETA)
    with mpmath.workdps(60):
        weight, bias = 1 - mpmath.mpf(BETA) ** 2, mpmath.mpf(BETA) ** 2
        sigma = theta = weight * mpmath.mpf(cosine) + bias
        for _ in range(depth - 1):
            value, slope = dual(sigma)
            sigma = bias + weight * value
            theta = sigma + weight * slope * theta
        gap = 1 - sigma
    # a layer's gap is good to some ulps, 2e-15 say, and errors add up over 150 layers
    assert float(found.gap[-1]) == pytest.approx(float(gap), rel=1e-12)
    assert float(found.theta[-1]) == pytest.approx(float(theta), rel=1e-12)


def test_recursion_refuses_what_it_does_not_hold_for() -> None:
    for arguments in (("relu", 3, 0.5), (balanced("relu"), 3, 2.0), (balanced("relu"), 0, 0.5)):
        with pytest.raises(InputError):
            fully_connected(*arguments)


@pytest.mark.parametrize("excess", [1e-9, 1e-7, 1e-5])
def test_fixed_point_just_beyond_the_edge(excess: float) -> None:
    # sinh(1 - g) / sinh(1): w = (1 + excess) tanh(1) has the root g = 2 tanh(1) excess + O(excess^2)
    with mpmath.workdps(40):
        beta = float(mpmath.sqrt(1 - (1 + mpmath.mpf(excess)) * mpmath.tanh(1)))
        weight = 1 - mpmath.mpf(beta) ** 2
        start = 2 * mpmath.tanh(1) * excess
        root = mpmath.findroot(lambda g: weight * (1 - mpmath.sinh(1 - g) / mpmath.sinh(1)) / g - 1, start)
    # g is about r - 1, whose absolute error is that of two integrals by quadrature, 1e-14 each, here: 1e-13 allows for
    # both; 1 - cosine, as a difference from 1, is good to 1e-16
    assert 1 - fixed_point(balanced(torch.sin), beta).cosine == pytest.approx(
        float(root), rel=1e-13 / excess, abs=2e-16
    )


@pytest.mark.parametrize("activation", [torch.sin, torch.tanh, torch.erf])
def test_fixed_point_of_odd_activations_without_biases(activation: Any) -> None:
    # -1 is fixed too, and repels; 0 attracts
    assert fixed_point(balanced(activation), 0.0).cosine == pytest.approx(0.0, abs=1e-12)


class Fixed(nn.Module):
    """Multiplies by a constant matrix, and ends in a transposed parameter."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.register_buffer("matrix", torch.eye(16))
        self.last = nn.Parameter(torch.ones(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.first(x @ self.matrix)), self.last.t())


def test_constants_are_not_drawn_and_computed_weights_are_named() -> None:
    result = kgraph.transform(Fixed(), NTKChaos(), torch.randn(2, 16))
    assert torch.equal(dict(result.named_buffers())["matrix"], torch.eye(16))
    assert torch.equal(dict(result.named_parameters())["last"], torch.ones(16, 4))
    assert any("not drawn" in line for line in result.kgraph.ledger.unmet)


def test_variances_are_judged_after_graph_parametrization() -> None:
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()]
    model, x = nn.Sequential(*layers, nn.Conv2d(64, 8, 3)), torch.randn(2, 64, 5, 5)
    assert kgraph.transform(model, NTKChaos(beta=0.3), x).kgraph.ledger.unmet == ()
    assert len(kgraph.transform(model, NTKChaos(beta=0.3, graph=False), x).kgraph.ledger.unmet) == 2


def test_a_pooled_layer_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
    (said,) = kgraph.transform(model, NTKChaos(), torch.randn(2, 64, 4, 4)).kgraph.ledger.unmet
    assert "at the input of linear" in said


def pixel_variances(model: nn.Module, weight: str, size: int) -> Tensor:
    """Var of every pixel for unit weights and an image of ones: the sum of squares of d y / d W; exact."""
    parameter = dict(model.double().named_parameters())[weight]
    pixels = model(torch.ones(1, 2, size, size, dtype=torch.float64))[0, 0].flatten()
    return torch.stack([torch.autograd.grad(p, parameter, retain_graph=True)[0].square().sum() for p in pixels])


def test_all_zero_paddings_in_front_count() -> None:
    model = nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, 5, padding=1))
    variances = pixel_variances(kgraph.graph_parametrize(model, torch.randn(1, 2, 5, 5)), "2.weight", 5)
    torch.testing.assert_close(variances, torch.full_like(variances, 2 * 25))  # two channels of all pixels


def test_dynamic_parametrization_of_a_layer_that_is_even_at_the_example() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 4))
    even = kgraph.graph_parametrize(model, torch.randn(1, 2, 1, 1), dynamic=True)
    variances = pixel_variances(even, "0.weight", 3)
    torch.testing.assert_close(variances, torch.full_like(variances, 2 * 9))
    plain = nn.Sequential(nn.Conv2d(2, 2, 3, stride=2), nn.ConvTranspose2d(2, 2, 2, 2))  # even at every size
    assert kgraph.graph_parametrize(plain, torch.randn(1, 2, 7, 7), dynamic=True).meta["kgraph"].counts() == {}


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": math.nan}, {"lr": 1.0, "stride_exponent": math.nan}], ids=str)
def test_rates_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="positive rate"):
        kgraph.param_groups(nn.Linear(3, 3), beta=0.1, **options)


def test_report_says_that_its_layers_are_for_inputs_of_mean_square_one() -> None:
    model = nn.Sequential(nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert not any("mean square" in note for note in kgraph.order_chaos(model, x).notes)
    assert any("mean square 1, the NTK" in note for note in kgraph.order_chaos(model, 3 * x).notes)
