"""Convolutions: taps, padding, stride, dilation, groups, the transposed ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import IMAGE, disagreements, images, ntk_ratio
from torch import nn

import kgraph
from kgraph.rules import conv


def layer(size: int = 3, **options: Any):
    return lambda width: nn.Conv2d(width, width, size, **options)


def transposed(size: int, *strides: int, **options: Any):
    return lambda width: nn.ConvTranspose2d(width, width, size, *strides, **options)


CONVOLUTIONS = {
    "valid": layer(),
    "padded": layer(padding=1),
    "padded twice": layer(padding=2),
    "strided": layer(stride=2, padding=1),
    "dilated": layer(padding=2, dilation=2),
    "grouped": layer(padding=1, groups=4),
    "depthwise": lambda width: nn.Conv2d(width, width, 3, padding=1, groups=width),
    "circular": layer(padding=1, padding_mode="circular"),
    "reflected": layer(padding=1, padding_mode="reflect"),
    "patches": layer(2, stride=2),
    "same, even": layer(4, padding="same"),
    "oblong": layer((1, 5), padding=(0, 2), stride=(2, 1)),
    "transposed": transposed(4, 2, 1),
    "transposed, grouped, output padding": transposed(3, 2, 1, output_padding=1, groups=4),
    "transposed, dilated": transposed(3, dilation=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(images(lambda u, c: c(torch.relu(u)), CONVOLUTIONS[name]), IMAGE) == []


@pytest.mark.parametrize("function", [torch.relu, torch.tanh], ids=["relu", "tanh"])
def test_two_padded_layers_agree(function) -> None:
    body = images(lambda u, c, d: d(function(c(torch.relu(u)))), layer(padding=1), layer(padding=1))
    assert disagreements(body, IMAGE) == []


def test_without_padding_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "tap_counts", lambda n, out, taps, *_: torch.ones(taps, dtype=torch.float64))
    assert disagreements(images(lambda u, c: c(torch.relu(u)), layer(padding=2)), IMAGE)


def test_padding_lowers_the_average_q_by_the_taps_that_miss() -> None:
    model = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    nn.init.constant_(model.weight, 1 / math.sqrt(72))
    row = kgraph.analyze(model, torch.randn(2, 8, 5, 5)).final
    assert row.q == pytest.approx((13 / 15) ** 2, rel=1e-6)  # 3 taps an axis over 5 positions miss twice


def test_one_weight_at_two_dilations_is_two_layers() -> None:
    def body(u, c):
        return c(u) + nn.functional.conv2d(u, c.weight, c.bias, padding=2, dilation=2)

    assert disagreements(images(body, layer(padding=1)), IMAGE) == []


def test_the_ntk_is_that_of_the_network() -> None:
    ratio = ntk_ratio(images(lambda u, c: c(torch.relu(u)).mean((2, 3)), layer()), IMAGE)
    assert ratio.value == pytest.approx(1.0, abs=4 * ratio.error + 8 / IMAGE.width)
    assert ratio.error < 0.15


def test_the_ntk_of_a_padded_convolution_counts_taps() -> None:
    """3 (22 / 8)^2 + 1: a dimension's three taps meet 22 of 24 positions; summed gradients of one network."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 64, 3, padding=1), torch.randn(1, 3, 8, 8)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    found = kgraph.analyze(layer, x).final.ntk
    y = layer(x)[0, 0].flatten()
    squares = [
        sum(g.square().sum() for g in torch.autograd.grad(entry, list(layer.parameters()), retain_graph=True))
        for entry in y
    ]
    assert found == pytest.approx(3 * (22 / 8) ** 2 + 1, rel=1e-12)
    assert found == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)
