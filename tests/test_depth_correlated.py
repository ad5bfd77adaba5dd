"""Weights correlated across depth: exact autocovariances, the mean-field law, and arXiv 2206.06929's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from residual_blocks import REFERENCE, finite_chain

from kgraph.depth_correlated import (
    ChainLaw,
    DepthWeights,
    autocovariance,
    chain_law,
    displacement_exponent,
    draw_paths,
)
from kgraph.errors import InputError
from kgraph.maps import relu

AUTOCOV = REFERENCE["S5_weight_autocov"]
DEPTH = REFERENCE["S5_depth"]["data"]
EXPONENT = REFERENCE["S5_displacement_exponent"]["data"]


def law(kind: str, weights: DepthWeights, hurst: float | None, length: int, beta: float) -> ChainLaw:
    """The mean-field law of a relu chain."""
    r = autocovariance(weights, length, hurst)
    return chain_law(relu().dual, r, r if kind == "res3" else None, length, length**-beta, 1.0, 1.0, 1.0)


def test_rbf_autocovariance() -> None:
    r = autocovariance("rbf", 1000)
    for lag, wanted in AUTOCOV["rbf_var0p01_L1000"].items():
        assert float(r[int(lag)]) == pytest.approx(wanted, rel=2e-8, abs=1e-11)
    u2 = (torch.arange(100_001) / 100_000).double().square()
    limit = (1 - u2 / 0.01) * torch.exp(-u2 / 0.02)
    torch.testing.assert_close(autocovariance("rbf", 100_000), limit, rtol=0, atol=1e-7)


@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.8])
def test_fractional_noise_autocovariance(hurst: float) -> None:
    wanted = torch.tensor(AUTOCOV["fgn"][str(hurst)], dtype=torch.float64)
    torch.testing.assert_close(autocovariance("fbm", 3, hurst), wanted, rtol=2e-8, atol=2e-8)
    assert float(autocovariance("fbm", 5, hurst)[1]) == pytest.approx(2 ** (2 * hurst - 1) - 1)


@pytest.mark.parametrize(
    ("weights", "hurst"), [("iid", None), ("rbf", None), ("fbm", 0.05), ("fbm", 0.8)], ids=["iid", "rbf", "rough", "h8"]
)
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_paths_have_the_autocovariance(weights: DepthWeights, hurst: float | None, length: int) -> None:
    entries = 20_001
    paths = draw_paths(weights, length, entries, torch.Generator().manual_seed(0), hurst)
    assert paths.shape == (length, entries) and paths.dtype == torch.float64
    r = autocovariance(weights, length, hurst)
    lags = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    apart = (paths @ paths.T / entries - r[lags]).abs().max()
    assert float(apart) < 5.5 * math.sqrt(2 / entries)
    neighbours = (paths[:, :-1] * paths[:, 1:]).mean()  # entries are independent of one another
    assert abs(float(neighbours)) < 5 / math.sqrt(entries)
    assert torch.equal(paths, draw_paths(weights, length, entries, torch.Generator().manual_seed(0), hurst))


def test_wrong_hurst_index_is_told_apart() -> None:
    paths = draw_paths("fbm", 64, 20_000, torch.Generator().manual_seed(0), 0.8)
    lag = float((paths[1:] * paths[:-1]).mean())
    assert abs(lag - float(autocovariance("fbm", 1, 0.8)[1])) < 0.01
    assert abs(lag - float(autocovariance("fbm", 1, 0.7)[1])) > 0.1


def test_sums_of_fractional_noise_are_fractional_motion() -> None:
    paths = draw_paths("fbm", 256, 20_000, torch.Generator().manual_seed(1), 0.3)
    assert float(paths.sum(0).var()) == pytest.approx(256**0.6, rel=0.05)


def test_transforms_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kgraph.depth_correlated._CHUNK", 256)
    paths = draw_paths("fbm", 16, 4001, torch.Generator().manual_seed(0), 0.8)
    assert paths.shape == (16, 4001)
    assert float((paths[1:] * paths[:-1]).mean()) == pytest.approx(2**0.6 - 1, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "hurst", "message"),
    [("fgn", None, "'fgn'"), ("fbm", None, "hurst is None"), ("fbm", 1.0, "hurst is 1.0"), ("rbf", 0.5, "option of")],
    ids=["name", "missing", "one", "rbf"],
)
def test_refused(weights: Any, hurst: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        autocovariance(weights, 10, hurst)


@pytest.mark.parametrize("key", EXPONENT)
def test_chosen_exponents_are_the_papers(key: str) -> None:
    kind, hurst = key.split("_H")
    chosen = displacement_exponent("fbm", float(hurst), "positive" if kind == "res3" else "fixed")
    assert chosen == pytest.approx(EXPONENT[key]["pred"])
    assert displacement_exponent("iid", None, "fixed") == 0.5 and displacement_exponent("rbf", None, "centred") == 1


@pytest.mark.parametrize("key", [k for k in DEPTH if "theory_rms_out" in DEPTH[k]])
def test_law_of_independent_layers_is_exact(key: str) -> None:
    kind, weights, beta, length = _parts(key)
    found = law(kind, weights, None, length, beta)
    exact = math.sqrt(math.expm1(length * math.log1p(length ** (-2 * beta) / 2)))
    assert float(found.forward[-1].sqrt()) == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(DEPTH[key]["theory_rms_out"], rel=1e-7)
    assert float(found.backward[0].sqrt()) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("key", [k for k in DEPTH if "rbf" in k and "beta0.5_L" not in k])
def test_law_of_smooth_layers(key: str) -> None:
    kind, weights, beta, length = _parts(key)
    found, wanted = law(kind, weights, None, length, beta), DEPTH[key]
    assert float(found.forward[-1].sqrt()) == pytest.approx(wanted["out"]["rms"], rel=0.08)
    assert float(found.backward[0].sqrt()) == pytest.approx(wanted["grad"]["rms"], rel=0.08)
    independent = law(kind, "iid", None, length, beta)  # negative control
    assert length == 10 or float(independent.forward[-1].sqrt()) != pytest.approx(wanted["out"]["rms"], rel=0.3)


@pytest.mark.parametrize("length", [10, 560, 780, 1000])
@pytest.mark.parametrize("chain", ["res3_iid", "res3_rbf", "res1_rbf"])
def test_finite_chains(chain: str, length: int) -> None:
    kind, weights = chain.split("_")
    keys = [k for k in DEPTH if k.startswith(f"{chain}_") and k.endswith(f"_L{length}")]
    betas = [_parts(k)[2] for k in keys]
    networks, inputs = (40, 8) if length == 10 else ((20, 4) if weights == "iid" else (5, 16))
    both = finite_chain(kind, weights, None, length, betas, networks=networks, inputs=inputs, seed=length)  # type: ignore[arg-type]
    for i, key in enumerate(keys):
        for name, ratios in zip(("out", "grad"), both, strict=True):
            _compare(key, DEPTH[key][name], ratios[i])


def _compare(key: str, wanted: dict[str, float], ratios: torch.Tensor) -> None:
    """The file's tolerances; where rbf weights explode (beta = .5), a mean of 20 draws is that of the largest one."""
    rms = float(ratios.square().mean().sqrt())
    if "rbf_beta0.5" in key and not key.endswith("L10"):
        logs = ratios.log().mean(1)
        spread = math.log(wanted["p95"] / wanted["p05"]) / 3.29  # of a log-normal law
        error = math.hypot(float(logs.std()) / len(logs) ** 0.5, 1.25 * spread / wanted["n"] ** 0.5)
        assert abs(float(logs.mean()) - math.log(wanted["median"])) < 3 * error
    elif "beta0.25" in key:
        assert abs(math.log(rms / DEPTH[key]["theory_rms_out"])) < 0.5
    else:
        assert rms == pytest.approx(wanted["rms"], rel=0.08)


@pytest.mark.parametrize("key", EXPONENT)
def test_displacement_exponents(key: str) -> None:
    kind, hurst = key.split("_H")
    wanted, lengths = EXPONENT[key], (40, 120, 360)
    steps = torch.tensor(lengths, dtype=torch.float64).log()
    steps = steps - steps.mean()
    means, errors, lawful = [], [], []
    for length in lengths:
        out, _ = finite_chain(kind, "fbm", float(hurst), length, [1.0], networks=4, inputs=8, seed=length)
        by_network = out[0].log().mean(1) + math.log(length)
        means.append(by_network.mean())
        errors.append(by_network.std() / 2)
        lawful.append(law(kind, "fbm", float(hurst), length, 1.0).forward[-1].log() / 2 + math.log(length))
    norm = steps.square().sum()
    x, planned = (float((steps * torch.stack(y)).sum() / norm) for y in (means, lawful))
    error = float((steps * torch.stack(errors)).norm() / norm)
    assert abs(x - wanted["x"]) < 3 * math.hypot(error, wanted["se"])
    assert abs(x - planned) < 4 * error
    other = 1 - wanted["pred"]  # negative control: a chain of the other roughness
    assert wanted["pred"] == 0.5 or abs(x - other) > 3 * math.hypot(error, wanted["se"])


def _parts(key: str) -> tuple[str, DepthWeights, float, int]:
    kind, weights, beta, length = key.split("_")
    return kind, weights, float(beta[4:]), int(length[1:])  # type: ignore[return-value]
