"""A module that the forward calls with other arguments than its first keeps them when it is emitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Shifted(nn.Linear):
    """A parent with one argument, a child with two: the second is what the parent gets."""

    def forward(self, scale: Tensor, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(scale * 2 if x is None else x)


class Optional(nn.Linear):
    def forward(self, input: Tensor, power: int = 1, *, negate: bool = False) -> Tensor:
        y = super().forward(input) ** power
        return -y if negate else y


class Model(nn.Module):
    def __init__(self, call: str, front: nn.Module) -> None:
        super().__init__()
        self.call, self.front, self.head = call, front, nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        calls = {
            "x": lambda: self.front(x),
            "x=": lambda: self.front(input=x),
            "x, default": lambda: self.front(x, 1, negate=False),
            "x, 3": lambda: self.front(x, 3),
            "negate": lambda: self.front(x, negate=True),
            "ones, x=": lambda: self.front(ones, x=x.sin()),
            "x twice": lambda: self.front(x) + self.front(x, 2),
        }
        return self.out(self.head(calls[self.call]()))


BARE = ("x", "x=", "x, default")


@pytest.mark.parametrize("call", [*BARE, "x, 3", "negate", "ones, x=", "x twice"])
@pytest.mark.parametrize("front_end", ["export", "trace"])
def test_calls_keep_their_binding(call: str, front_end: str) -> None:
    front = Shifted(8, 8) if call.startswith("ones") else Optional(8, 8)
    model = Model(call, front).eval()
    graph = capture(model, X, front_end=front_end)  # type: ignore[arg-type]
    emitted = graph.emit().eval()
    torch.testing.assert_close(emitted(X), model(X))
    called = {str(node.target) for node in emitted.graph.nodes if node.op == "call_module"}
    assert ("front" in called) == (call in BARE)
    assert "out" in called


def test_transformed_models_keep_their_binding() -> None:
    made = kgraph.transform(Model("ones, x=", Shifted(8, 8)), "tat", X)
    with torch.no_grad():
        made.get_parameter("front.weight").zero_()
        made.get_parameter("front.bias").zero_()
        still = made(X)
        assert torch.equal(still, made(-X))
        made.get_parameter("front.weight").fill_(1.0)
        assert not torch.equal(still, made(X))
