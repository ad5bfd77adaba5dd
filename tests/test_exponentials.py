"""What bounds an exponent keeps its range: rates of state-space models, scales of flows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph

STEPS = 5


class StateSpace(nn.Module):
    """h_t = exp(-a softplus(dt(x_t))) h_{t-1} + u(x_t), as in Mamba: the state decays, whatever the input."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.step, self.enter, self.head = (nn.Linear(width, width) for _ in range(4))
        self.log_rate = nn.Parameter(torch.linspace(0.0, 2.0, width))

    def forward(self, x: Tensor) -> Tensor:
        u = functional.silu(self.inner(x))
        rate = functional.softplus(self.step(u) - 4.0)
        decay = torch.exp(-torch.exp(self.log_rate) * rate.transpose(1, 2).transpose(1, 2))
        entering, state = self.enter(u), torch.zeros_like(x[:, 0])
        states = []
        for t in range(STEPS):
            state = decay[:, t] * state + entering[:, t]
            states.append(state)
        return self.head(torch.stack(states, 1))


class Coupling(nn.Module):
    """y = x exp(2 tanh(s(x))) + t(x): tanh is there to bound the scale."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.scale, self.shift, self.head = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(x * torch.exp(2 * torch.tanh(self.scale(h))) + self.shift(h))


def recorded(model: nn.Module, x: Tensor, name: str) -> list[Tensor]:
    """Values of the calls of a function while a shaped module runs."""
    found = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            value = super().run_node(n)
            if n.name.startswith(name):
                found.append(value)
            return value

    with torch.no_grad():
        Recorder(model).run(x)
    return found


@pytest.mark.parametrize("method", ["tat", "dks"])
def test_a_rate_of_decay_stays_one(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, STEPS, 32)
    shaped = kgraph.transform(StateSpace(), method, x)
    decays = [value for value in recorded(shaped, x, "exp") if value.ndim == 3]
    assert decays and all(bool((value <= 1).all()) for value in decays)
    kept = {change.node: change.why for change in shaped.kgraph.ledger.kept}
    assert any("softplus" in node and "exponent" in why for node, why in kept.items())
    assert sum("silu" in change.node for change in shaped.kgraph.ledger.changes) == 1  # an activation beside it
    assert not any("exp" in line for line in shaped.kgraph.ledger.unmet)


def test_a_bounded_scale_stays_bounded() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    shaped = kgraph.transform(Coupling(), "tat", x)
    (scale,) = recorded(shaped, x, "exp")
    assert bool((scale <= torch.e**2).all()) and bool((scale >= torch.e**-2).all())
    shaping = [change.node for change in shaped.kgraph.ledger.changes if change.what == "shape activation"]
    assert len(shaping) == 1 and "tanh_1" not in shaping[0]  # the hidden layer's is an activation like any other
