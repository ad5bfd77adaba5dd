"""isometry.json, S4_conv and S4_deep: what of them is Monte Carlo, with errors of our own draws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_edge_of_chaos import chain
from torch import Tensor

from kgraph.initializers import reinitialize_weight_
from kgraph.meanfield import fourier_multipliers

REFERENCE = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())
CONV, DEEP = REFERENCE["S4_conv"]["data"], REFERENCE["S4_deep_propagation_c32"]["data"]
MODES = CONV["fourier_modes_linear_circ"]
TAPS = {"uniform3": [1 / 3] * 3, "binomial3": [0.25, 0.5, 0.25], "delta3": [0.0, 1.0, 0.0], "uniform5": [0.2] * 5}
POSITIONS, CHANNELS = 12, 384


def modes_by_layer(shares: Tensor, layers: int, generator: torch.Generator) -> Tensor:
    """|Fourier modes 1 and 3| of the variance per position of a wide linear circular network, [2, layers + 1]."""
    k = 2 * math.pi * torch.arange(POSITIONS) / POSITIONS
    profile = 1 + 0.45 * torch.cos(k) + 0.45 * torch.cos(3 * k)
    x = torch.randn(1, CHANNELS, POSITIONS, generator=generator, dtype=torch.float64)
    x = x / x.square().mean(1, keepdim=True).sqrt() * profile.sqrt()
    size, found = len(shares), []
    for _ in range(layers + 1):
        found.append(torch.fft.fft(x.square().mean(1)[0])[[1, 3]].abs() / POSITIONS)
        weight = torch.randn(CHANNELS, CHANNELS, size, generator=generator, dtype=torch.float64)
        weight = weight * (shares / CHANNELS).sqrt()
        padded = torch.nn.functional.pad(x, (size // 2, size // 2), mode="circular")
        x = torch.nn.functional.conv1d(padded, weight)
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", MODES)
def test_decay_of_fourier_modes(name: str) -> None:
    """Every mode is lambda^layers of its start within the file's 3 % of that start, and ours within four errors.

    A mode that has decayed stands beside noise that has not, of all modes: so 3 % of the start, not of what is left.
    """
    row, shares = MODES[name], torch.tensor(TAPS[name], dtype=torch.float64)
    multipliers = fourier_multipliers(shares, POSITIONS)
    layers, generator = torch.arange(7), torch.Generator().manual_seed(0)
    ours = torch.stack([modes_by_layer(shares, 6, generator) for _ in range(8)])
    sigmas = float(stats.t.isf(stats.norm.sf(4), 7))
    for at, mode in enumerate((1, 3)):
        factor = float(multipliers[mode])
        assert factor == pytest.approx(row[f"lambda{mode}"], abs=1e-8)
        stored = torch.tensor(row[f"mode{mode}"], dtype=torch.float64)
        decay = factor**layers
        assert float((stored / stored[0] - decay).abs().max()) < 0.03
        assert abs(row[f"fit{mode}"] - factor) < 0.03
        share = ours[:, at] / ours[:, at, :1]
        error = share.std(0) / 8**0.5
        floor = 2 / math.sqrt(POSITIONS * CHANNELS)  # of a modulus whose mean is noise
        assert bool(((share.mean(0) - decay).abs() < sigmas * error + floor / 0.225).all())
        others = [
            float(fourier_multipliers(torch.tensor(t), POSITIONS)[mode]) for t in TAPS.values() if t != TAPS[name]
        ]
        assert all(float((stored / stored[0] - other**layers).abs().max()) > 0.03 for other in others)


def test_singular_values_of_gaussian_taps() -> None:
    """gauss_k3_c32_sv: one draw's, among twelve of ours (3 x 3 taps, 32 channels, a field of 8 x 8)."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(12):
        weight = torch.empty(32, 32, 3, 3, dtype=torch.float64)
        reinitialize_weight_(weight, distribution="gaussian", delta=False, generator=generator)
        values = torch.linalg.svdvals(torch.fft.fft2(weight, s=(8, 8)).movedim((0, 1), (-2, -1)))
        rows.append(torch.stack([values.square().mean(), values.max(), values.min().log()]))
    found, row = torch.stack(rows), CONV["gauss_k3_c32_sv"]
    stored = torch.tensor([row["mean_sq"], row["max"], math.log(row["min"])], dtype=torch.float64)
    apart = (stored - found.mean(0)) / (found.std(0) * math.sqrt(1 + 1 / 12))
    assert float(apart.abs().max()) < float(stats.t.isf(stats.norm.sf(4), 11))
    assert row["max"] > 1.5 and row["min"] < 0.1  # negative control: orthogonal taps have 1 and 1


@pytest.mark.parametrize("depth", [1000, 10_000])
def test_ratios_over_deep_chains(depth: int) -> None:
    """q and squared gradients over 1,000 and 10,000 orthogonal layers: log-normal, spread as the file's own seeds."""
    rows = [*DEEP["orth_more_seeds"][str(depth)], DEEP["first"][f"deep_orth_L{depth}_c32"]]
    count = 4 if depth == 1000 else 1
    ours = torch.tensor([chain(depth, "orthogonal", seed) for seed in range(count)]).log()
    for at, name in enumerate(("qL_over_q0", "grad_ratio")):
        stored = torch.tensor([row[name] for row in rows]).log()
        assert float(stored.abs().max()) < math.log(2) > float(ours.abs().max())  # the file's band
        allowed = float(stats.t.isf(stats.norm.sf(4), len(rows) - 1)) * float(stored.std())
        assert float((ours[:, at].mean() - stored.mean()).abs()) < allowed * math.sqrt(1 / count + 1 / len(rows))


def test_ratios_over_gaussian_chains() -> None:
    """1,000 Gaussian layers: far below, as the file's one seed; the logarithms' mean and spread are ours of six."""
    row = DEEP["first"]["deep_gauss_L1000_c32"]
    ours = torch.tensor([chain(1000, "gaussian", seed) for seed in range(6)]).log()
    assert row["qL_over_q0"] < 0.05 and row["grad_ratio"] < 1e-3
    sigmas = float(stats.t.isf(stats.norm.sf(4), 5)) * math.sqrt(1 + 1 / 6)
    for at, name in enumerate(("qL_over_q0", "grad_ratio")):
        assert abs(math.log(row[name]) - float(ours[:, at].mean())) < sigmas * float(ours[:, at].std())
        assert float(ours[:, at].max()) < math.log(0.5)  # negative control: outside the orthogonal band
