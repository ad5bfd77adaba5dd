"""Models that torch can build and no graph can hold: refused by name, or taken as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import CaptureError, KGraphError, ModelError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
CALLS = (kgraph.analyze, lambda model, x: kgraph.transform(model, "tat", x))


@pytest.mark.parametrize("call", CALLS)
def test_exported_modules(call: Any) -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), (X,)).module()
    with pytest.raises(ModelError, match=r"came out of torch\.export.*Pass the module that was exported"):
        call(exported, X)


def test_traced_graph_modules_are_models() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert kgraph.transform(traced, "tat", X)(X).shape == (2, 2)


class Layers(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.relu(self._modules[name](x))  # type: ignore[misc]
        return x


@pytest.mark.parametrize("call", CALLS)
def test_names_that_are_no_identifiers(call: Any) -> None:
    with pytest.raises(CaptureError, match=r"cannot write code for Layers.*node 'a\"b'.*Rename submodules"):
        call(Layers("first", 'a"b'), X)


class Empty(nn.Module):
    """Layers without inputs or outputs beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
        self.none, self.bare = nn.Linear(8, 0, bias=False), nn.Linear(0, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.first(x))
        return self.out(h) + self.bare(x[:, :0]), self.none(h)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_of_size_zero() -> None:
    rows = kgraph.analyze(Empty(), X).to_dict()["nodes"]
    assert rows
    made = kgraph.transform(Empty(), "tat", X)
    assert [tuple(y.shape) for y in made(X)] == [(2, 2), (2, 0)]


def test_too_deep_to_copy() -> None:
    model: nn.Module = nn.Linear(8, 8)
    for _ in range(400):
        model = nn.Sequential(model)
    with pytest.raises(KGraphError):
        kgraph.analyze(model, X)
    with pytest.raises(ModelError, match="nested too deeply"):
        kgraph.transform(model, "tat", X)
