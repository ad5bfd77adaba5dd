"""Mean field against the reference numbers of tanh and relu, kinks, jumps, and activations without a critical line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import integrate
from torch import nn

import kgraph
from kgraph.errors import InputError
from kgraph.maps import pointwise
from kgraph.meanfield import (
    Moments,
    chain_jacobian,
    critical_line,
    critical_point,
    fourier_multipliers,
    gaussian_s1,
    mean_field,
    q_fixed_point,
    smallest_critical_q,
    tap_shares,
    top_multiplier,
)

REFERENCE = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())
MEANFIELD, RTOL = REFERENCE["S4_meanfield"]["data"], REFERENCE["S4_meanfield"]["rtol"]
CONV = REFERENCE["S4_conv"]["data"]


@pytest.mark.parametrize("row", MEANFIELD["critical_line_tanh"], ids=lambda row: f"q{row['q']}")
def test_critical_line_of_tanh(row: dict[str, float]) -> None:
    (p,) = critical_line(torch.tanh, [row["q"]])
    found = {"q": p.q, "sw2": p.sigma_w2, "sb2": p.sigma_b2, "chi1": p.chi_1, "chi_q": p.chi_q, "xi_q": p.xi_q}
    found |= {"mu1": p.mu_1, "mu2": p.mu_2, "sJJ2_per_layer_orth": chain_jacobian(p, 1).variance}
    found |= {"sJJ2_per_layer_gauss": chain_jacobian(p, 1, s_1=gaussian_s1).variance}
    assert found == pytest.approx(row, rel=RTOL)
    assert p.regime == "critical" and math.isinf(p.xi_c)


@pytest.mark.parametrize("row", MEANFIELD["critical_from_sb2_tanh"], ids=lambda row: f"sb2 {row['sb2']}")
def test_critical_point_of_a_bias(row: dict[str, float]) -> None:
    p = kgraph.critical_point("tanh", sigma_b2=row["sb2"])
    assert {"sb2": p.sigma_b2, "sw2": p.sigma_w2, "q": p.q} == pytest.approx(row, rel=RTOL)


@pytest.mark.parametrize("row", MEANFIELD["off_critical_tanh"], ids=lambda row: f"{row['sw2']}-{row['sb2']}")
def test_off_the_critical_line(row: dict[str, Any]) -> None:
    p = kgraph.mean_field("tanh", row["sw2"], row["sb2"])
    found = {"q": p.q, "c": p.c, "chi1": p.chi_1, "chi_cstar": p.chi_c, "chi_q": p.chi_q, "xi_c": p.xi_c}
    found |= {"xi_q": p.xi_q}
    assert found == pytest.approx({name: row[name] for name in found}, rel=RTOL)
    assert p.regime == row["phase"]


def test_relu_is_critical_at_two_for_every_q() -> None:
    want = MEANFIELD["relu"]
    for activation in ("relu", nn.ReLU(), torch.relu):
        p = critical_point(activation, q=0.3)
        assert (p.sigma_w2, p.sigma_b2) == pytest.approx((want["critical"]["sw2"], want["critical"]["sb2"]), rel=1e-9)
        assert (p.mu_1, p.mu_2, p.chi_q) == pytest.approx((want["mu1"], want["mu2"], 1.0), rel=1e-9)
        assert chain_jacobian(p, 1).variance == pytest.approx(1)
        assert chain_jacobian(p, 1, s_1=gaussian_s1).variance == pytest.approx(2)
    assert mean_field("relu", 2.0, q0=0.3).q == 0.3
    assert mean_field("relu", 2.5, 0.1).q == math.inf and mean_field("relu", 1.5).q == 0
    assert mean_field("relu", 1.5, 0.1).q == pytest.approx(0.4)  # sb2 / (1 - sw2 / 2)


@pytest.mark.parametrize(
    ("depth", "row"), REFERENCE["S4_schedule_q_1_over_L"]["data"].items(), ids=lambda value: str(value)[:6]
)
def test_one_over_depth(depth: str, row: dict[str, float]) -> None:
    p = critical_point("tanh", q=1 / int(depth))
    found = {"q": p.q, "sw2": p.sigma_w2, "sb2": p.sigma_b2, "sJJ2": chain_jacobian(p, int(depth)).variance}
    assert found == pytest.approx(row, rel=REFERENCE["S4_schedule_q_1_over_L"]["rtol"])


def hardtanh_moments(q: float) -> tuple[float, float]:
    """E[phi^2] and d E[phi^2] / d q, by scipy."""

    def at(q: float) -> float:
        density = lambda u: math.exp(-u * u / (2 * q)) / math.sqrt(2 * math.pi * q)  # noqa: E731
        inner = integrate.quad(lambda u: u * u * density(u), -1, 1, epsabs=1e-13, epsrel=1e-13)[0]
        return inner + math.erfc(1 / math.sqrt(2 * q))

    return at(q), (at(q + 1e-4) - at(q - 1e-4)) / 2e-4


@pytest.mark.parametrize("q", [0.2, 1.0, 3.0])
def test_kinks_are_split(q: float) -> None:
    moments = Moments(nn.functional.hardtanh, q)
    second, slope = hardtanh_moments(q)
    assert moments.second() == pytest.approx(second, rel=1e-10)
    assert moments.mu(1) == pytest.approx(math.erf(1 / math.sqrt(2 * q)), rel=1e-10)
    assert moments.q_slope() == pytest.approx(slope, rel=1e-6)
    x, weight = torch.linspace(-8, 8, 201).double(), 16 / 200 / math.sqrt(2 * math.pi)
    plain = float((weight * torch.exp(-x * x / 2) * ((math.sqrt(q) * x).abs() < 1)).sum())
    assert abs(plain / math.erf(1 / math.sqrt(2 * q)) - 1) > 1e-4  # a rule that does not know the kinks


@pytest.mark.parametrize("name", ["gelu_exact", "silu", "elu", "selu", "erf", "softsign", "mish", "hardswish"])
def test_every_critical_point_is_a_fixed_point(name: str) -> None:
    p = critical_point(name, q=0.05)
    again = mean_field(pointwise(name), p.sigma_w2, p.sigma_b2, q0=0.05)
    assert again.chi_1 == pytest.approx(1, abs=2e-5)
    assert p.sigma_b2 + p.sigma_w2 * Moments(name, 0.05).second() == pytest.approx(0.05, rel=1e-9)


def test_there_is_no_critical_line_below_the_least_q() -> None:
    least = smallest_critical_q("sigmoid")
    assert 45 < least < 46
    with pytest.raises(InputError, match=r"no critical point at q = 0.01.*smallest q that has one is 45"):
        critical_point("sigmoid", q=0.01)
    assert critical_point("sigmoid", q=1.01 * least).sigma_b2 > 0
    assert smallest_critical_q("softplus") == math.inf
    with pytest.raises(InputError, match="sigma_b2 = 0 only"):
        critical_point("relu", sigma_b2=0.1)


@pytest.mark.parametrize("name", ["sign", "step"])
def test_jumps_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="jumps at 0"):
        mean_field(name, 1.0)


def test_bad_arguments() -> None:
    for call in (
        lambda: critical_point("tanh"),
        lambda: critical_point("tanh", q=1.0, sigma_b2=0.1),
        lambda: critical_point("tanh", sigma_b2=-1.0),
        lambda: critical_point("tanh", q=math.inf),
        lambda: mean_field("tanh", -1.0),
        lambda: q_fixed_point("tanh", 1.0, q0=0.0),
        lambda: mean_field(3.0, 1.0),  # type: ignore[arg-type]
        lambda: fourier_multipliers(torch.ones(3, 3), (4,)),
        lambda: tap_shares(torch.ones(3, 3)),
    ):
        with pytest.raises(InputError):
            call()


def test_fourier_multipliers() -> None:
    """Exact lambda_k; the measured decay of the file's modes is in `test_reference_modes.py`."""
    taps = {"uniform3": torch.ones(3) / 3, "uniform5": torch.ones(5) / 5}
    taps |= {"binomial3": torch.tensor([0.25, 0.5, 0.25]), "delta3": torch.tensor([0.0, 1.0, 0.0])}
    for name, row in CONV["fourier_modes_linear_circ"].items():
        found = fourier_multipliers(taps[name], 12)
        assert found[[1, 3]].tolist() == pytest.approx([row["lambda1"], row["lambda3"]], rel=1e-7)
    off_centre = fourier_multipliers(torch.tensor([1.0, 0.0, 0.0]), 12)
    assert off_centre.tolist() == pytest.approx([1.0] * 12)


@pytest.mark.parametrize("n", [7, 8, 28])
def test_zero_padding_loses_the_constant_mode(n: int) -> None:
    want = CONV[f"zero_pad_uniform3_1d_n{n}_topeig"]["formula"]
    assert top_multiplier(torch.ones(3).double() / 3, n) == pytest.approx(want, abs=1e-8)
    assert want < float(fourier_multipliers(torch.ones(3).double() / 3, n)[0]) == pytest.approx(1)


def test_measured_modes_decay_as_predicted() -> None:
    g = torch.Generator().manual_seed(0)
    shares, n, channels = torch.tensor([0.25, 0.5, 0.25]).double(), 12, 512
    x = torch.randn(1, channels, n, generator=g, dtype=torch.float64)
    k = 2 * math.pi * torch.arange(n) / n
    x = x / x.square().mean(1, keepdim=True).sqrt() * (1 + 0.4 * torch.cos(k) + 0.4 * torch.cos(3 * k)).sqrt()
    modes = []
    for _ in range(4):
        modes.append(torch.fft.fft(x.square().mean(1)[0])[[1, 3]].abs())
        weight = torch.randn(channels, channels, 3, generator=g, dtype=torch.float64) * (shares / channels).sqrt()
        x = nn.functional.conv1d(nn.functional.pad(x, (1, 1), mode="circular"), weight)
    predicted = fourier_multipliers(shares, n)[[1, 3]]
    assert float((modes[1] / modes[0])[0]) == pytest.approx(float(predicted[0]), rel=0.1)
    assert float((modes[1] / modes[0])[1]) == pytest.approx(float(predicted[1]), rel=0.15)
    assert float((modes[2] / modes[0])[0]) == pytest.approx(float(predicted[0]) ** 2, rel=0.15)


def test_phase_diagram(tmp_path: Path) -> None:
    diagram = kgraph.phase_diagram("tanh", sigma_w=[0.7, 1.0, 1.4, 2.0], sigma_b=[0.05, 0.2236, 0.4])
    assert diagram.chi_1.shape == diagram.xi_c.shape == (3, 4)
    want = mean_field("tanh", 1.96, 0.2236**2)
    assert float(diagram.xi_c[1, 2]) == pytest.approx(want.xi_c, rel=1e-9)
    assert bool((diagram.chi_1.diff(dim=1) > 0).all()) and bool((diagram.line.diff(dim=0) > 0).all())
    at = critical_point("tanh", sigma_b2=float(diagram.line[20, 1]) ** 2)
    assert at.sigma_w2 == pytest.approx(float(diagram.line[20, 0]) ** 2, rel=1e-8)
    diagram.plot(tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 1000
    assert set(diagram.to_dict()) == {"activation", "sigma_w", "sigma_b", "q", "chi_1", "xi_c", "line"}
    with pytest.raises(InputError, match="rising"):
        kgraph.phase_diagram("tanh", sigma_w=[2.0, 1.0])
