"""Forwards that other people write: graphs of edges, buffers that advance, ids read one by one, modules of export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Forward(nn.Module):
    """Two layers and an embedding, put together by a function."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.head, self.body = nn.Linear(16, 32), nn.Linear(32, 4), body
        self.table, self.cell = nn.Embedding(12, 16), nn.GRUCell(16, 16)
        self.register_buffer("average", torch.zeros(32))

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.body(self, x)


class OneArgument(Forward):
    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.body(self, x)


class Messages(nn.Module):
    """Sums of neighbours' features, by one of two operations."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head, self.how = nn.Linear(16, 32), nn.Linear(32, 4), how

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.first(x)
        sent = hidden[edges[0]]
        to = edges[1].unsqueeze(1)
        to = to.expand_as(sent) if self.how == "as" else to.expand(-1, 32)
        return self.head(torch.relu(torch.zeros_like(hidden).scatter_add_(0, to, sent)))


@pytest.mark.parametrize("how", ["as", "sizes"])
def test_sums_over_edges(how: str) -> None:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])  # each node hears one other: nothing is summed
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    model = Messages(how)
    emitted = capture(model, (x, edges)).emit()
    torch.testing.assert_close(emitted(x, edges), model(x, edges))
    names = [row.name for row in kgraph.analyze(model, (x, edges)).analysis.nodes]
    assert any("scatter_add" in name for name in names)


def test_as_large_as_another_at_any_batch_size() -> None:
    model = OneArgument(
        lambda m, x: m.head(torch.relu(m.first(x)) * m.average.cos().unsqueeze(0).expand_as(m.first(x)))
    )
    emitted = capture(model, X).emit()
    assert "aten.expand_as" not in emitted.code
    other = torch.randn(7, 16)
    torch.testing.assert_close(emitted(other), model(other))


def _written(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    model.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
    return model.head(torch.relu(hidden - model.average))


def _assigned(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    model.average = 0.9 * model.average + 0.1 * hidden.mean(0)
    return model.head(torch.relu(hidden - model.average))


@pytest.mark.parametrize("body", [_written, _assigned])
def test_buffers_that_the_output_depends_on(body: Callable[..., Any]) -> None:
    model = OneArgument(body)
    before = model.average.clone()
    emitted = capture(copy.deepcopy(model), X).emit()
    assert torch.equal(model.average, before)
    for _ in range(3):  # each step moves the average on, and no gradient is kept from one to the next
        y = emitted(X)
        y.square().mean().backward()
        with torch.no_grad():
            torch.testing.assert_close(y, model(X))
    assert not torch.equal(emitted.average, before) and not emitted.average.requires_grad
    copy.deepcopy(emitted)


def test_a_model_whose_buffer_has_a_gradient_behind_it() -> None:
    model = OneArgument(_assigned)
    model(X)
    assert not model.average.is_leaf
    shaped = kgraph.transform(model, "tat", X)
    assert shaped(X).shape == (4, 4) and not model.average.is_leaf


def test_ids_read_one_by_one() -> None:
    def body(model: Any, ids: Tensor) -> Tensor:
        state = torch.zeros(ids.shape[0], 16)
        for step in range(ids.shape[1]):
            state = model.cell(model.table(ids[:, step]), state)
        return state

    report = kgraph.analyze(OneArgument(body), torch.randint(0, 12, (4, 3)))
    assert any("embedding" in row.name or row.name.startswith("table") for row in report.analysis.nodes)


def test_refusals_say_where_and_what_to_do() -> None:
    with pytest.raises(kgraph.KGraphError, match=r"forward takes \*rest.*def forward\(self, x, y\)"):
        kgraph.analyze(Forward(lambda m, x: m.head(m.first(x))), X)
    quantized = nn.Sequential(nn.Linear(16, 16), torch.ao.quantization.FakeQuantize(), nn.ReLU())
    with pytest.raises(kgraph.KGraphError, match="node '1'"):
        kgraph.analyze(quantized, X)
    back = torch.export.unflatten(torch.export.export(nn.Sequential(nn.Linear(16, 4), nn.Tanh()), (X,)))
    with pytest.raises(kgraph.KGraphError, match="Pass the module that was exported"):
        kgraph.transform(back, "tat", X)


class Held:
    """No type that PyTorch knows."""


def test_what_is_left_out_is_in_the_ledger() -> None:
    model = OneArgument(lambda m, x: (m.head(torch.relu(m.first(x))), Held()))
    assert any("Held" in note for note in kgraph.transform(model, "tat", X).kgraph.ledger.notes)


def test_moduli_of_complex_numbers_are_no_activations() -> None:
    model = OneArgument(lambda m, x: m.head(torch.view_as_complex(m.first(x).view(-1, 16, 2)).abs().repeat(1, 2)))
    shaped = kgraph.transform(model, "tat", X)
    assert shaped(X).isfinite().all()


def test_a_constant_shaped_like_a_random_tensor_is_not_trained() -> None:
    """h * (ones_like(h) + s): the gain moves by s alone, whatever parameters h comes from."""
    like = OneArgument(lambda m, x: m.head((h := m.first(x)) * (torch.ones_like(h) + m.head.bias[0])))
    plain = OneArgument(lambda m, x: m.head(m.first(x) * (torch.ones(32) + m.head.bias[0])))
    plain.load_state_dict(like.state_dict())
    found, expected = ([n.ntk for n in kgraph.analyze(m, X).analysis.nodes][-1] for m in (like, plain))
    assert found == pytest.approx(expected, rel=1e-6) and found > 0
