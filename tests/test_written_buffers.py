"""Buffers that a forward writes to before it reads them: what is read is the new value, and the model keeps its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph

WIDTH = 64


class Writing(nn.Module):
    def __init__(self, write: Callable[[Writing], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.write = write
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mask", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.write(self)
        return self.b(functional.relu(self.a(x)) * factor)


def counted(m: Writing) -> Tensor:
    m.steps += 1
    return 3 * (m.steps > 0)


def twice(m: Writing) -> Tensor:
    m.steps.add_(2.0)
    m.steps.mul_(m.steps)
    return m.steps


def opened(m: Writing) -> Tensor:
    m.mask[: WIDTH // 2].fill_(2.0)
    m.mask[WIDTH // 4 : WIDTH // 2] += 1.0
    return m.mask


def before_and_after(m: Writing) -> Tensor:
    before = m.steps + 1.0
    m.steps.add_(4.0)
    return before + m.steps


SQUARES = {counted: 9.0, twice: 16.0, opened: (4.0 + 9.0) / 4, before_and_after: 25.0}


@pytest.mark.parametrize("write", SQUARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_behind_a_write(write: Callable[[Writing], Tensor], dtype: torch.dtype) -> None:
    """q = E[a^2] q_x E[b^2] n^2 / 2 times the mean square of the factor, as the forward itself makes it."""
    torch.manual_seed(0)
    model, x = Writing(write).to(dtype), torch.randn(3, WIDTH, dtype=dtype)
    squares = [float(layer.weight.detach().square().mean()) for layer in (model.a, model.b)]
    q = SQUARES[write] * squares[0] * squares[1] * WIDTH**2 / 2
    final = kgraph.analyze(model, x).final
    assert (final.how, final.q) == ("exact", pytest.approx(q, rel=1e-6))
    found = kgraph.kernels(model, x)
    assert found.how == "exact"
    assert found.nngp.diagonal().tolist() == pytest.approx((q * x.double().square().mean(1)).tolist(), rel=1e-6)
    assert float(found.ntk[0, 0]) > 0
    assert float(model.steps) == 0  # its own buffers are not moved on
    assert not model.mask.any()
    measured = list(kgraph.montecarlo(model, x, draws=32).nodes.values())[-1]
    assert measured.q == pytest.approx(q, abs=4 * measured.q_error + 0.1 * q)
    with torch.no_grad():
        assert float(Writing(write).write(model).double().square().mean()) == pytest.approx(SQUARES[write])


def test_the_report_of_a_transformed_model() -> None:
    torch.manual_seed(0)
    shaped = kgraph.transform(Writing(counted), "dks", torch.randn(3, WIDTH))
    assert shaped.kgraph.after.final.q == pytest.approx(9.0, rel=1e-3)
