"""Pooling: windows that overlap, hang over the border, or are uneven; averages and maxima."""

from __future__ import annotations

import pytest
import torch
from oracles import IMAGE, disagreements, images, ntk_ratio, pixelwise
from torch import nn
from torch.nn import functional

import kgraph
from kgraph.rules import pool, spatial
from kgraph.rules.spatial import Mixing

relu = torch.relu

POOLS = {
    "average": lambda u: functional.avg_pool2d(u, 2),
    "average, padding counted": lambda u: functional.avg_pool2d(u, 3, 2, 1),
    "average, padding not counted": lambda u: functional.avg_pool2d(u, 3, 2, 1, count_include_pad=False),
    "average, overlapping": lambda u: functional.avg_pool2d(u, 3, 1),
    "average, ceil": lambda u: functional.avg_pool2d(u, 4, 3, ceil_mode=True),
    "average, own divisor": lambda u: functional.avg_pool2d(u, 2, divisor_override=1),
    "average, oblong": lambda u: functional.avg_pool2d(u, (1, 3), (1, 2)),
    "adaptive average, uneven": lambda u: functional.adaptive_avg_pool2d(u, 4),
    "adaptive average, up": lambda u: functional.adaptive_avg_pool2d(u, 9),
    "adaptive average, global": lambda u: functional.adaptive_avg_pool2d(u, 1),
    "mean of one dimension": lambda u: u.mean(2, keepdim=True),
    "mean of means": lambda u: u.mean(2).mean(2),
    "sum": lambda u: u.sum((2, 3)),
    "maximum": lambda u: functional.max_pool2d(u, 2),
    "maximum, padded": lambda u: functional.max_pool2d(u, 3, 2, 1),
    "maximum, overlapping": lambda u: functional.max_pool2d(u, 2, 1),
    "maximum, ceil": lambda u: functional.max_pool2d(u, 4, 3, ceil_mode=True),
    "maximum, dilated": lambda u: functional.max_pool2d(u, 2, 1, dilation=2),
    "maximum of maxima": lambda u: functional.max_pool2d(functional.max_pool2d(u, 2), 3),
    "maximum of all": lambda u: u.amax((2, 3)),
    "adaptive maximum, uneven": lambda u: functional.adaptive_max_pool2d(u, 4),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(images(lambda u: POOLS[name](relu(u))), IMAGE) == []


def test_the_maximum_of_a_gaussian_agrees() -> None:
    assert disagreements(images(lambda u: functional.max_pool2d(u, 3, 1, 1)), IMAGE) == []


def test_positions_that_a_pool_made_alike_agree() -> None:
    body = images(lambda u, c: functional.avg_pool2d(relu(c(functional.adaptive_avg_pool2d(u, 3))), 3), pixelwise)
    assert disagreements(body, IMAGE) == []


def test_a_nonlinearity_behind_an_average_agrees() -> None:
    assert disagreements(images(lambda u: relu(u.mean((2, 3)))), IMAGE) == []


def test_averages_without_other_positions_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "mixing", lambda matrices, others=1: Mixing((1 / 4, 0.0), (0.0, 1.0), 1.0))
    assert disagreements(images(lambda u: functional.avg_pool2d(relu(u), 2)), IMAGE)


def test_windows_that_ignore_the_border_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "windows", lambda sizes, outputs, spans: pool.Windows(((9, 1.0),), 0.0))
    assert disagreements(images(lambda u: POOLS["maximum, padded"](relu(u))), IMAGE)


def test_the_error_of_a_maximum_is_what_other_draws_differ_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported error is the spread of q over draws, to a factor of 2; gelu falls and rises: no law is known."""
    model = nn.Sequential(nn.Conv2d(8, 64, 1, bias=False), nn.GELU(), nn.MaxPool2d(3, 2))
    fields, found = pool.FieldDraws, []
    for seed in range(12):
        monkeypatch.setattr(
            pool, "FieldDraws", lambda seed, elsewhere, own=seed: fields(100 + own, elsewhere=elsewhere)
        )
        found.append(kgraph.analyze(model, torch.randn(2, 8, 11, 11), mode="eval").final)
    q = torch.tensor([row.q for row in found], dtype=torch.float64)
    told = sum(float(row.note.removeprefix("+-")) for row in found) / len(found)
    assert 0.5 < told / float(q.std() / q.mean()) < 2


def test_average_pooling_mixes_positions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    before, pooled = kgraph.analyze(model, torch.randn(2, 3, 8, 8)).nodes[-2:]
    expected = before.q / 64 + (1 - 1 / 64) * before.q * before.c_positions
    assert pooled.q == pytest.approx(expected, rel=1e-12)


def test_the_ntk_behind_pools_is_that_of_the_network() -> None:
    build = images(lambda u, c: c(functional.avg_pool2d(functional.max_pool2d(relu(u), 2), 3)), pixelwise)
    ratio = ntk_ratio(build, IMAGE)
    assert ratio.value == pytest.approx(1.0, abs=4 * ratio.error + 8 / IMAGE.width)
    assert ratio.error < 0.15
