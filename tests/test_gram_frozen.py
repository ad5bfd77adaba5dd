"""Frozen parameters have no part in the NTK; constants made from inputs are known; float32 state runs in float64."""

from __future__ import annotations

from collections.abc import Callable

import gram_reference as reference
import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import InputError, KGraphError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRAM = X @ X.T / 6


def chain() -> nn.Sequential:
    """Three linear layers of sw2 = 2: layer l adds fan_in_l K_(l-1) 2^(layers behind)."""
    torch.manual_seed(0)
    spec = {"W_std": 2**0.5, "b_std": None}
    layers = [nn.Linear(6, 32, bias=False), nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)]
    return nn.Sequential(*(reference.set_moments(m, spec, m.in_features) for m in layers))


PARTS = (6 * 4 * GRAM, 32 * 2 * 2 * GRAM, 32 * 4 * GRAM)


def test_a_frozen_layer_has_no_part() -> None:
    model = chain()
    torch.testing.assert_close(kgraph.ntk(model, X), sum(PARTS, torch.zeros(())), rtol=1e-12, atol=0)
    model[1].requires_grad_(False)
    others = PARTS[0] + PARTS[2]
    torch.testing.assert_close(kgraph.ntk(model, X), others, rtol=1e-12, atol=0)
    torch.testing.assert_close(kgraph.ntk(model, X, count_frozen=True), others + PARTS[1], rtol=1e-12, atol=0)
    own = kgraph.ntk(model, X, multipliers={"1.weight": 0.5})  # a multiplier that is given counts
    torch.testing.assert_close(own, others + PARTS[1] / 2, rtol=1e-12, atol=0)


def test_the_report_and_the_measured_ntk_agree_on_it() -> None:
    model = chain()
    model[0].requires_grad_(False)
    shares = [row.share for row in kgraph.ntk_report(model, X).layers]
    sizes = [float(part.diagonal().mean()) for part in PARTS]
    assert shares == pytest.approx([0.0, sizes[1] / sum(sizes[1:]), sizes[2] / sum(sizes[1:])], rel=1e-9)
    counted = kgraph.ntk_report(model, X, count_frozen=True).layers
    assert counted[0].share == pytest.approx(sizes[0] / sum(sizes), rel=1e-9)
    for p in model.parameters():  # the set moments are those of shuffled signs, which let no gradient through
        nn.init.normal_(p.data, generator=torch.Generator().manual_seed(p.shape[1]))
    trained = list(model[1:].parameters())
    jacobian = [torch.autograd.grad(y, trained, retain_graph=True) for y in model(X[:1].to(model[0].weight.dtype))[0]]
    direct = sum(float(g.double().square().sum()) for row in jacobian for g in row) / 32
    assert float(kgraph.empirical_ntk(model, X[:1]).matrix) == pytest.approx(direct, rel=1e-5)
    assert float(kgraph.empirical_ntk(model, X[:1], count_frozen=True).matrix) > 1.05 * direct


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_compare_leaves_frozen_parameters_out_on_both_sides(parametrization: str) -> None:
    model = nn.Sequential(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 256))
    model[2].requires_grad_(False)
    found = kgraph.compare(model, X, draws=4, parametrization=parametrization)
    assert not found.disagreements()
    whole = kgraph.compare(model, X, draws=4, parametrization=parametrization, count_frozen=True)
    assert not whole.disagreements()
    assert float(whole.ntk[0, 0]) > 1.5 * float(found.ntk[0, 0])


def test_a_model_that_is_not_trained_has_no_ntk() -> None:
    model = chain().requires_grad_(False)
    calls: list[Callable[..., object]] = [kgraph.ntk, kgraph.ntk_report, kgraph.empirical_ntk]
    for call in calls:
        with pytest.raises(InputError, match=r"every parameter of the model is frozen.*count_frozen=True"):
            call(model, X)
    torch.testing.assert_close(kgraph.nngp(model, X), 8 * GRAM, rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="count_frozen is 'no'"):
        kgraph.ntk(model, X, count_frozen="no")  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Adds 0.5, made in one of many ways, to a layer's output."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(6, 8, bias=False), make

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.tanh(h + self.make(h))


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "new_ones": lambda h: h.new_ones(h.shape) / 2,
    "new_full": lambda h: h.new_full((len(h), 1), 0.5),
    "new_tensor": lambda h: h.new_zeros(8) + 0.5,
    "ones_like": lambda h: 0.5 * torch.ones_like(h),
    "full_like": lambda h: torch.full_like(h, 0.5),
    "empty, then filled": lambda h: torch.empty_like(h).fill_(0.5),
    "new_empty, then filled": lambda h: h.new_empty(len(h), 8).fill_(0.5),
    "a copy, filled": lambda h: h.clone().fill_(0.5),
    "zeroed": lambda h: h.clone().zero_() + 0.5,
}


@pytest.mark.parametrize("name", MADE)
def test_what_takes_a_shape_alone_is_constant(name: str) -> None:
    torch.manual_seed(0)
    model, plain = Fixed(MADE[name]), Fixed(lambda h: torch.full((8,), 0.5))
    plain.load_state_dict(model.state_dict())
    for found, expected in zip(
        (kgraph.kernels(model, X).nngp, kgraph.ntk(model, X)),
        (kgraph.kernels(plain, X).nngp, kgraph.ntk(plain, X)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    one, other = (kgraph.analyze(m, X.float()).nodes[-1] for m in (model, plain))
    assert (one.q, *one.c) == pytest.approx((other.q, *other.c), rel=1e-6)


class Recurrent(nn.Module):
    """Keeps a float32 state of its own, and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 16)
        self.start = torch.full((16,), 0.25)  # neither a parameter nor a buffer

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(len(x), 16, dtype=torch.float32) + self.start
        for _ in range(2):
            z = torch.tanh(self.outer(z.float()) + self.inner(x).to(torch.float32))
        return z


def test_float32_state_runs_in_float64() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    found = kgraph.empirical_ntk(model, X[:1]).matrix
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in model(X[:1].float())[0]]
    direct = sum(float(g.double().square().sum()) for row in rows for g in row) / 16
    assert float(found) == pytest.approx(direct, rel=1e-4)
    assert found.dtype == torch.float64 and model.start.dtype == torch.float32
    assert not kgraph.compare(Recurrent(), X, draws=2).left_out
    assert kgraph.montecarlo(model, X.float(), draws=2).nodes


def test_half_precision_state_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.bfloat16())

    with pytest.raises(KGraphError, match="BFloat16"):
        kgraph.empirical_ntk(Half(), X)
