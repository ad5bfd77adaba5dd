"""order_chaos.json, normalisation_mc: LayerNorm and BatchNorm seen through the NTK of finite networks."""

from __future__ import annotations

import copy
import math
from functools import cache

import deconvolutional as dc
import pytest
import torch
from deconvolutional import REFERENCE
from scipy import stats
from torch import Tensor, nn

import kgraph

STORED = REFERENCE["normalisation_mc"]
ROWS = [name for name in STORED if "_vs_" in name]
BATCH = STORED["bn_after_last_nonlinearity"]
DRAWS = 12
PAIRS = torch.combinations(torch.arange(DRAWS))
"""The file's matrix is the mean of two draws, of width 1000."""


def normed_mlp(norm: str, activation: nn.Module, fan: int, width: int, outputs: int = 1) -> nn.Sequential:
    """Four weight layers, a LayerNorm in front of or behind every activation."""
    parts: list[nn.Module] = []
    for i in range(3):
        own = [copy.deepcopy(activation)]
        plain = nn.LayerNorm(width, eps=0.0, elementwise_affine=False)
        own = {"none": own, "ln_pre": [plain, *own], "ln_post": [*own, plain]}[norm]
        parts += [nn.Linear(width if i else fan, width), *own]
    return nn.Sequential(*parts, nn.Linear(width, outputs)).double()


def activation_of(name: str) -> nn.Module:
    norm, _, form = name.partition("_vs_relu_")
    return nn.ReLU() if norm == "ln_post" else dc.balanced_module("relu", form)


def ntk_factors(model: nn.Module, beta: float) -> dict[str, float]:
    """E[w^2] of the NTK form, which are also its learning-rate multipliers on standard parameters."""
    named = model.named_parameters()
    return {n: beta**2 if n.endswith("bias") else (1 - beta**2) / p.shape[1] for n, p in named}


def redraw(model: nn.Module, factors: dict[str, float], generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=factors[name] ** 0.5, generator=generator)


def inputs(name: str) -> Tensor:
    """Four inputs of the file's cosines, q = 1."""
    return torch.linalg.cholesky(torch.tensor(STORED[name]["R"], dtype=torch.float64)) * 2.0


@cache
def distances(name: str) -> dict[str, Tensor]:
    """|mean of two draws - limit| / |limit| of every pair of draws, by the limit."""
    model, x = normed_mlp(name.partition("_vs_")[0], activation_of(name), 4, STORED[name]["width"]), inputs(name)
    factors, generator, drawn = ntk_factors(model, 0.1), torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        redraw(model, factors, generator)
        drawn.append(kgraph.empirical_ntk(model, x, multipliers=factors).matrix)
    means = torch.stack(drawn)[PAIRS].mean(1)
    limits = {form: limit(f"none_vs_{form}") for form in ("relu_std", "relu_nrm")}
    return {form: (means - wanted).flatten(1).norm(dim=1) / wanted.norm() for form, wanted in limits.items()}


@cache
def limit(name: str) -> Tensor:
    model = normed_mlp(name.partition("_vs_")[0], activation_of(name), 4, 16)
    found = kgraph.ntk(model, inputs(name), parametrization="ntk", variances=ntk_factors(model, 0.1))
    return torch.as_tensor(found)


@pytest.mark.parametrize("name", ROWS)
def test_limits(name: str) -> None:
    """A LayerNorm in front of sigma changes nothing in the limit; behind it, it makes sigma the normalized one."""
    wanted = torch.tensor(STORED[name]["limit"], dtype=torch.float64)
    torch.testing.assert_close(limit(name), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ROWS)
def test_distances_from_the_limits(name: str) -> None:
    """The file's distances of two draws from either limit are among ours, whose logarithms are nearly normal."""
    row, form = STORED[name], name.partition("_vs_")[2]
    assert row["rel_err"] == row["err_vs"][form] and row["seeds"] == 2
    sigmas = float(stats.t.isf(stats.norm.sf(4), DRAWS - 1))
    for against, found in distances(name).items():
        logs = found.log()
        assert abs(math.log(row["err_vs"][against]) - float(logs.mean())) < sigmas * float(logs.std()), against
    own, other = distances(name)[form], distances(name)["relu_nrm" if form == "relu_std" else "relu_std"]
    assert float(own.max()) < float(other.min())  # negative control: the other limit


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("norm", ["none", "bn_last_post", "bn_all_post"])
def test_constant_mode_behind_batch_norm(norm: str, beta: float) -> None:
    """(1/N^2) 1'Theta 1 = beta^2 at any width where BatchNorm follows the last nonlinearity, else many times that.

    The file gives neither inputs nor widths of these networks, so their other eigenvalues are those of nothing that
    could be drawn again: only what holds among the file's own numbers is checked.
    """
    row, generator = BATCH[f"beta{beta}_{norm}"], torch.Generator().manual_seed(0)
    parts: list[nn.Module] = []
    for i in range(3):
        parts += [nn.Linear(24 if i else 8, 24), dc.balanced_module("relu", "std")]
        if norm == "bn_all_post" or (norm == "bn_last_post" and i == 2):
            parts.append(nn.BatchNorm1d(24, eps=1e-12, affine=False))
    model = nn.Sequential(*parts, nn.Linear(24, 1)).double().train()
    factors = ntk_factors(model, beta)
    redraw(model, factors, generator)
    x = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    constant = float(kgraph.empirical_ntk(model, x, multipliers=factors).matrix.mean())
    top = row["top_eigs"]
    assert row["beta2"] == pytest.approx(beta**2) and top[0] / top[1] == pytest.approx(row["lam1_over_lam2"], rel=1e-10)
    if norm == "none":
        assert constant > 2 * beta**2 and beta**2 * 2 < row["const_rayleigh"] <= top[0]
    else:
        assert constant == pytest.approx(beta**2, rel=1e-9) and row["const_rayleigh"] == pytest.approx(beta**2)
        assert row["const_over_trace"] < 0.05 * BATCH[f"beta{beta}_none"]["const_over_trace"]
