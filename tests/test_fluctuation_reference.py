"""Fluctuations at finite width: what of the reference file's measurements needs draws or training of its own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kgraph
from kgraph.errors import InputError
from kgraph.initializers import reinitialize_weight_

REFERENCE = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())
DDNTK = REFERENCE["S3_ddntk_n16"]["data"]
TRAINED = REFERENCE["S3_train_synthetic_n20"]["data"]
LAWS = {"orth": "orthogonal", "gauss": "gaussian"}
CRITICAL: dict[str, Any] = {"weight_variance": 1.0, "parametrization": "ntk"}
DEPTHS = (2, 5, 10, 20)


def chain(widths: list[int], phi: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), phi())]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(scope="module")
def derived() -> dict[str, kgraph.MeasuredFluctuations]:
    """S3_ddntk_n16's setting."""
    options: dict[str, Any] = {"draws": 100, "ddntk": [f"linear_{depth - 1}" for depth in DEPTHS], **CRITICAL}
    model = chain([16] * 21)
    return {key: kgraph.measure_fluctuations(model, distribution=law, **options) for key, law in LAWS.items()}  # type: ignore[arg-type]


def test_A_of_gaussian_weights_extrapolates_in_one_over_n() -> None:
    """S3_A_gauss_1_over_n_extrapolation: A(n) = A + c/n at l = 6, whose A is the recursion's, though no A(n) is."""
    found, predicted = {}, math.nan
    for width, draws, (value, error) in ((32, 2000, (0.1531, 0.0078)), (128, 400, (0.0458, 0.0043))):
        measured = kgraph.measure_fluctuations(chain([width] * 7), draws=draws, distribution="gaussian", **CRITICAL)
        node, predicted = measured.nodes[5], measured.predicted.nodes[5].scaled["A"]
        found[width] = node.scaled["A"], node.error["A"]
        assert node.scaled["A"] == pytest.approx(value, abs=4 * math.hypot(error, node.error["A"]))
        assert abs(node.scaled["A"] - predicted) > 4 * node.error["A"]
    (near, near_error), (far, far_error) = found[32], found[128]
    limit = (128 * far - 32 * near) / 96
    error = math.hypot(128 * far_error, 32 * near_error) / 96
    assert predicted == pytest.approx(0.0099, abs=5e-5)
    assert limit == pytest.approx(predicted, abs=4 * error)
    assert limit == pytest.approx(0.010, abs=4 * math.hypot(error, 0.006))
    assert 4 * error < near  # the extrapolation tells more than "below A(32)"


def off(found: kgraph.MeasuredFluctuations, key: str, depth: int, ours: str, theirs: str) -> float:
    """Difference of a measured tensor from the file's, in standard errors of both."""
    row, node = DDNTK[f"{key}_L{depth}"], found.nodes[depth - 1]
    return (node.scaled[ours] - row[theirs]) / math.hypot(node.error[ours], row[f"{theirs}_se"])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("key", LAWS)
def test_dntk_and_ddntk(derived: dict[str, kgraph.MeasuredFluctuations], key: str, depth: int) -> None:
    """S3_ddntk_n16: every row and tensor within four standard errors of both measurements.

    The furthest, S of orth_L5 (3.6), is the file's own Theta of that row, 2 % off ours, cubed: without K/Theta^3, 1.4.
    """
    for name in "PQRSTU":
        assert abs(off(derived[key], key, depth, name, name)) < 4, name
    row, node = DDNTK[f"{key}_L{depth}"], derived[key].nodes[depth - 1]
    slack = 0.1 if key == "orth" else 0.3  # the file gives no errors of these
    assert pytest.approx(row["K"], rel=slack) == node.K
    assert node.Theta == pytest.approx(row["Theta"], rel=slack)


def test_ddntk_of_other_indices_or_law_fails(derived: dict[str, kgraph.MeasuredFluctuations]) -> None:
    """Negative control of the definitions: S, T, U are the three pairings of one tensor, R is the other tensor."""
    for key, depth in (*(("orth", depth) for depth in DEPTHS), ("gauss", 2)):
        assert all(abs(off(derived[key], key, depth, *pair)) > 4 for pair in itertools.permutations("RSTU", 2))
    wrong = [abs(off(derived["orth"], "gauss", 5, name, name)) for name in "STU"]
    assert min(wrong) > 3 and max(wrong) > 4


def test_ddntk_options_and_report() -> None:
    model = chain([8, 8, 8, 8])
    found = kgraph.measure_fluctuations(model, draws=20, dntk=["linear_1"], ddntk=["4"], **CRITICAL)
    finite = [[math.isfinite(node.scaled[name]) for name in "PRU"] for node in found.nodes]
    assert finite == [[False] * 3, [True, False, False], [True] * 3]
    text = str(found)
    assert "KS/nΘ³" in text and max(map(len, text.splitlines())) <= 100
    every = kgraph.measure_fluctuations(model, draws=20, ddntk=True, **CRITICAL)
    assert every.nodes[2].scaled == found.nodes[2].scaled
    with pytest.raises(InputError, match="ddntk names"):
        kgraph.measure_fluctuations(model, ddntk=["nowhere"])
    with pytest.raises(InputError, match="quantities"):
        found.disagreements(quantities=["R"])


@pytest.mark.parametrize("phi", [nn.ReLU, nn.ELU])
def test_ddntk_of_kinks_is_not_measured(phi: type[nn.Module]) -> None:
    """Where phi' jumps dd_II has no mean, where phi'' does dd_I has a part that no draw shows."""
    found = kgraph.measure_fluctuations(chain([6, 6, 6], phi), draws=10, ddntk=True)
    assert math.isfinite(found.nodes[1].scaled["P"]) and math.isnan(found.nodes[1].scaled["R"])
    assert any("R, S, T, U not measured from linear_1" in note for note in found.notes)


def clusters(seeds: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """200 training and 300 test points of 10 Gaussian clusters in 20 dimensions, centers and noise of variance 1."""
    centers = torch.randn(seeds, 10, 20, generator=generator)
    y = torch.randint(10, (seeds, 500), generator=generator)
    x = centers.gather(1, y[..., None].expand(-1, -1, 20)) + torch.randn(seeds, 500, 20, generator=generator)
    return x[:, :200], y[:, :200], x[:, 200:], y[:, 200:]


def stacked(depth: int, seeds: int, generator: torch.Generator) -> list[Tensor]:
    """Weights of ``depth`` tanh layers of width 20 and 10 outputs, [law and seed, out, in] each."""
    networks = [chain([20] * (depth + 1) + [10]) for _ in range(2 * seeds)]
    for index, network in enumerate(networks):
        law = "suo" if index < seeds else "gaussian"
        for weight in network.parameters():
            reinitialize_weight_(weight, distribution=law, generator=generator)
    return [
        torch.stack([w.detach() for w in ws]).requires_grad_()
        for ws in zip(*(n.parameters() for n in networks), strict=True)
    ]


def accuracies(depth: int, rate: float, seeds: int = 5, steps: int = 200) -> dict[str, float]:
    """Mean test accuracy of both laws after gradient descent on all points, all networks at once."""
    generator = torch.Generator().manual_seed(depth)
    x, y, x_test, y_test = (torch.cat([t, t]) for t in clusters(seeds, generator))
    weights = stacked(depth, seeds, generator)

    def logits(s: Tensor) -> Tensor:
        for index, weight in enumerate(weights):
            s = (s.tanh() if index else s) @ weight.mT
        return s

    for _ in range(steps):
        loss = cross_entropy(logits(x).flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= rate * gradient
    with torch.no_grad():
        right = (logits(x_test).argmax(-1) == y_test).double().mean(1)
    return {"orth": float(right[:seeds].mean()), "gauss": float(right[seeds:].mean())}


@pytest.mark.parametrize("rate", [0.03, 0.1])
@pytest.mark.parametrize("depth", [5, 20, 40])
def test_training_of_narrow_networks(depth: int, rate: float) -> None:
    """S3_train_synthetic_n20: 200 steps of gradient descent at width 20.

    The file does not say what its 10 classes are. Ours are clusters, whose count and noise were picked (of a few tried)
    so that they are as hard as the file's; so this checks the laws and depths against each other, not the data. Each
    accuracy is within two of the file's deviations over seeds, the gap of the laws within half of itself or one.
    """
    found = accuracies(depth, rate)
    rows = {key: TRAINED[f"{key}_L{depth}_lr{rate}"] for key in LAWS}
    for key, row in rows.items():
        assert found[key] == pytest.approx(row["acc"], abs=2 * row["acc_sd"]), key
    gap, wanted = found["orth"] - found["gauss"], rows["orth"]["acc"] - rows["gauss"]["acc"]
    spread = math.hypot(rows["orth"]["acc_sd"], rows["gauss"]["acc_sd"])
    assert gap == pytest.approx(wanted, abs=max(spread, wanted / 2))
    assert gap > (wanted / 2 if depth > 5 else 0)
