"""1 - c is carried from layer to layer: ten digits after 10,000 of them, against 50-digit arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

ONE_MINUS = 0.5
"""1 - c of the two inputs."""


class Chain(nn.Module):
    """Layers of two units: their second moments are exact numbers."""

    def __init__(self, phi: Callable[[Tensor], Tensor], depth: int, entry: float) -> None:
        super().__init__()
        self.phi = phi
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(depth))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.tensor([[entry, entry], [-entry, -entry]]))  # about zero, as draws are

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.phi(layer(x))
        return x


def pair_of_inputs(gap: float) -> Tensor:
    """Two inputs of q = 1 (of two channels) whose 1 - c is ``gap``."""
    angle = 2 * math.asin(math.sqrt(gap / 2))
    return math.sqrt(2) * torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)


def relu_of(theta: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    """c and slope behind one relu layer of weight variance 2."""
    return (mpmath.sin(theta) + (mpmath.pi - theta) * mpmath.cos(theta)) / mpmath.pi, 1 - theta / mpmath.pi


@pytest.fixture(scope="module")
def relu_chain() -> kgraph.Kernels:
    model = Chain(torch.relu, 10_000, 1.0).double()  # sw2 = 2 * 1^2: the edge of chaos
    return kgraph.kernels(model, pair_of_inputs(ONE_MINUS), parametrization="ntk")


def test_ten_thousand_relu_layers(relu_chain: kgraph.Kernels) -> None:
    with mpmath.workdps(50):
        c, ntk = mpmath.mpf(1) - ONE_MINUS, mpmath.mpf(0)
        for _ in range(10_000):
            # weights unit normal in the NTK form, sw2 = 2: T' = slope (2 c + 2 T), and E[relu' relu'] is half of it
            c_out, slope = relu_of(mpmath.acos(c))
            ntk, c = slope * (c + ntk), c_out
        assert relu_chain.one_minus_c is not None and relu_chain.ntk is not None
        assert relu_chain.positions == "diagonal" and relu_chain.how == "exact"
        assert abs(float(relu_chain.one_minus_c[0, 1]) / (1 - c) - 1) < 1e-10
        assert abs(float(relu_chain.ntk[0, 1]) / ntk - 1) < 1e-10
        assert abs(float(relu_chain.nngp[0, 0]) - 1) < 1e-10  # the q map itself: 10,000 roundings


def test_a_difference_keeps_fewer_digits(relu_chain: kgraph.Kernels) -> None:
    """Negative control: the same number as q - cov."""
    q = relu_chain.nngp.diagonal()
    naive = 1 - relu_chain.nngp[0, 1] / (q[0] * q[1]).sqrt()
    assert relu_chain.one_minus_c is not None
    assert abs(float(naive / relu_chain.one_minus_c[0, 1]) - 1) > 1e-10


def test_erf_layers_in_chaos() -> None:
    """1 - c begins at 1e-20, where a difference is 0, and grows by nine orders of magnitude."""
    depth, q = 600, mpmath.mpf(1)
    model = Chain(torch.erf, depth, 0.75).double()
    found = kgraph.kernels(model, pair_of_inputs(1e-20), with_ntk=False).one_minus_c
    with mpmath.workdps(80):
        c = mpmath.mpf(1) - mpmath.mpf("1e-20")
        for _ in range(depth):
            q, c = erf_layer(mpmath.mpf(2) * mpmath.mpf("0.75") ** 2 * q, c)
        assert 1e-12 < 1 - c < 1e-10
        assert found is not None and abs(float(found[0, 1]) / (1 - c) - 1) < 1e-10


def erf_layer(q: mpmath.mpf, c: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    """q and c of erf(z)."""
    out = 2 / mpmath.pi * mpmath.asin(2 * q / (1 + 2 * q))
    return out, 2 / mpmath.pi * mpmath.asin(2 * c * q / (1 + 2 * q)) / out


class Residual(nn.Module):
    """Sums, a norm, a product and a bias on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Linear(64, 64, bias=False)
        nn.init.normal_(self.a.bias), nn.init.normal_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + 0.7 * self.b(torch.relu(x))
        x = self.norm(x + torch.tanh(x))
        return self.conv(x) * torch.sigmoid(self.a(x))


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_a_model_of_many_operations(size: float) -> None:
    """Gaps scale as the squared distance of inputs: carried and differenced agree to the difference's digits."""
    torch.manual_seed(0)
    model = Residual().double()
    x = torch.randn(1, 64, dtype=torch.float64)
    inputs = torch.cat([x, x + size * torch.randn(1, 64, dtype=torch.float64)])
    graph = capture(model, inputs)
    nodes = kgraph.kernels(graph, inputs, nodes="all", with_ntk=False).nodes
    checked = 0
    for gram in nodes.values():
        if gram.how == "sampled" or gram.one_minus_c is None:
            continue
        q = gram.nngp.diagonal(dim1=0, dim2=1)
        naive = 1 - gram.nngp[0, 1] / (q[..., 0] * q[..., 1]).sqrt()
        assert float(naive) == pytest.approx(float(gram.one_minus_c[0, 1]), rel=1e-9, abs=2e-14)
        checked += 1
    assert checked >= 6
