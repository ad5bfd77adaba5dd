"""reference/order_chaos.json: decoders, normalization layers, learning rates, by `kgraph.kernels` on real models."""

from __future__ import annotations

import math
from typing import Any

import deconvolutional as dc
import pytest
import torch
from deconvolutional import REFERENCE
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.meanfield.order_chaos import activation_moments

DCNN = REFERENCE["dcnn"]
K4 = (4, 2, 1, 0)


def image(matrix: Tensor) -> Tensor:
    side = math.isqrt(len(matrix))
    return matrix.diagonal().reshape(side, side)


def flat(diagonal: Tensor, value: float) -> bool:
    """The check that graph parametrization passes, and uniform must fail."""
    return float((diagonal / value - 1).abs().max()) < 1e-11


@pytest.mark.parametrize("kind", ["uniform", "graph"])
def test_borders(kind: str) -> None:
    stored = DCNN[f"border2d_relu_std_{kind}"]
    model: Any = dc.decoder(3, 2, 4, K4)
    model = dc.graph_parametrized(model, 4, 2) if kind == "graph" else model
    theta, sigma = (image(k) for k in dc.kernel_matrices(model, 4, 2, 0.1, 4))
    for name, found in (("theta", theta), ("sigma", sigma)):
        places = {"corner": found[0, 0], "edge": found[0, 16], "bulk": found[16, 16]}
        for place, value in places.items():
            assert float(value) == pytest.approx(stored[f"{name}_{place}"], rel=1e-11), (name, place)
    deviation = float((theta / stored["theory_diag"] - 1).abs().max())
    assert deviation == pytest.approx(stored["maxdev"], abs=1e-9)
    assert flat(theta.flatten(), stored["theory_diag"]) == (kind == "graph")
    r = activation_moments("relu").r(0.1)
    assert r == pytest.approx(stored["r"]) and (1 - r**3) / (1 - r) == pytest.approx(stored["theory_diag"])


@pytest.mark.parametrize(
    ("dims", "taps"),
    [(2, (3, 2, 1, 1)), (1, (5, 2, 2, 1)), (1, (6, 2, 2, 0))],
    ids=["k3s2p1op1", "k5s2p2op1", "k6s2p2"],
)
def test_flat_diagonal_with_uneven_strides(dims: int, taps: tuple[int, int, int, int]) -> None:
    model = dc.decoder(3, dims, 4, taps, ("relu", "nrm"))
    parents = max(DCNN["parents_1d"][{3: "k3s2p1op1_n4", 5: "k5s2p2op1_n4", 6: "k6s2p2_n4"}[taps[0]]]) ** dims
    r = activation_moments("relu").r(0.1, activation_moments("relu").mean)
    for graph in (True, False):
        chosen = dc.graph_parametrized(model, 4, dims) if graph else model
        theta, _ = dc.kernel_matrices(chosen, 4, dims, 0.1, int(parents))
        assert flat(theta.diagonal(), 1 + r + r * r) == graph


def test_interior_of_an_uneven_stride() -> None:
    """k3 s2 p1 op1, 3 layers: uneven variances even far from the border, none in graph parametrization.

    The file's uniform weights have the mean number of parents, k^2 / s^2 = 9 / 4, in their fan-in.
    """
    model = dc.decoder(3, 2, 4, (3, 2, 1, 1))
    for kind in ("uniform", "graph"):
        chosen = dc.graph_parametrized(model, 4, 2) if kind == "graph" else model
        parents = 4 if kind == "graph" else 9 / 4
        inner = image(dc.kernel_matrices(chosen, 4, 2, 0.1, parents)[1])[8:-8, 8:-8]
        stored = REFERENCE["layer_lr"][f"k3s2p1op1_interior_var_max_over_min_{kind}"]
        assert float(inner.max() / inner.min()) == pytest.approx(stored, rel=1e-9)


CHECKERS = [name for name in DCNN if name.startswith("checker1d")]
GEOMETRY = {"s2_k2": ((2, 2, 0, 0), 1, 3), "s2_k4": (K4, 2, 9), "s3_k3": ((3, 3, 0, 0), 1, 2)}


@pytest.mark.parametrize("name", CHECKERS)
def test_checkerboards(name: str) -> None:
    """The scaled NTK of two pixels depends on how often the stride divides their distance, and is bounded by it."""
    stored = DCNN[name]
    _, *key, activation, form, beta = name.split("_")
    taps, parents, size = GEOMETRY["_".join(key)]
    model: Any = dc.decoder(stored["L"], 1, size, taps, (activation, form))
    theta, _ = dc.kernel_matrices(dc.graph_parametrized(model, size, 1), size, 1, float(beta[4:]), parents)
    inner = slice(len(theta) // 3, -(len(theta) // 3)) if taps == K4 else slice(None)  # no border among the ancestors
    theta = theta[inner, inner]
    scaled = theta / theta.diagonal().outer(theta.diagonal()).sqrt()
    at = torch.arange(len(theta))
    distance, stride = (at[:, None] - at).abs(), taps[1]
    r, depth = stored["r"], stored["L"]
    assert r == pytest.approx(dc.characteristic(activation, form, float(beta[4:])), rel=1e-11)
    for v, row in stored["by_valuation"].items():
        power = stride ** int(v)
        pairs = scaled[(distance > 0) & (distance % power == 0) & (distance % (power * stride) != 0)]
        assert float(pairs.min()) == pytest.approx(row["min"], abs=1e-11)
        assert float(pairs.max()) == pytest.approx(row["max"], abs=1e-11)
        capped = min(int(v), depth - 1)
        bound = (1 - r ** (capped + 1)) / (1 - r**depth)
        assert bound == pytest.approx(row["upper"], rel=1e-11) and row["max"] <= bound
        needed = (bound - float(pairs.min())) / ((capped + 1) * r**capped)
        assert needed == pytest.approx(row["C1_needed"], abs=1e-11)


def rayleigh(theta: Tensor, mode: Tensor) -> float:
    return float(mode @ theta @ mode / mode.square().sum() / theta.diagonal().mean())


@pytest.mark.parametrize("form", ["std", "nrm"])
def test_spectrum_2d(form: str) -> None:
    stored = DCNN[f"spectrum2d_relu_{form}_beta0.1"]
    assert stored["r"] == pytest.approx(dc.characteristic("relu", form, 0.1), rel=1e-11)
    model = dc.graph_parametrized(dc.decoder(3, 2, 4, K4, ("relu", form)), 4, 2)
    theta, _ = dc.kernel_matrices(model, 4, 2, 0.1, 4)
    sign = (-1.0) ** torch.arange(32, dtype=torch.float64)
    one = torch.ones_like(sign)
    modes = {"const": one.outer(one), "(-1)^x": sign.outer(one), "(-1)^(x+y)": sign.outer(sign)}
    for name, mode in modes.items():
        assert rayleigh(theta, mode.flatten()) == pytest.approx(stored["rayleigh_over_meandiag"][name], rel=1e-10)
    eigenvalues = torch.linalg.eigvalsh(theta)
    top = (eigenvalues[-6:].flip(0) / theta.diagonal().mean()).tolist()
    assert top == pytest.approx(stored["top_eigs_over_meandiag"], rel=1e-9)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(stored["cond"], rel=1e-8)


def layer_parts(model: nn.Module, size: int, dims: int, parents: int) -> list[Tensor]:
    """NTK of every layer by itself."""
    names = [name for name, _ in model.named_parameters()]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    chosen = [{n: float(n.rpartition(".")[0] == layer) for n in names} for layer in layers]
    graph = capture(model, dc.pixels(size, dims))
    return [dc.kernel_matrices(model, size, dims, 0.1, parents, multipliers, graph)[0] for multipliers in chosen]


LADDERS = {name: value for name, value in REFERENCE["layer_lr"].items() if not name.startswith("k3s2p1op1")}


LADDERS_UNFINISHED = {"1D_s2_L8_relu_std_b.1": 4, "1D_s2_L8_relu_nrm_b.1": 4, "2D_k4s2p1_L3_relu_std_b.1": 1}
"""Layers next to the input whose `op` in the file is no operator norm to its digits, but a power iteration's Rayleigh
quotient, stopped below it: by 3e-10 to 8e-8 of it, and 1.3e-3 in two dimensions, as after some 150 steps from a random
start. There the next eigenvalues are close. The proof that the norm is larger is `norm_with_proof`."""


def norm_with_proof(theta: Tensor) -> float:
    """The operator norm of a symmetric matrix, from below by a vector's Rayleigh quotient, from above by Cholesky."""
    values, vectors = torch.linalg.eigh(theta)
    norm, top = float(values[-1]), vectors[:, -1]
    assert float(top @ theta @ top) >= norm * (1 - 1e-12) and float(top.norm()) == pytest.approx(1, abs=1e-12)
    torch.linalg.cholesky((1 + 1e-11) * norm * torch.eye(len(theta), dtype=torch.float64) - theta)  # or raises
    return norm


@pytest.mark.parametrize("name", LADDERS)
def test_layer_dependent_learning_rate(name: str) -> None:
    stored = REFERENCE["layer_lr"][name]
    dims, layers = (1, 8) if name.startswith("1D") else (2, 3)
    taps, parents, size = ((2, 2, 0, 0), 1, 1) if dims == 1 else (K4, 4, 4)
    model = dc.graph_parametrized(dc.decoder(layers, dims, size, taps, ("relu", name.split("_")[-2])), size, dims)
    parts = layer_parts(model, size, dims, parents)
    assert [float(t.diagonal().mean()) for t in parts] == pytest.approx(stored["mean_diag"], rel=1e-10)
    assert [float(t.norm()) for t in parts] == pytest.approx(stored["fro"], rel=1e-10)
    assert [stored[key][-1] / stored[key][-2] for key in ("fro", "op")] == pytest.approx(
        [stored["fro_ratio_last"], stored["op_ratio_last"]], rel=1e-10
    )
    largest = [norm_with_proof(t) for t in parts]
    for layer, (own, other) in enumerate(zip(largest, stored["op"], strict=True)):
        unfinished = layer < LADDERS_UNFINISHED[name]
        assert own >= other - 1e-10 * own and (unfinished or own == pytest.approx(other, rel=1e-10)), layer
        assert not unfinished or own != pytest.approx(other, rel=1e-10)
    r, factor = stored["r"], stored["S"]
    assert r == pytest.approx(dc.characteristic("relu", name.split("_")[-2], 0.1), rel=1e-11)
    assert math.sqrt(factor) / r == pytest.approx(stored["theory_order_sqrtS_over_r"], rel=1e-11)
    for key, exponent in (("1", 0.0), ("S^(-l/2)", 0.5), ("S^(+l/2)", -0.5)):
        theta = sum((t * factor ** (-exponent * i) for i, t in enumerate(parts)), torch.zeros(()))
        values = torch.linalg.eigvalsh(theta)
        row = stored[key]
        assert float(values[-1] / values[0]) == pytest.approx(row["cond"], rel=1e-8)
        assert float(values[-1] / theta.diagonal().mean()) == pytest.approx(row["lam1_over_mean"], rel=1e-9)
        residual = float((1 - values / values[-1]).pow(100).mean())  # 50 steps at rate 1 / largest, squared
        assert residual == pytest.approx(row["white_target_resid_T50"], rel=1e-6)
        rated = [f * factor ** (-exponent * i) for i, f in enumerate(stored["fro"])]
        assert max(rated) / min(rated) == pytest.approx(row["fro_max_over_min"], rel=1e-9)


def test_param_groups_balance_the_kernel() -> None:
    """The groups' rates, as multipliers of the standard parameters, give the reference's better condition number."""
    size, stored = 4, REFERENCE["layer_lr"]["2D_k4s2p1_L3_relu_std_b.1"]
    model = dc.graph_parametrized(dc.decoder(3, 2, size, K4), size, 2)
    for key, exponent in (("1", 0.0), ("S^(-l/2)", 0.5)):
        groups = kgraph.param_groups(
            model, lr=1.0, beta=0.1, example_inputs=dc.pixels(size, 2), stride_exponent=exponent
        )
        found = kgraph.kernels(
            model,
            dc.pixels(size, 2),
            positions="full",
            variances=dc.variances(model, 0.1, 4),
            multipliers={group["name"]: group["lr"] for group in groups},
        )
        assert found.ntk is not None
        values = torch.linalg.eigvalsh(found.ntk[0, 0].reshape(1024, 1024))
        assert float(values[-1] / values[0]) == pytest.approx(stored[key]["cond"], rel=1e-8)


@pytest.mark.parametrize("name", [name for name in DCNN if name.startswith("spectrum1d")])
def test_spectrum_1d(name: str) -> None:
    stored, beta, form = DCNN[name], float(name[-3:]), name.split("_")[3]
    theta, _ = dc.kernel_matrices(dc.decoder(8, 1, 1, (2, 2, 0, 0), ("relu", form)), 1, 1, beta, 1)
    sign = (-1.0) ** torch.arange(256, dtype=torch.float64)
    found = {"period1": rayleigh(theta, torch.ones_like(sign)), "period2": rayleigh(theta, sign)}
    assert found == pytest.approx(stored["rayleigh"], rel=1e-9)
    assert sum(found.values()) / 256 == pytest.approx(stored["period2_trace_share"], rel=1e-9)
