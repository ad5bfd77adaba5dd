"""What integrals under two Gaussians take, counted in function values: bounded, however wide, sharp or singular."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.errors import InputError
from kgraph.maps import Pointwise, pointwise, quadrature

DTYPE = torch.float64


class Counted:
    """A function that counts the numbers it is asked for."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn, self.values = fn, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.values += z.numel()
        return self.fn(z)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=DTYPE)


@pytest.mark.parametrize("q", [1e6, 1e12, 1e43, 1e200])
@pytest.mark.parametrize("fn", [functional.silu, functional.softplus, functional.mish])
def test_a_wide_gaussian_takes_few_panels(fn: Callable[[Tensor], Tensor], q: float) -> None:
    """Far out all of them are relus, up to O(1 / q) in shares of q; a panel every power of two took 20 million."""
    phi, c = Counted(fn), 0.4
    value, slope = Pointwise(phi).dual(number(q), number(q), number(c * q))
    wanted, wanted_slope = pointwise("relu").dual(number(q), number(q), number(c * q))
    assert float(value / wanted) == pytest.approx(1, abs=10 / q + 1e-9)
    assert float(slope) == pytest.approx(float(wanted_slope), abs=10 / math.sqrt(q) + 1e-9)
    assert phi.values < 2_000_000


@pytest.mark.parametrize("q", [1.0, 1e4, 1e12])
def test_panels_of_a_wide_gaussian_serve_a_narrow_one(q: float) -> None:
    """E[silu(z1) silu(z2)], z2 so wide that silu is relu there: E[relu(m + s z)] = m Phi(m / s) + s density(m / s)."""
    wide, c = 1e18, 0.5
    root, mean, spread = math.sqrt(q), c * math.sqrt(wide), math.sqrt(0.75 * wide)

    def integrand(x: float) -> float:
        inner = mean * x * stats.norm.cdf(mean * x / spread) + spread * stats.norm.pdf(mean * x / spread)
        return root * x * special.expit(root * x) * inner * stats.norm.pdf(x)

    cuts = [k / root for k in (-40, -10, 0, 10, 40) if abs(k / root) < 9]
    wanted, _ = integrate.quad(integrand, -9, 9, points=cuts, epsabs=0, epsrel=1e-11, limit=500)
    value, _ = Pointwise(functional.silu).dual(number(q), number(wide), number(c * math.sqrt(q * wide)))
    assert float(value) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("u", [-0.3, -1.5, -0.7])
def test_a_pole_at_a_kink_is_no_number(u: float) -> None:
    """log|1 + u relu(z)| has the derivative 1 / (z - z0), whose square has no integral: infinite panels were taken
    for resolved ones, and their thousands of nodes for a slope."""
    phi = Counted(lambda z: torch.log(torch.abs(1 + u * torch.relu(z))))
    with pytest.raises(InputError, match="does not converge"):
        Pointwise(phi).dual(number(1.0), number(1.0), number(0.5))
    assert phi.values < 2_000_000


def test_without_the_pole_it_is_a_number() -> None:
    """Negative control: log(1 + .3 relu(z))."""
    value, slope = Pointwise(lambda z: torch.log(torch.abs(1 + 0.3 * torch.relu(z)))).dual(*map(number, (1, 1, 1)))
    wanted, _ = integrate.quad(lambda z: np.log(1 + 0.3 * z) ** 2 * stats.norm.pdf(z), 0, 9)
    wanted_slope, _ = integrate.quad(lambda z: (0.3 / (1 + 0.3 * z)) ** 2 * stats.norm.pdf(z), 0, 9)
    assert float(value) == pytest.approx(wanted, rel=1e-8)
    assert float(slope) == pytest.approx(wanted_slope, rel=1e-8)


def test_too_fine_a_function_is_refused() -> None:
    """sin(300 z) for q = 400 turns a thousand times: its square of panels is refused, one Gaussian is not."""
    phi = Counted(lambda z: torch.sin(300 * z))
    fine = Pointwise(phi)
    with pytest.raises(InputError, match="too fine"):
        fine.dual(number(400), number(400), number(200))
    assert float(fine.second(number(400))) == pytest.approx(0.5, rel=1e-9)
    assert phi.values < 2_000_000


def test_pieces_of_the_outer_nodes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = number(2.0), number(3.0), torch.tensor([-1.0, 0.3, 2.4], dtype=DTYPE)
    whole = Pointwise(lambda z: torch.tanh(40 * z)).dual(*arguments)
    monkeypatch.setattr(quadrature, "_CHUNK", 1)
    pieces = Pointwise(lambda z: torch.tanh(40 * z)).dual(*arguments)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


class Planar(nn.Module):
    """x + u relu(W x) with sum log|1 + u relu(W x)| beside it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.u = (-0.3, -1.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for layer, u in zip(self.layers, self.u, strict=True):
            psi = torch.relu(layer(x))
            log_det = log_det + torch.log(torch.abs(1 + u * psi)).sum(-1)
            x = x + u * psi
        return x, log_det


@pytest.mark.parametrize("call", ["analyze", "tat"])
def test_a_planar_flow_with_poles(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Its q by an integral of one dimension; its slope is not a number, and no integral says that it is one."""
    values, inner = 0, quadrature.value

    def counted(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        nonlocal values
        values += z.numel()
        return inner(fn, z)

    monkeypatch.setattr(quadrature, "value", counted)
    torch.manual_seed(0)
    model, x = Planar(), torch.randn(2, 64)
    report = kgraph.analyze(model, x) if call == "analyze" else kgraph.transform(model, call, x).kgraph.before
    assert values < 20_000_000  # of two layers' log, before and after
    root, row = math.sqrt(report["linear"].q), report["log"]

    def log_square(z: float) -> float:
        return math.log(abs(1 - 0.3 * root * z)) ** 2 * float(stats.norm.pdf(z))

    pole = 1 / (0.3 * root)
    wanted = sum(integrate.quad(log_square, *ends)[0] for ends in ((0, pole), (pole, pole + 9)))
    assert row.how == "sampled"
    assert row.q == pytest.approx(wanted, rel=0.05)
    assert math.isnan(row.slope)
