"""The certificate against plain PyTorch: hooks on the emitted module, weights drawn by hand, no line in common.

Both draw their own weights and inputs, so they agree within their errors: 4 of them, widened to as rare an event of
Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import kgraph
from kgraph.certificate import Certificate, Figure

DRAWS, PAIRS, STEP = 12, 24, 1e-3
Sums = dict[str, list[Tensor]]


def orthogonal(rows: int, cols: int) -> Tensor:
    """Haar, times sqrt(max(1, rows / cols))."""
    q, r = torch.linalg.qr(torch.randn(max(rows, cols), min(rows, cols), dtype=torch.float64))
    q = q * r.diagonal().sign()
    return (q if rows >= cols else q.T) * math.sqrt(max(1.0, rows / cols))


@torch.no_grad()
def draw(module: nn.Module, size: int) -> None:
    """Orthogonal linear layers, delta-orthogonal convolutions of odd kernels, no bias.

    A convolution of few channels is orthogonal over its window, every tap of one mean square, and as large as zeros
    beyond the borders of its ``size`` x ``size`` inputs leave q = 1.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels < 16:
            weight = layer.weight
            weight.copy_(orthogonal(len(weight), weight[0].numel()).reshape(weight.shape))
            weight /= weight.square().mean((0, 1), keepdim=True).sqrt() * weight[0].numel() ** 0.5
            one = torch.ones(1, 1, size, size, dtype=weight.dtype)
            met = nn.functional.conv2d(one, torch.ones_like(weight[:1, :1]), padding=layer.padding)  # pyright: ignore
            weight *= (weight[0, 0].numel() / met.mean()).sqrt()
            assert layer.bias is not None
            layer.bias.zero_()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight = layer.weight
            weight.zero_()
            middle = weight if weight.ndim == 2 else weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
            middle.copy_(orthogonal(*middle.shape))
            if layer.bias is not None:
                layer.bias.zero_()


def unit(x: Tensor) -> Tensor:
    return x / x.square().mean(1, keepdim=True).sqrt()


def probes(shape: tuple[int, ...]) -> list[Tensor]:
    """a, b unrelated to it and a' close to it, at every position."""
    a, b, t = (unit(torch.randn(PAIRS, *shape, dtype=torch.float64)) for _ in range(3))
    b, t = (unit(x - (x * a).mean(1, keepdim=True) * a) for x in (b, t))
    return [a, b, math.cos(STEP) * a + math.sin(STEP) * t]


def by_hooks(module: nn.Module, names: list[str], shape: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """q, C(0) and slope of every draw by name of the submodule: those that have errors come from `agree`."""
    seen: Sums = {}
    module = module.double().eval()
    found: dict[str, list[list[float]]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda m, args, out: seen.setdefault(name, []).append(out.detach())

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for _ in range(DRAWS):
        draw(module, shape[-1])
        seen.clear()
        with torch.no_grad():
            for x in probes(shape):
                module(x)
        for name, (a, b, close) in seen.items():
            sums = [a.square().sum(), b.square().sum(), (a * b).sum(), (close - a).square().sum()]
            found.setdefault(name, []).append([float(v) / a.numel() for v in sums])
    for handle in handles:
        handle.remove()
    return {name: torch.tensor(rows) for name, rows in found.items()}  # pyright: ignore[reportReturnType]


def figures(moments: Any) -> list[tuple[float, float]]:
    """(value, error) of q, C(0), slope by leaving draws out."""

    def three(m: Tensor) -> Tensor:
        return torch.stack([m[0], m[2] / (m[0] * m[1]).sqrt(), m[3] / m[0] / (2 - 2 * math.cos(STEP))])

    n = len(moments)
    whole = three(moments.mean(0))
    out = torch.stack([three((moments.sum(0) - m) / (n - 1)) for m in moments])
    errors = ((n - 1) / n * (out - out.mean(0)).square().sum(0)).sqrt()
    return list(zip(whole.tolist(), errors.tolist(), strict=True))


def agree(certificate: Certificate, names: dict[str, str], moments: dict[str, Any]) -> None:
    wide = float(stats.t.isf(stats.norm.sf(4), DRAWS - 1))
    for node, name in names.items():
        row = certificate[node]
        own: list[Figure] = [row.q, row.c[0], row.slope]
        for quantity, mine, (value, error) in zip("qCs", own, figures(moments[name]), strict=True):
            allowed = wide * math.hypot(mine.error, error) + 2e-3
            assert abs(mine.value - value) < allowed, (node, quantity, mine, value, error)


def mlp() -> nn.Module:
    return nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(48, 48), nn.ReLU())], nn.Linear(48, 24))


class Pooled(nn.Module):
    """Convolutions with a stride, and a mean over positions in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 40, 3, 2, padding=1)
        self.last, self.head = nn.Conv2d(40, 40, 3, padding=1), nn.Linear(40, 30)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.enter, self.inner, self.last):
            x = torch.nn.functional.softplus(layer(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_mlp(method: str) -> None:
    shaped = kgraph.transform(mlp(), method, torch.randn(2, 48))
    certificate = shaped.kgraph.certificate(DRAWS, pairs=PAIRS, seed=5)
    names = {row.node: row.node.replace("linear_", "").replace("linear", "0") for row in certificate.rows}
    names = {node: str(2 * int(index)) for node, index in names.items()}
    assert len(names) == 7
    agree(certificate, names, by_hooks(shaped, list(names.values()), (48,)))


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_cnn_with_a_pool(method: str) -> None:
    shaped = kgraph.transform(Pooled(), method, torch.randn(2, 3, 8, 8))
    certificate = shaped.kgraph.certificate(DRAWS, pairs=PAIRS, seed=5)
    layers = {"conv2d": "enter", "conv2d_1": "inner", "conv2d_2": "last", "linear": "head"}
    before_pool = next(row for row in certificate.rows if row.kind == "pool")
    path = next(n.target for n in shaped.graph.nodes if n.name == before_pool.node)
    moments = by_hooks(shaped, [*layers.values(), path], (3, 8, 8))
    agree(certificate, {**layers, before_pool.node: path}, moments)


def test_the_oracle_tells_another_module_apart() -> None:
    """Negative control: a constant changed in the module by a tenth is seen."""
    shaped = kgraph.transform(mlp(), "dks", torch.randn(2, 48))
    certificate = shaped.kgraph.certificate(DRAWS, pairs=PAIRS, seed=5)
    other = kgraph.transform(mlp(), "dks", torch.randn(2, 48))
    other.get_submodule("3").output_scale *= 1.1  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]
    moments = by_hooks(other, ["4"], (48,))
    with pytest.raises(AssertionError):
        agree(certificate, {"linear_2": "4"}, moments)
