"""Numbers and silences of critical initialization, mean field, orthogonal convolutions and isometry."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.maps import Pointwise
from kgraph.meanfield import fourier_multipliers, q_fixed_point, smallest_critical_q, top_multiplier
from kgraph.orthogonal_convolutions import orthogonal_convolution_
from kgraph.studies.finite_width.recursion import gaussian_moments


class Chain(nn.Module):
    """Layers, with one function of each."""

    def __init__(self, layers: list[nn.Module], function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function(layer, x)
        return x


def linears(count: int, width: int = 32, out: int | None = None) -> list[nn.Module]:
    return [nn.Linear(width, out or width) for _ in range(count)]


def seen(model: nn.Module, x: Tensor, method: object = "edge-of-chaos") -> tuple[str, ...]:
    return kgraph.transform(model, method, x).kgraph.ledger.unmet  # pyright: ignore


# --- the edge of chaos -------------------------------------------------------------------------------------------


def test_an_activation_of_the_input_has_the_inputs_q() -> None:
    width, depth = 256, 4
    model = Chain(linears(depth, width), lambda layer, x: layer(torch.tanh(x)))
    made = kgraph.transform(model, "edge-of-chaos", torch.randn(2, width)).double()
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = made.get_submodule("layers.0")(torch.tanh(x))
    # q = 1 / 4. An orthogonal matrix keeps the norm, so that |first|^2 is a mean of 64 x 256 squared tanh, each of
    # variance below 1/10 about .39: a relative error of 1/160 at 4 sigma is below .03.
    assert abs(float(first.detach().square().mean()) * depth - 1) < 0.03


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda layer, x: functional.rrelu(layer(x)), "rrelu"),
        (lambda layer, x: functional.softmax(layer(x), -1), "softmax"),
        (lambda layer, x: torch.tanh(layer(x)).cumsum(1), "cumsum"),
        (lambda layer, x: torch.tanh(torch.einsum("bi,oi->bo", x, layer.weight)), "einsum"),
        (lambda layer, x: torch.tanh((layer.weight @ x.T).T), "matmul"),
    ],
)
def test_what_the_line_does_not_know_is_told(function: Callable[[nn.Module, Tensor], Tensor], word: str) -> None:
    unmet = seen(Chain(linears(3), function), torch.randn(4, 32))
    assert any(word in line for line in unmet)


def test_gains_by_channel_and_maxout_are_told() -> None:
    gain = nn.Parameter(0.1 * torch.rand(32))
    scaled = Chain(linears(3), lambda layer, x: gain * torch.tanh(layer(x)))
    scaled.register_parameter("gain", gain)
    assert any("mul" in line for line in seen(scaled, torch.randn(4, 32)))
    maxout = Chain(linears(3, out=64), lambda layer, x: layer(x).unflatten(-1, (32, 2)).amax(-1))
    assert any("amax" in line for line in seen(maxout, torch.randn(4, 32)))


def test_a_hand_written_activation_is_no_obstacle() -> None:
    def swish(layer: nn.Module, x: Tensor) -> Tensor:
        z = layer(x)
        return z * torch.sigmoid(z)

    assert seen(Chain(linears(3), swish), torch.randn(4, 32)) == ()


def test_q_that_repels_is_told() -> None:
    layers = [m for _ in range(40) for m in (nn.Linear(16, 16), nn.SiLU())]
    model, x = nn.Sequential(*layers), torch.randn(2, 16)
    # chi_q of SiLU at q = 1 is 1.09 (Gauss-Hermite): 1.09^40 = 31.
    assert any("repels" in line for line in seen(model, x, kgraph.EdgeOfChaos(q=1.0)))
    assert seen(model, x) == ()


def convolutions(count: int, **options: object) -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(count) for m in (nn.Conv2d(8, 8, 3, **options), nn.Tanh())])  # pyright: ignore


def test_gaussian_taps_read_zeros_at_the_borders() -> None:
    x = torch.randn(2, 8, 6, 6)
    told = seen(convolutions(3, padding=1), x, kgraph.EdgeOfChaos(distribution="gaussian"))
    assert any("borders" in line for line in told)
    circular = convolutions(3, padding=1, padding_mode="circular")
    assert seen(circular, x, kgraph.EdgeOfChaos(distribution="gaussian")) == ()


def test_a_transposed_kernel_smaller_than_its_stride_leaves_gaps() -> None:
    def model(kernel: int, stride: int) -> nn.Module:
        up = nn.ConvTranspose2d(8, 8, kernel, stride=stride)
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh(), up, nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh())

    x = torch.randn(2, 8, 4, 4)
    assert any("fewer taps" in line for line in seen(model(2, 3), x))
    assert seen(model(2, 2), x) == ()


def test_a_zero_padding_of_its_own_lowers_no_q() -> None:
    width = 64
    layers = [m for _ in range(3) for m in (nn.ZeroPad2d(2), nn.Conv2d(width, width, 5), nn.Tanh())]
    x = torch.randn(8, width, 6, 6, generator=torch.Generator().manual_seed(0))
    made = kgraph.transform(nn.Sequential(*layers), "edge-of-chaos", x)
    z = made.get_submodule("1")(functional.pad(x, (2, 2, 2, 2)))
    # One orthogonal matrix at the centre tap keeps the norm: q = 1/3 times the mean of 18,432 squared normals.
    assert abs(float(z.detach().square().mean()) * 3 - 1) < 4 * math.sqrt(2 / x.numel())


def test_depthwise_convolutions_into_an_activation() -> None:
    x = torch.randn(1, 8, 4, 4)
    model = convolutions(4, padding=1, groups=8)
    assert any("one channel each" in line for line in seen(model, x))
    report = kgraph.isometry(model, x, measure=False)
    assert math.isnan(report.predicted_mean) and any("one channel each" in note for note in report.notes)


def test_a_layer_without_an_orthogonal_form_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2), nn.Tanh(), nn.Conv2d(4, 4, 1))
    with pytest.raises(kgraph.InputError, match=r"common factor.*'conv2d'.*gaussian"):
        seen(model, torch.randn(1, 4, 8, 8))


# --- isometry ----------------------------------------------------------------------------------------------------


def test_isometry_of_one_output_behind_many_inputs() -> None:
    model = nn.Sequential(nn.Linear(1100, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(1, 1100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (row,) = torch.autograd.functional.jacobian(model, x).reshape(1, -1)
    report = kgraph.isometry(model, x, start="input", end="output")
    assert report.measured is not None
    assert report.measured.largest == pytest.approx(float(row.norm()), rel=1e-12)


def test_borders_are_told_beside_the_prediction() -> None:
    x = torch.randn(1, 8, 4, 4)
    zeros, round_ = convolutions(4, padding=1), convolutions(4, padding=1, padding_mode="circular")
    assert any("borders" in note for note in kgraph.isometry(zeros, x, measure=False).notes)
    assert not any("borders" in note for note in kgraph.isometry(round_, x, measure=False).notes)
    delta = kgraph.transform(zeros, "edge-of-chaos", x)
    assert not any("borders" in note for note in kgraph.isometry(delta, x, measure=False).notes)


# --- orthogonal convolutions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["delta", "general"])
def test_taps_that_meet_in_one_residue_of_the_stride(form: str) -> None:
    """Taps 0 and 1, three apart, read one residue of a stride of 3: no isometry."""
    with pytest.raises(kgraph.InputError, match=r"common factor"):
        orthogonal_convolution_(
            torch.empty(4, 5, 2),
            form=form,  # pyright: ignore[reportArgumentType]
            stride=3,
            dilation=3,
            generator=torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize("wrong", [{"gain": math.nan}, {"stride": 0}, {"dilation": 0}])
def test_wrong_geometry_of_an_orthogonal_convolution(wrong: dict[str, float]) -> None:
    with pytest.raises(kgraph.InputError):
        orthogonal_convolution_(torch.empty(2, 2, 3), generator=torch.Generator(), **wrong)  # pyright: ignore


# --- mean field --------------------------------------------------------------------------------------------------


def test_flat_activations_have_a_critical_line() -> None:
    point = kgraph.critical_point(functional.softshrink, sigma_b2=0.1)
    # With Phi the normal distribution, l = 1/2 and s^2 = q: E[phi'^2] = 2 Phi(-l/s) and
    # E[phi^2] = 2 ((q + l^2) Phi(-l/s) - l s n(l/s)), by integration by parts.
    s, lam = math.sqrt(point.q), 0.5
    tail = math.erfc(lam / s / math.sqrt(2)) / 2
    density = math.exp(-((lam / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    second = 2 * ((point.q + lam**2) * tail - lam * s * density)
    assert point.sigma_w2 == pytest.approx(1 / (2 * tail), rel=1e-9)
    assert point.q == pytest.approx(0.1 + point.sigma_w2 * second, rel=1e-9)
    with pytest.raises(kgraph.InputError, match="flat"):
        kgraph.critical_point(functional.softshrink, q=1e-8)
    with pytest.raises(kgraph.InputError):
        kgraph.critical_point(lambda x: 0 * x + 1, sigma_b2=0.1)
    assert smallest_critical_q("sigmoid") == pytest.approx(45.62, rel=1e-3)


def test_q_without_a_fixed_point_and_below_the_usual_range() -> None:
    assert kgraph.mean_field("relu", 2.0, 0.1).q == math.inf  # q' = q + .1
    assert kgraph.mean_field("relu", 2.0, 0.0, q0=3.0).q == 3.0  # every q is one
    # tanh^2 u = u^2 (1 - 2 u^2 / 3 ...): q = sb2 / (1 - sw2) up to a relative 2 q
    assert q_fixed_point("tanh", 0.5, 1e-14) == pytest.approx(2e-14, rel=1e-9)


def test_modules_with_parameters_and_objects_without_a_hash_are_activations() -> None:
    # PReLU: mu_1 = (1 + a^2) / 2
    assert kgraph.critical_point(nn.PReLU(init=0.25), q=0.3).sigma_w2 == pytest.approx(2 / (1 + 0.25**2), rel=1e-12)

    class Plain:
        def __eq__(self, other: object) -> bool:
            return self is other

        def __call__(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    tanh = kgraph.critical_point("tanh", q=0.1).sigma_w2
    assert kgraph.critical_point(Plain(), q=0.1).sigma_w2 == pytest.approx(tanh, rel=1e-9)
    assert kgraph.critical_point(nn.ReLU(inplace=True), q=0.1).sigma_w2 == pytest.approx(2, rel=1e-12)
    assert isinstance(kgraph.critical_point("tanh", q=torch.tensor(0.1)).sigma_b2, float)  # pyright: ignore


@pytest.mark.parametrize("wrong", [nn.Softmax(-1), nn.PReLU(3), nn.GLU(), nn.Tanh, nn.Linear(3, 3), nn.Dropout(0.5)])
def test_what_is_no_elementwise_function(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(kgraph.InputError, match="entry"):
        kgraph.critical_point(wrong, q=0.1)


@pytest.mark.parametrize("q", [5.0, 100.0])
def test_fourth_moments_of_an_oscillating_function(q: float) -> None:
    """E[cos^4] = (3 + 4 e^(-2q) + e^(-8q)) / 8 and E[sin^2 cos^2] = (1 - e^(-8q)) / 8."""
    point = kgraph.critical_point(torch.sin, q=q)
    # 1e-11 is what the panels hold for squares, and they are halved: ten times that for rounding.
    assert point.mu_2 == pytest.approx((3 + 4 * math.exp(-2 * q) + math.exp(-8 * q)) / 8, rel=1e-10)
    both = gaussian_moments(Pointwise(torch.sin), q).both
    assert both == pytest.approx((1 - math.exp(-8 * q)) / 8, rel=1e-10)


def test_wrong_numbers() -> None:
    for call in (
        lambda: kgraph.mean_field("tanh", math.inf, 0.0),
        lambda: kgraph.critical_point("tanh", sigma_b2=math.nan),
        lambda: kgraph.phase_diagram("tanh", sigma_w=[1, math.inf], sigma_b=[0, 1]),
        lambda: kgraph.phase_diagram("tanh", sigma_w="ab", sigma_b=[0, 1]),  # pyright: ignore
        lambda: fourier_multipliers(torch.ones(3) / 3, 0),
        lambda: fourier_multipliers(torch.ones(3, 3) / 9, 4, dilation=(1, 2, 3)),
    ):
        with pytest.raises(kgraph.InputError):
            call()
    # Two positions, of whose seven taps only the middle three meet one: eigenvalues 1/7 +- 1/7.
    assert top_multiplier(torch.ones(7, dtype=torch.float64) / 7, 2) == pytest.approx(2 / 7, rel=1e-12)
