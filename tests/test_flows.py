"""Flows that return their log-determinant: true after a transform, or the ledger says that it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.emitted import EmittedModule

DIM = 6
X = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))


class Coupling(nn.Module):
    """RealNVP: b exp(s) + t, the log-determinant sum(s) (Dinh et al. 2017, arXiv 1605.08803)."""

    def __init__(self) -> None:
        super().__init__()
        half = DIM // 2
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(half, 32), nn.Tanh(), nn.Linear(32, DIM)) for _ in range(3))
        self.scale = nn.Parameter(torch.full((half,), 0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for net in self.nets:
            a, b = x.chunk(2, -1)
            s, t = net(a).chunk(2, -1)
            s = torch.tanh(s) * self.scale
            x, log_det = torch.cat((b * torch.exp(s) + t, a), -1), log_det + s.sum(-1)
        return x, log_det


class Planar(nn.Module):
    """x + u tanh(w x + b), log|1 + (1 - tanh^2) w u| (Rezende and Mohamed 2015, arXiv 1505.05770)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, 1) for _ in range(3))
        self.u = nn.ParameterList(torch.randn(DIM) * 0.3 for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for layer, u in zip(self.layers, self.u, strict=True):
            h = torch.tanh(layer(x))
            log_det = log_det + torch.log(
                torch.abs(1 + (1 - h**2).squeeze(-1) * (layer.get_parameter("weight")[0] @ u))
            )
            x = x + u * h
        return x, log_det


class Residual(nn.Module):
    """x + V elu(W x), log|det(1 + V D W)| with the derivative D of elu by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.leave = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for enter, leave in zip(self.enter, self.leave, strict=True):
            a = enter(x)
            slope = torch.where(a > 0, torch.ones_like(a), torch.exp(a))
            jacobian = torch.einsum("ik,bk,kj->bij", leave.weight, slope, enter.weight)
            log_det = log_det + torch.linalg.slogdet(torch.eye(DIM) + jacobian)[1]
            x = x + leave(functional.elu(a))
        return x, log_det


class Squashed(nn.Module):
    """tanh(W x), its log-derivative 2 (log 2 - a - softplus(-2 a)) written as a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for layer in self.layers:
            a = layer(x)
            slopes = 2 * (0.6931471805599453 - a - functional.softplus(-2 * a))
            log_det = log_det + torch.linalg.slogdet(layer.weight)[1] + slopes.sum(-1)
            x = torch.tanh(a)
        return x, log_det


def error(flow: nn.Module) -> float:
    """Largest difference of the returned log-determinant and that of the Jacobian by automatic differentiation."""
    jacobian = torch.stack([torch.func.jacrev(lambda z: flow(z[None])[0][0])(row) for row in X])
    with torch.no_grad():
        return float((flow(X)[1] - torch.linalg.slogdet(jacobian)[1]).abs().max())


def says_false(flow: EmittedModule) -> bool:
    return any(line.startswith("output 1 was the log-determinant of output 0") for line in flow.kgraph.ledger.unmet)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("build", [Coupling, Planar, Residual, Squashed])
@pytest.mark.parametrize("method", ["edge-of-chaos", "ntk-chaos"])
def test_true_where_no_sum_is_weighted(build: Callable[[], nn.Module], method: str) -> None:
    """Float32 determinants of 6 x 6: within 1e-4. Balancing tanh, elu or exp would be off by tenths."""
    shaped = kgraph.transform(made(build), method, X)
    assert error(shaped) < 1e-4
    assert not says_false(shaped)


@pytest.mark.parametrize("build", [Coupling, Residual, Squashed])
@pytest.mark.parametrize("method", ["tat", "dks"])
def test_false_is_said(build: Callable[[], nn.Module], method: str) -> None:
    """DKS and TAT weight the sums, the log-determinant's among them: it is false, by tenths, and the ledger says so."""
    model = made(build)
    assert error(model) < 1e-4
    shaped = kgraph.transform(model, method, X)
    assert says_false(shaped) == (error(shaped) > 0.1)
    assert says_false(shaped)


KEPT = [(Coupling, "exp", "exponential"), (Residual, "elu", "its derivative"), (Squashed, "tanh", "its derivative")]


@pytest.mark.parametrize(("build", "what", "why"), KEPT)
def test_what_the_formula_knows_is_kept(build: Callable[[], nn.Module], what: str, why: str) -> None:
    ledger = kgraph.transform(made(build), "dks", X).kgraph.ledger
    assert sum(line.what == what and why in line.why for line in ledger.kept) >= 2
    assert not [line for line in ledger.changes if line.what == "shape activation" and line.before == what] or (
        what == "exp"
    )


class Heads(nn.Module):
    """Two heads, and two functions of one tensor, neither the derivative of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(DIM, 32), nn.Linear(32, DIM), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.enter(x)
        return self.a(torch.tanh(z)), self.b(functional.gelu(z)).squeeze(-1)


class Bump(nn.Module):
    """exp(-z^2) is an activation, unlike exp(z)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(DIM, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.exp(-(self.enter(x) ** 2)))


def test_ordinary_heads_are_shaped() -> None:
    ledger = kgraph.transform(made(Heads), "dks", X).kgraph.ledger
    assert ledger.counts()["shape activation"] == 2
    assert not any("log-determinant" in line for line in ledger.unmet)
    ledger = kgraph.transform(made(Bump), "dks", X).kgraph.ledger
    assert not any("exponential" in line.why for line in ledger.kept)


def test_the_model_stays_as_it_was() -> None:
    """The Jacobian is taken of the caller's model in eval mode, which leaves no mode, gradient or value behind."""
    model = made(Coupling).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shaped = kgraph.transform(model, "dks", X)
    assert model.training and shaped.training and all(p.grad is None for p in shaped.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
