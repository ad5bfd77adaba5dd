"""Laws of residual streams and of maxima, against closed forms, scipy and plain draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import kgraph
from kgraph.maps import Pointwise, relu, stream
from kgraph.maps.maximum import bivariate_cdf, maximum
from kgraph.maps.stream import Law

COSINES = torch.tensor([0.0, 0.5, 0.9, 1.0, -0.6], dtype=torch.float64)
DEGREE = 24
DRAWS = 200_000
ERRORS = 4.5
"""Standard errors allowed: 45 independent-ish numbers a test, one in 1e5 beyond."""


def _ones(value: float = 1.0) -> dict[str, Tensor]:
    return {"slope": torch.full((len(COSINES),), value, dtype=torch.float64)}


def _noise(variance: float, mean: float = 0.0) -> Law:
    return stream.gaussian(mean, variance, variance * COSINES, _ones(variance), DEGREE)


class Drawn:
    """Two copies of a stream by plain draws, with the tangent ``sum (dy_1/dz)(dy_2/dz)`` draw by draw."""

    def __init__(self, rho: float, seed: int = 0) -> None:
        self.rho, self.generator = rho, torch.Generator().manual_seed(seed)

    def noise(self, variance: float, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.randn(2, DRAWS, generator=self.generator, dtype=torch.float64)
        other = self.rho * z[0] + math.sqrt(1 - self.rho**2) * z[1]
        return mean + variance**0.5 * z[0], mean + variance**0.5 * other, torch.full((DRAWS,), variance).double()

    @staticmethod
    def apply(fn: Callable[[Tensor], Tensor], copies: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values, slopes = [], []
        for y in copies[:2]:
            leaf = y.clone().requires_grad_()
            out = fn(leaf)
            slopes.append(torch.autograd.grad(out.sum(), leaf)[0])
            values.append(out.detach())
        return values[0], values[1], slopes[0] * slopes[1] * copies[2]


def _z(drawn: Tensor, value: float) -> float:
    return abs(float(drawn.mean()) - value) / (float(drawn.std()) / len(drawn) ** 0.5 + 1e-9)


FUNCTIONS = {
    "relu": torch.relu,
    "tanh": lambda u: 1.3 * torch.tanh(u),
    "gelu": nn.functional.gelu,
    "leaky": lambda u: nn.functional.leaky_relu(u, 0.3) - 0.1,
}


@pytest.mark.parametrize(("gain", "noise"), [(1.0, 0.5), (-0.9, 0.02), (0.5, 1.0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_stream_of_four_sums_is_that_of_draws(name: str, gain: float, noise: float) -> None:
    fn = FUNCTIONS[name]
    law = _noise(1.0)
    for _ in range(4):
        law = stream.added(stream.scaled(stream.mapped(law, Pointwise(fn)), gain), _noise(noise, 0.1), DEGREE)
        assert law is not None
    law = stream.mapped(law, Pointwise(fn))
    for row, rho in enumerate(COSINES.tolist()):
        draws = Drawn(rho)
        copies = draws.noise(1.0)
        for _ in range(4):
            one, two, tangent = draws.apply(fn, copies)
            more = draws.noise(noise, 0.1)
            copies = gain * one + more[0], gain * two + more[1], gain**2 * tangent + more[2]
        one, two, tangent = draws.apply(fn, copies)
        found = (_z(one * two, float(law.cov[row])), _z(tangent, float(law.tangent("slope")[row])), _z(one, law.mean))
        assert max(found) < ERRORS, (rho, found)


def test_a_gaussian_of_the_same_moments_is_told_from_the_stream() -> None:
    """The negative control: what the law knows beyond second moments is seen by these draws."""
    first = stream.added(stream.mapped(_noise(1.0), relu()), _noise(0.02), DEGREE)
    assert first is not None
    centred = first.cov - first.mean**2
    wrong = stream.mapped(stream.gaussian(first.mean, float(centred[3]), centred, _ones(), DEGREE), relu())
    draws = Drawn(0.5)
    one = draws.apply(torch.relu, draws.noise(1.0))[0]
    more = draws.noise(0.02)
    square = torch.relu(one + more[0]).square()
    assert _z(square, float(stream.mapped(first, relu()).cov[3])) < ERRORS
    assert _z(square, float(wrong.cov[3])) > 2 * ERRORS


def test_two_activations_meet_in_one_sum() -> None:
    one, two = stream.mapped(_noise(1.0), relu()), stream.mapped(_noise(2.0, 0.3), Pointwise(torch.tanh))
    law = stream.added(one, _noise(0.3), DEGREE)
    assert law is not None
    law = stream.added(stream.scaled(two, -1.5), law, DEGREE)
    assert law is not None
    law = stream.mapped(law, relu())
    for row, rho in enumerate(COSINES.tolist()):
        draws = Drawn(rho)
        a, b = draws.apply(torch.relu, draws.noise(1.0)), draws.apply(torch.tanh, draws.noise(2.0, 0.3))
        c = draws.noise(0.3)
        copies = a[0] - 1.5 * b[0] + c[0], a[1] - 1.5 * b[1] + c[1], a[2] + 2.25 * b[2] + c[2]
        u, v, tangent = draws.apply(torch.relu, copies)
        assert _z(u * v, float(law.cov[row])) < ERRORS
        assert _z(tangent, float(law.tangent("slope")[row])) < ERRORS


def test_a_function_of_a_gaussian_is_its_closed_form() -> None:
    """Arc-cosine kernels; equal inputs exactly, others to what the tail's model leaves (a kink's, of degree 24)."""
    law, q = stream.mapped(_noise(1.7), relu()), torch.tensor(1.7, dtype=torch.float64)
    value, slope = relu().dual(q, q, 1.7 * COSINES)
    assert float((law.cov - value).abs().max()) < 2e-5
    assert float((law.tangent("slope") - 1.7 * slope).abs().max()) < 2e-3
    assert float((law.cov - value)[3].abs()) < 1e-14
    assert float((law.tangent("slope") - 1.7 * slope)[3].abs()) < 1e-14


def test_fifty_sums_keep_equal_inputs_exact() -> None:
    """q grows by the variance of what is added while relu, forty deviations up, is the identity."""
    law: Law | None = _noise(1.0, mean=40.0)
    for _ in range(50):
        law = law and stream.added(stream.mapped(law, relu()), _noise(0.02), DEGREE)
    assert law is not None
    assert float(law.cov[3]) == pytest.approx(1600 + 2.0, rel=1e-12)
    assert float(law.cov[1]) == pytest.approx(1600 + 1.0, rel=1e-9)
    assert float(law.tangent("slope")[3]) == pytest.approx(2.0, rel=1e-9)


def test_too_many_activations_in_one_sum_are_left_to_draws() -> None:
    law: Law | None = _noise(1.0)
    for _ in range(4):
        law = law and stream.added(stream.mapped(_noise(1.0), Pointwise(torch.tanh)), law, DEGREE)
    assert law is None


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.3, 0.999])
def test_bivariate_cdf_is_that_of_scipy(rho: float) -> None:
    points = torch.tensor([[-2.0, 0.5], [0.7, 0.71], [1.5, -0.3], [-0.2, -0.2]], dtype=torch.float64)
    right = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf(points.numpy())
    assert torch.allclose(
        bivariate_cdf(*points.T, rho), torch.as_tensor(right).double(), atol=2e-5
    )  # scipy's own error


@pytest.mark.parametrize("common", [0.0, 0.4])
def test_maximum_over_windows_is_that_of_draws(common: float) -> None:
    shares, mean = ((4, 0.75), (2, 0.25)), 0.2
    cov = torch.stack([COSINES[:4], common * COSINES[:4]], 1)
    tangents = {"slope": torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(4, 2)}
    law = maximum(mean, 1.0, cov, tangents, shares, 0.0, DEGREE)
    assert law is not None
    law = stream.mapped(law, relu())
    for row, rho in enumerate(COSINES[:4].tolist()):
        draws = Drawn(rho)
        front = draws.noise(common) if common else (torch.zeros(DRAWS),) * 2
        places = [draws.noise(1 - common) for _ in range(8)]
        held = torch.where(torch.arange(DRAWS) % 4 == 0, 2, 4)  # a quarter of all windows is small
        outside = torch.arange(4) >= held[:, None]

        def top(which: int, first: int, front: tuple[Tensor, ...] = front, places: list = places) -> tuple:
            window = torch.stack([p[which] for p in places[first : first + 4]], 1) + front[which][:, None] + mean
            return window.masked_fill(outside, -math.inf).max(1)  # noqa: B023

        (one, at_one), (two, at_two), (three, _) = top(0, 0), top(1, 0), top(1, 4)[:2]
        same, apart = torch.relu(one) * torch.relu(two), torch.relu(one) * torch.relu(three)
        slope = torch.where(at_one == at_two, 0.7, 0.3) * ((one > 0) & (two > 0))
        expected = law.cov[2 * row], law.cov[2 * row + 1], law.tangent("slope")[2 * row]
        assert _z(same, float(expected[0])) < ERRORS
        assert _z(slope.double(), float(expected[2])) < ERRORS
        if len(shares) == 1 or common == 0.0:  # the other window is drawn with the same size here
            continue
        assert float(expected[1]) < float(expected[0]) + 1e-12
        assert abs(float(apart.mean()) / float(expected[1]) - 1) < 0.05


class Residual(nn.Module):
    """Post-activation blocks, as in He et al. 2016."""

    def __init__(self, width: int, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


def test_analyze_needs_no_draws_for_a_residual_network() -> None:
    """q and c of the emitted numbers against drawn networks of width 512."""
    torch.manual_seed(0)
    report = kgraph.analyze(Residual(512), torch.randn(2, 64))
    assert {node.how for node in report.nodes} <= {"exact", "quadrature"}
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(64, generator=generator)
    b = torch.randn(64, generator=generator)
    a = a / a.square().mean().sqrt()
    b = b - (a @ b) / (a @ a) * a
    b = 0.5 * a + 0.75**0.5 * b / b.square().mean().sqrt()
    qs, cs = [], []
    with torch.no_grad():
        for _ in range(40):
            one, two = Residual(512)(torch.stack([a, b]))
            qs.append(float(one.square().mean()))
            cs.append(float(one @ two / (one.norm() * two.norm())))
    q, c = torch.tensor(qs), torch.tensor(cs)
    assert abs(float(q.mean()) / report.final.q - 1) < 4 * float(q.std()) / 40**0.5 / report.final.q + 11 / 512
    assert abs(float(c.mean()) - report.final.c[1]) < 4 * float(c.std()) / 40**0.5 + 3 / 512


def test_the_law_behind_an_activation_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sum and a layer read is one law, at two degrees."""
    calls, mapped = 0, stream.mapped

    def counted(*args: Any) -> Law:
        nonlocal calls
        calls += 1
        return mapped(*args)

    monkeypatch.setattr(stream, "mapped", counted)
    blocks = 3

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(x + layer(x))
            return x

    kgraph.analyze(Stream(), torch.randn(2, 64))
    assert 0 < calls <= 2 * blocks


class Several(nn.Module):
    """A sum of Gaussian terms two of which are one: x + W x + x / 2, or a norm that x is added to again."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.layer, self.normed = nn.Linear(512, 512, bias=False), normed
        nn.init.normal_(self.layer.weight, std=512**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (512,)) + x if self.normed else x + self.layer(x) + 0.5 * x


@pytest.mark.parametrize(("normed", "q"), [(False, 1.5**2 + 1), (True, 4.0)])
def test_terms_that_are_one_add_up_coherently(normed: bool, q: float) -> None:
    """Gaussian terms of a sum are not independent because each of them is Gaussian."""
    model, x = Several(normed), torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    found = kgraph.analyze(model, x).final.q / kgraph.analyze(nn.Identity(), x).final.q
    drawn = float(model(x).detach().square().mean() / x.square().mean())
    assert kgraph.analyze(model, x).final.how == "exact"
    assert found == pytest.approx(q, rel=4 * (2 / 512**2) ** 0.5)  # the mean square of the weights as drawn
    assert found == pytest.approx(drawn, rel=5 / 512**0.5)


class Frozen(nn.Module):
    """A leaky relu by hand behind a frozen layer and a trained shift: of its NTK, only the shift's part is there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(width, width).requires_grad_(False), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        v = self.layer(x) + self.shift
        return torch.where(v > 0, v, 0.1 * v)


class Normed(nn.Module):
    """A norm's gain and bias, in what is added to the norm's own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + x


class Twice(Frozen):
    """A shift that is met on both sides of a sum: (1 + 1/2)^2 of it."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.relu(self.layer(x)) + self.shift
        return v + 0.5 * v


@pytest.mark.parametrize(("build", "ntk"), [(Frozen, 0.505), (Normed, 2.0), (Twice, 2.25)])
def test_parameters_in_front_of_sums_stay_in_the_ntk(build: Callable[[int], nn.Module], ntk: float) -> None:
    """The squared gradient of one entry, by autograd, over many entries."""
    torch.manual_seed(0)
    model, x = build(512), torch.randn(2, 512)
    x[0] = x[0] / x[0].square().mean().sqrt()
    found = kgraph.analyze(model, x).final.ntk
    y = model(x[:1])[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(entry, trained, retain_graph=True) for entry in y[:256]]
    squares = [sum(g.square().sum() for g in of_entry) for of_entry in gradients]
    measured = torch.stack(squares)
    assert found == pytest.approx(ntk, rel=0.15)
    assert abs(float(measured.mean()) - found) <= 4 * float(measured.std()) / 16 + 1e-6


def test_the_tangent_of_a_gain_survives_a_cut() -> None:
    """A norm, tanh, half of the channels, tanh: as much NTK as without the cut."""

    class Cut(nn.Module):
        def __init__(self, cuts: bool) -> None:
            super().__init__()
            self.norm, self.cuts = nn.LayerNorm(64), cuts

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(2 * self.norm(x))
            return torch.tanh(x.chunk(2, 1)[0] if self.cuts else x)

    whole, half = (kgraph.analyze(Cut(cuts), torch.randn(2, 64)).final for cuts in (False, True))
    assert half.ntk == pytest.approx(whole.ntk, rel=1e-9)


def test_a_slope_that_what_it_stands_on_multiplies_is_not_called_exact() -> None:
    """x PReLU(x): the slope's tangent is x times the negative part, 1.5 for the .5 of independent factors."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.act(x)

    report = kgraph.analyze(Gate(), torch.randn(2, 64))
    assert report["prelu"].how == "exact" and report["prelu"].ntk == pytest.approx(0.5)
    assert report.final.how == "assumed" and "tangent" in report.final.note


def test_gains_that_a_batch_norm_undoes_are_not_called_exact() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(64, 64), nn.Parameter(torch.full((64,), 0.3))
            self.norm = nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.gain * self.layer(x))

    assert kgraph.analyze(Gained(), torch.randn(8, 64)).final.how == "assumed"
    assert kgraph.analyze(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), torch.randn(8, 64)).final.how == "exact"


def test_a_function_of_a_function_is_cut_at_its_own_kink() -> None:
    """leaky_relu(cos(z) - 1/2) in one step and in two: the kink lies between the nodes of the cosine's law."""

    def bent(y: Tensor) -> Tensor:
        return nn.functional.leaky_relu(y - 0.5, 0.3)

    whole = stream.mapped(_noise(1.0), Pointwise(lambda z: bent(torch.cos(z))))
    steps = stream.mapped(stream.mapped(_noise(1.0), Pointwise(torch.cos)), Pointwise(bent))
    assert steps.mean == pytest.approx(whole.mean, rel=1e-9)
    assert torch.allclose(steps.cov, whole.cov, rtol=2e-3)
    assert torch.allclose(steps.tangent("slope"), whole.tangent("slope"), rtol=2e-3, atol=1e-9)
    z = torch.randn(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bent(torch.cos(z)).sum(), z)
    assert _z(gradient.square(), float(steps.tangent("slope")[3])) < ERRORS
