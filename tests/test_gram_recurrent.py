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


STEPPED = {"RNN": (nn.RNN, nn.RNNCell), "LSTM": (nn.LSTM, nn.LSTMCell), "GRU": (nn.GRU, nn.GRUCell)}


def stepped(cell: nn.Module, *, reset: bool = False) -> Net:
    """A cell called at every time; with ``reset``, its state forgotten in between."""

    def forward(m: Net, x: Tensor) -> Tensor:
        state = m.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            state = m.cell(x[:, t]) if reset else m.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    return Net(forward, cell=cell)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("name", STEPPED)
def test_a_cell_by_hand_is_the_layer(name: str) -> None:
    """nngp and NTK of the last output, by the layer's own rule and by one cell called at every time."""
    kind, cell_of = STEPPED[name]
    torch.manual_seed(0)
    layer, cell = kind(6, 32, batch_first=True).double(), cell_of(6, 32).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    whole = Net(lambda m, x: m.rnn(x)[0][:, -1], rnn=layer)
    x = sequences()
    expected, found, wrong = (kgraph.kernels(m, x) for m in (whole, stepped(cell), stepped(cell, reset=True)))
    assert expected.ntk is not None and found.ntk is not None
    rtol = 1e-9 if name == "RNN" else 0.02  # gates are drawn, 8192 times
    torch.testing.assert_close(found.nngp, expected.nngp, rtol=rtol, atol=rtol * float(expected.nngp.max()))
    torch.testing.assert_close(found.ntk, expected.ntk, rtol=2 * rtol, atol=rtol * float(expected.ntk.max()))
    assert found.how == expected.how
    assert not torch.allclose(wrong.nngp, expected.nngp, rtol=0.05)


def test_a_cell_with_a_known_state_is_refused() -> None:
    model = Net(lambda m, x: m.cell(x[:, 0], torch.ones(len(x), 16, dtype=x.dtype)), cell=nn.GRUCell(6, 16).double())
    with pytest.raises(RuleError, match="known state"):
        kgraph.nngp(model, sequences())
