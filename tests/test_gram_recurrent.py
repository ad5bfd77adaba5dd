"""Recurrent layers against brute force."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import Case, Net, check_nngp, dense, sequences
from torch import Tensor, nn

import kgraph
from kgraph.errors import RuleError

HIDDEN = 256


def net(kind: type[nn.RNNBase], read: str, *, first: bool = True, layers: int = 1, both: bool = False) -> Net:
    """A recurrent layer read at its last output, or averaged over time."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.rnn(x if first else x.transpose(0, 1))[0]
        y = y if first else y.transpose(0, 1)
        return m.w(y[:, -1] if read == "last" else y.mean(1) if read == "mean" else y[:, 0])

    rnn = kind(6, HIDDEN, layers, batch_first=first, bidirectional=both)
    return Net(forward, rnn=rnn, w=dense(HIDDEN * (2 if both else 1), HIDDEN))


class Untied(nn.Module):
    """tanh steps with a matrix of their own each: what forgetting that weights are shared would compute."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(6, HIDDEN) for _ in range(4))
        self.step = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.w = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = 0 * self.read[0](x[:, 0])
        total = h
        for t in range(4):
            h = (self.read[t](x[:, t]) + self.step[t](h)).tanh()
            total = total + h
        return self.w(total / 4)


CELLS = {
    "RNN last": (lambda: net(nn.RNN, "last"), lambda: net(nn.RNN, "first")),
    "RNN mean": (lambda: net(nn.RNN, "mean"), lambda: Untied()),
    "RNN of two layers": (lambda: net(nn.RNN, "mean", layers=2), lambda: net(nn.RNN, "mean")),
    "LSTM last": (lambda: net(nn.LSTM, "last"), lambda: net(nn.LSTM, "first")),
    "LSTM mean": (lambda: net(nn.LSTM, "mean"), lambda: net(nn.LSTM, "last")),
    "LSTM both ways": (lambda: net(nn.LSTM, "mean", both=True), lambda: net(nn.LSTM, "last", both=True)),
    "GRU last": (lambda: net(nn.GRU, "last"), lambda: net(nn.GRU, "first")),
    "GRU mean": (lambda: net(nn.GRU, "mean"), lambda: net(nn.GRU, "last")),
    "GRU time first": (lambda: net(nn.GRU, "last", first=False), lambda: net(nn.GRU, "first", first=False)),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent(name: str) -> None:
    right, wrong = CELLS[name]
    check_nngp(Case(right, wrong, sequences, 5, HIDDEN, 60))


def test_tanh_is_not_sampled() -> None:
    import kgraph

    assert kgraph.kernels(net(nn.RNN, "mean").double(), sequences()).how == "quadrature"


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export of flat weights
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_as_the_whole_model(kind: type[nn.RNNBase]) -> None:
    """Its first output counts, whose channels are the last dimension of what comes in; time first has no batch."""
    torch.manual_seed(0)
    layer = kind(3, 16, batch_first=True).double()
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * 1.0)[0] * 1.0

    found, wrapped = (kgraph.kernels(m, x, with_ntk=False) for m in (layer, First()))
    torch.testing.assert_close(found.nngp, wrapped.nngp)
    assert found.places == (4,)
    with pytest.raises(RuleError, match="no sequence of channels"):
        kgraph.nngp(kind(3, 16), x)
