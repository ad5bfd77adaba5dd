"""`kgraph.kernel_function`: the same numbers as `kgraph.kernels`, captured and measured once."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import InputError

X, Y = torch.randn(3, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)


def network() -> nn.Sequential:
    layers = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4)
    return nn.Sequential(*layers).double()


def same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_the_numbers_are_those_of_kernels(parametrization: str, mode: str) -> None:
    net = network()
    kernel = kgraph.kernel_function(net, X, mode=mode)
    for _ in range(2):  # measured, and remembered
        for second in (None, Y):
            known = kgraph.kernels(net, X, second, parametrization=parametrization, mode=mode)
            found = kernel(X, second, parametrization=parametrization)
            assert isinstance(found, kgraph.Kernels)
            assert same(found.nngp, known.nngp) and same(found.ntk, known.ntk) and found.how == known.how
            assert same(kernel(X, second, get="ntk", parametrization=parametrization), known.ntk)  # type: ignore[arg-type]
            assert same(kernel(X, second, get="nngp"), known.nngp)  # type: ignore[arg-type]


def test_a_table_with_a_row_of_zeros_that_is_read_as_a_weight_too() -> None:
    """Two measurements of one tensor, with and without the row, are not taken for one another."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 8, padding_idx=0)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.relu(self.table(tokens)) @ self.table.weight.T

    tokens, net = torch.randint(0, 12, (3, 4)), Tied()
    kernel = kgraph.kernel_function(net, tokens)
    kernel(tokens)
    assert same(kernel(tokens, get="nngp"), kgraph.nngp(net, tokens))  # type: ignore[arg-type]


def test_it_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kgraph.kernel_function(network(), X)
    module = sys.modules["kgraph.gram.kernels"]  # by its name there is the function of that name
    monkeypatch.setattr(module, "capture", lambda *_, **__: pytest.fail("captured again"))
    kernel(X)
    kernel(X, Y, get="ntk")
    with pytest.raises(pytest.fail.Exception):
        kgraph.nngp(network(), X)


def test_it_is_of_the_weights_there_were() -> None:
    net = network()
    kernel = kgraph.kernel_function(net, X)
    before = kgraph.nngp(net, X)
    for p in net.parameters():
        p.data.mul_(2.0)
    assert same(kernel(X, get="nngp"), before)  # type: ignore[arg-type]
    assert not torch.allclose(kgraph.nngp(net, X), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kernel: kernel(X[:, :8]), r"hold \[\(8,\)\] each, and the function was made with \[\(16,\)\]"),
        (lambda kernel: kernel({"x": X}), "each, and the function"),
        (lambda kernel: kernel(X, Y[:0]), "no inputs"),
        (lambda kernel: kernel(X, get="kernel"), "get"),
        (lambda kernel: kernel(X, get=()), "names no kernel"),
        (lambda kernel: kernel(X, positons="full"), "no option 'positons'. Such as positions"),
        (lambda kernel: kernel(X, positions="some"), "positions"),
        (lambda kernel: kgraph.kernel_function(network(), X, parametrization="mup"), "parametrization"),
    ],
)
def test_wrong_calls_are_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(kgraph.kernel_function(network(), X))
