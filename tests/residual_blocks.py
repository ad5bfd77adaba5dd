"""Ordinary torch residual networks of arXiv 2206.06929, and what the tests of residual scaling measure on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kgraph.depth_correlated import DepthWeights, draw_paths
from kgraph.modules import WeightedSum

REFERENCE: dict[str, Any] = json.loads(
    (Path(__file__).parent / "reference" / "resnet_scaling.json").read_text(encoding="utf-8")
)
WIDTH = 40


def exactly_scaled(features: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with Gaussian weights whose mean square is 1 / fan_in to the last digit."""
    layer = nn.Linear(features, features, bias=False)
    drawn = torch.randn(features, features, generator=generator, dtype=torch.float64)
    layer.weight.data = drawn / drawn.square().mean().sqrt() / features**0.5
    return layer


class Res1(nn.Module):
    """h + V relu(h)."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.last = exactly_scaled(features, generator)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.last(torch.relu(h))


class Res3(nn.Module):
    """h + V sigma(W h)."""

    def __init__(self, features: int, generator: torch.Generator, activation: Any = torch.relu) -> None:
        super().__init__()
        self.first, self.last = exactly_scaled(features, generator), exactly_scaled(features, generator)
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        return h + self.last(self.activation(self.first(h)))


def network(kind: str, length: int, features: int = WIDTH, seed: int = 0) -> nn.Sequential:
    """A chain of blocks in float64."""
    generator = torch.Generator().manual_seed(seed)
    block = {"res1": Res1, "res3": Res3}[kind]
    return nn.Sequential(*(block(features, generator) for _ in range(length)))


def reweighted(shaped: nn.Module, alpha: float) -> nn.Module:
    """The same transformed module with another constant on its branches."""
    for module in shaped.modules():
        if isinstance(module, WeightedSum):
            module.weights = (1.0, alpha)
    return shaped


def finite_chain(
    kind: str,
    weights: DepthWeights,
    hurst: float | None,
    length: int,
    betas: list[float],
    *,
    networks: int,
    inputs: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """|h_L - h_0| / |h_0| and |p_0 - p_L| / |p_L| of finite chains, [betas, networks, inputs], without any graph.

    One matrix product a layer for all networks, and the same weights for every beta.
    """
    generator = torch.Generator().manual_seed(seed)
    d, rows = WIDTH, len(betas) * inputs
    paths = [draw_paths(weights, length, networks * d * d, generator, hurst) for _ in range(2 if kind == "res3" else 1)]
    outer, *inner = (p.reshape(length, networks, d, d) / d**0.5 for p in paths)
    alpha = (length ** -torch.tensor(betas, dtype=torch.float64)).repeat_interleave(inputs)[:, None]
    h0, last = (
        torch.randn(networks, inputs, d, generator=generator, dtype=torch.float64).repeat(1, len(betas), 1)
        for _ in range(2)
    )
    h, active = h0, torch.empty(length, networks, rows, d, dtype=torch.bool)
    for layer in range(length):
        u = h @ inner[0][layer].mT if inner else h
        active[layer] = u > 0
        h = h + alpha * (u.clamp_min(0) @ outer[layer].mT)
    p = last
    for layer in reversed(range(length)):
        back = (p @ outer[layer]) * active[layer]
        p = p + alpha * (back @ inner[0][layer] if inner else back)
    out, grad = ((x - y).norm(dim=-1) / y.norm(dim=-1) for x, y in ((h, h0), (p, last)))
    return tuple(r.reshape(networks, len(betas), inputs).transpose(0, 1) for r in (out, grad))  # type: ignore[return-value]
