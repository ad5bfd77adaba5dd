"""reference/order_chaos.json: moments, characteristic values, knobs and the fully connected recursion."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kgraph.errors import InputError, TargetError
from kgraph.meanfield.order_chaos import (
    activation_moments,
    balanced,
    characteristic_value,
    fixed_point,
    frequency_for,
    fully_connected,
    regime_of,
)

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "order_chaos.json").read_text())
CALLABLES: dict[str, Any] = {
    "identity": lambda u: u,
    "relu": nn.ReLU(inplace=True),
    "leaky_relu_0.2": nn.LeakyReLU(0.2),
    "abs": torch.abs,
    "gelu": nn.GELU(),
} | {name: getattr(torch, name) for name in ("tanh", "sigmoid", "erf", "sin")}
CALLABLES |= {name: getattr(nn.functional, name) for name in ("softplus", "silu", "elu", "selu")}
DIGITS = 2e-11
"""The file has twelve digits."""


def close(found: float | None, stored: float | None) -> bool:
    if stored is None or found is None:
        return found is stored
    return abs(found - stored) <= DIGITS * max(1.0, abs(stored))


@pytest.mark.parametrize("name", REFERENCE["r_values"])
def test_moments_and_r(name: str) -> None:
    stored = REFERENCE["r_values"][name]
    moments = activation_moments(CALLABLES[name])
    assert close(moments.mean, stored["mean"]) and close(moments.second, stored["Esq"])
    assert close(moments.slope, stored["Edsq"])
    for form, shift in (("standardised", 0.0), ("normalised", moments.mean)):
        assert close(moments.balanced_slope(shift), stored[form]["E_dsigma2"])
        assert close(moments.r(0.1, shift), stored[form]["r_beta0.1"])
        found, expected = moments.critical_beta(shift), stored[form]["beta_crit"]
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:  # sqrt(1 - 1 / E): E's last digit, as it arrives there
            digits = DIGITS / (2 * expected * stored[form]["E_dsigma2"] ** 2) if expected else DIGITS**0.5
            assert abs(found - expected) <= max(digits, DIGITS)


def test_closed_forms() -> None:
    stored = REFERENCE["closed_forms"]
    relu, erf, sine = (activation_moments(CALLABLES[name]) for name in ("relu", "erf", "sin"))
    assert close(relu.balanced_slope(relu.mean), math.pi / (math.pi - 1))
    assert close(erf.balanced_slope(), 2 / (math.sqrt(5) * math.asin(2 / 3)))
    assert close(sine.balanced_slope(), 1 / math.tanh(1))
    absolute = activation_moments(torch.abs)
    found = {
        "relu_std": relu.balanced_slope(),
        "relu_nrm=pi/(pi-1)": relu.balanced_slope(relu.mean),
        "erf_std=2/(sqrt5 asin(2/3))": erf.balanced_slope(),
        "sin_std=coth(1)": sine.balanced_slope(),
        "abs_nrm=1/(1-2/pi)": absolute.balanced_slope(absolute.mean),
    }
    assert found == pytest.approx(stored, rel=DIGITS)


def test_shift_knob() -> None:
    stored = REFERENCE["knob_relu_shift_beta0.1"]
    relu = activation_moments("relu")
    for shift, r in stored["r"].items():
        constant = relu.mean if shift == "0.40" else float(shift)  # the printed .40 is the mean
        assert close(relu.r(0.1, constant), r), shift
        assert characteristic_value("relu", 0.1, constant) == relu.r(0.1, constant)
    assert close(relu.shift_for(1.0), stored["c_at_r_eq_1"])
    for r in (0.3, 0.99, 1.2, relu.r(0.1, relu.mean)):
        assert relu.r(0.1, relu.shift_for(r)) == pytest.approx(r, rel=1e-12)


def test_unreachable_r_names_the_range() -> None:
    with pytest.raises(TargetError, match=r"r = 2 is out of reach: .* r in \(0, 1\.45227\]"):
        activation_moments("relu").shift_for(2.0)
    with pytest.raises(TargetError, match="out of reach"):
        activation_moments("relu").shift_for(0.0)
    with pytest.raises(TargetError, match=r"frequencies give this activation r in \[0\.99"):
        frequency_for(torch.sin, 0.5)


def test_frequency_knob() -> None:
    for frequency, r in REFERENCE["knob_sin_freq_beta0.1"].items():
        assert close(characteristic_value(lambda u, w=float(frequency): torch.sin(w * u)), r)
        assert frequency_for(torch.sin, r) == pytest.approx(float(frequency), rel=1e-6)
    assert characteristic_value(lambda u: torch.sin(frequency_for(torch.sin, 1.0) * u)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.3])
def test_order(beta: float) -> None:
    stored = REFERENCE["fc"][f"order_relu_std_beta{beta}_rho0.3"]
    phi = balanced("relu")
    found = fully_connected(phi, 60, 0.3, beta)
    r = stored["r"]
    assert close(characteristic_value("relu", beta), r) and regime_of(r) == "order"
    for depth, row in stored["rows"].items():
        gap = 1 - float(found.vartheta[int(depth) - 1])
        assert close(1 - gap, row["vartheta"])
        digits = DIGITS * max(1, 1 / gap)  # of 1 - vartheta
        assert gap / (int(depth) * r ** int(depth)) == pytest.approx(row["over_LrL"], rel=digits)
        assert gap / r ** (int(depth) / 2) == pytest.approx(row["over_rL2"], rel=digits)
    lengths = torch.arange(1, 61).double()
    assert torch.allclose(found.theta_diagonal, (1 - r**lengths) / (1 - r), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_chaos(beta: float) -> None:
    """The file's rho*, slope and h are the recursion's at layer 60, to its digits.

    The fixed point's own are as far off as the recursion then is from its end (it shrinks by the slope a layer).
    """
    stored = REFERENCE["fc"][f"chaos_relu_nrm_beta{beta}_rho0.3"]
    phi = balanced("relu", "normalized")
    recursion, point = fully_connected(phi, 61, 0.3, beta), fixed_point(phi, beta)
    sigma, theta = recursion.sigma.tolist(), recursion.theta.tolist()
    found = {"rho_star": sigma[59], "Sigma_dot_star": (theta[60] - sigma[60]) / theta[59], "r": point.r}
    found["h"] = float(recursion.vartheta[59] / recursion.vartheta[58])
    for name, value in found.items():
        assert value == pytest.approx(stored[name], rel=DIGITS), name
    left = abs(sigma[59] - sigma[58]) * point.slope / (1 - point.slope)
    assert abs(point.cosine - stored["rho_star"]) == pytest.approx(left, rel=1e-3)
    assert abs(point.slope - stored["Sigma_dot_star"]) < left
    deep = fully_connected(phi, 400, 0.3, beta)
    assert float(deep.sigma[-1]) == pytest.approx(point.cosine, abs=1e-12)
    assert point.h == pytest.approx(1 / point.r, rel=DIGITS)
    assert float(deep.vartheta[-1] / deep.vartheta[-2]) == pytest.approx(point.h, rel=1e-10)
    for depth, value in stored["vartheta"].items():
        assert float(recursion.vartheta[int(depth) - 1]) == pytest.approx(value, rel=DIGITS)


def test_edge() -> None:
    """The file lost digits as 1 - c fell below 1e-7: the others are the recursion in 40 digits."""
    vartheta = fully_connected(balanced("relu"), 4000, 0.3, 0.0).vartheta
    for depth, value in REFERENCE["fc"]["edge_relu_beta0_rho0.3"].items():
        assert float(vartheta[int(depth) - 1]) == pytest.approx(value, abs=1e-8)
    for depth, value in ((100, 0.275018971282741), (1000, 0.25352397624855), (4000, 0.251014568252457)):
        assert float(vartheta[depth - 1]) == pytest.approx(value, abs=5e-9)
    assert fixed_point(balanced("relu"), 0.0).cosine == 1.0


def test_vartheta_table() -> None:
    for name, row in REFERENCE["fc"]["vartheta_table_beta0.1"].items():
        form = "normalized" if "nrm" in name else "standardized"
        depth = int(name.rpartition("L")[2])
        for key, value in row.items():
            found = fully_connected(balanced("relu", form), depth, float(key[3:]))
            assert close(float(found.vartheta[-1]), value), (name, key)


def test_arguments() -> None:
    with pytest.raises(InputError, match="constant"):
        activation_moments(torch.zeros_like)
    with pytest.raises(InputError, match="beta is 1"):
        characteristic_value("relu", 1.0)
    with pytest.raises(InputError, match="form is"):
        balanced("relu", "other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"E\[sigma\^2\] is 0\.5"):
        fixed_point("relu")
