"""Models that torch can build and no graph can hold: refused by name, or taken as they are."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.while_loop import while_loop

import kgraph
from kgraph.errors import CaptureError, InputError, KGraphError, ModelError, RuleError

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


class Written(nn.Module):
    """Two layers in a forward that a test writes."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(8, 8), nn.Linear(8, 8), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conditional(m: Written, x: Tensor) -> Tensor:
    return torch.cond(x.mean() > 0, lambda z: m.a(z), lambda z: m.b(z), (x,))


def repeated(m: Written, x: Tensor) -> Tensor:
    return while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, m.a(z)), (torch.tensor(0), x))[1]


def scanned(m: Written, x: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, m.a(x), 0, combine_mode="generic")


@pytest.mark.parametrize("call", [*CALLS, kgraph.nngp])
@pytest.mark.parametrize(
    ("forward", "name"), [(conditional, r"torch\.cond"), (repeated, "while_loop"), (scanned, "associative_scan")]
)
def test_operators_on_functions(forward: Any, name: str, call: Any) -> None:
    """A model that runs; a wrong input beside it is still said to be one."""
    with pytest.raises(CaptureError, match=rf"forward calls {name}, .*test_refusals\.py:\d+.*plain tensor operations"):
        call(Written(forward), X)
    with pytest.raises(InputError, match="does not run on the example inputs"):
        call(Written(lambda m, x: m.b(m.a(x))), torch.randn(2, 9))


GROUPS = {
    "a sum": lambda t: t - t.logsumexp(-1, keepdim=True),
    "a product": lambda t: t * t.amax(-1, keepdim=True),
    "a maximum": lambda t: torch.maximum(t, t.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_channels_and_what_is_made_of_them(name: str) -> None:
    model = Written(lambda m, x: GROUPS[name](m.a(x).unflatten(-1, (2, 4))).exp().flatten(1))
    with pytest.raises(RuleError, match=r"over groups of channels.*kgraph\.analyze"):
        kgraph.nngp(model, X)


def test_a_law_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are computed when they are asked for: the node whose they are is named, and its line."""

    def broken(*_: object) -> None:
        raise RuntimeError("sizes do not match\nand more")

    monkeypatch.setattr(importlib.import_module("kgraph.gram.kernels"), "gram_of", broken)
    with pytest.raises(
        RuleError, match=r"could not be computed: RuntimeError: sizes do not match \(at node 'linear_1'"
    ):
        kgraph.nngp(Written(lambda m, x: m.b(m.a(x).tanh())), X)
