"""Pointwise functions, one by one and composed; dropout as an independent mask."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import IMAGE_TRAIN, VECTOR, VECTOR_TRAIN, Build, dense, disagreements, images, propagated, vectors
from torch import nn
from torch.nn import functional

import kgraph
from kgraph import algebra
from kgraph.kernel import SAME, Mask, Pairs, Part
from kgraph.rules import pointwise

FUNCTIONS = {
    "relu": torch.relu,
    "clamp": lambda u: u.clamp(-0.3, 0.8),
    "exp": lambda u: torch.exp(0.5 * u),
    "hardswish": lambda u: functional.hardswish(3 * u),
    "power": lambda u: u.abs() ** 1.5,
    "1 - sigmoid": lambda u: 1 - torch.sigmoid(u),
    "swish by hand": lambda u: u * torch.sigmoid(u),
    "relu6 gate": lambda u: u * functional.relu6(u + 3) / 6,
    "shifted, scaled, squared": lambda u: (2 * u - 0.5) ** 2,
    "step": lambda u: (u > 0) * u,
    "where": lambda u: torch.where(u > 0, u, u * u),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(vectors(FUNCTIONS[name]), VECTOR) == []


def test_an_identity_in_the_place_of_the_function_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "apply_all", lambda fn, x: x)
    assert disagreements(vectors(torch.relu), VECTOR)


def test_a_derivative_without_second_moment_is_not_a_number() -> None:
    """sqrt|u|: E[f^2] = sqrt(2 q / pi) is finite, E[f'^2] is not."""
    u, root = (list(propagated(b, VECTOR).kernels().values())[-1].merged for b in (vectors(abs), SQUARE_ROOT))
    assert float(root.q) == pytest.approx(u.mean, rel=1e-2)
    assert not math.isfinite(float(root.slope[Pairs.UNIT, SAME]))
    assert not [d for d in disagreements(SQUARE_ROOT, VECTOR) if d[0] != "slope"]


SQUARE_ROOT = vectors(lambda u: u.abs().sqrt())


def drop(width: int) -> nn.Module:
    return nn.Dropout(0.3)


def drop_channels(width: int) -> nn.Module:
    return nn.Dropout2d(0.3)


relu = torch.relu
DROPPED: dict[str, Build] = {
    "alone": vectors(lambda u, d: d(relu(u)), drop),
    "between layers": vectors(lambda u, b, d: relu(b(d(relu(u)))), dense, drop),
    "before a nonlinearity": vectors(lambda u, d: torch.tanh(3 * d(u)), drop),
    "in a branch": vectors(lambda u, d: relu(u + d(relu(u))), drop),
    "twice": vectors(lambda u, d: d(u) * d(u), drop),
    "alpha": vectors(lambda u, d: d(u), lambda width: nn.AlphaDropout(0.3)),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_agrees(name: str) -> None:
    assert disagreements(DROPPED[name], VECTOR_TRAIN) == []


@pytest.mark.parametrize(
    "build",
    [
        images(lambda u, d: d(relu(u)).mean((2, 3)), drop),
        images(lambda u, d: functional.max_pool2d(d(relu(u)), 2), drop),
        images(lambda u, d: d(relu(u)), drop_channels),
        images(lambda u, d: torch.tanh(d(relu(u))).mean((2, 3)), drop_channels),
    ],
    ids=["averaged", "pooled", "channels", "channels, averaged"],
)
def test_dropout_of_positions_agrees(build: Build) -> None:
    assert disagreements(build, IMAGE_TRAIN) == []


def test_dropout_is_exact_in_train_mode_and_nothing_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.25))
    before, after = kgraph.analyze(model, torch.randn(2, 64), mode="train").nodes[-2:]
    assert after.q == pytest.approx(before.q / 0.75)
    assert after.how == "exact"
    assert [c * after.q for c in after.c] == pytest.approx([c * before.q for c in before.c])
    before, after = kgraph.analyze(model, torch.randn(2, 64), mode="eval").nodes[-2:]
    assert after.q == before.q


def test_one_mask_for_all_inputs_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = algebra.mask

    def shared(like: Part, keep: float, height: float, same: torch.Tensor, name: str) -> Part:
        return right(like, keep, height, torch.ones_like(same), name)

    monkeypatch.setattr(algebra, "mask", shared)
    assert disagreements(DROPPED["alone"], VECTOR_TRAIN)


def test_a_dropped_part_is_a_product_with_a_mask() -> None:
    part = list(propagated(DROPPED["alone"], VECTOR_TRAIN).kernels().values())[-1].merged
    assert isinstance(part.expr.right.expr, Mask)  # type: ignore[union-attr]


def test_one_mask_for_all_channels_of_a_position() -> None:
    """`Dropout1d` of [N, T, C] drops positions: each has a mask of its own, and what it leaves is not Gaussian."""
    layer, x = nn.Linear(8, 16), torch.randn(2, 4, 8)
    dropped = kgraph.analyze(nn.Sequential(layer, nn.Dropout1d(0.5)), x)["feature_dropout"]
    assert dropped.how == "assumed" and "one mask" in dropped.note
    entries = kgraph.analyze(nn.Sequential(layer, nn.Dropout(0.5)), x)["dropout"]
    assert (dropped.q, dropped.c_positions) == pytest.approx((entries.q, entries.c_positions))
