"""Weights that sum to zero, states of recurrent layers, distances and angles: wrong numbers that were called right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph.rules.weights import sums_to_zero

WIDTH = 256
Standardize = Callable[[Tensor], Tensor]


def by_hand(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.ndim))
    return (w - w.mean(dims, keepdim=True)) / (w.std(dims, keepdim=True) + 1e-5) / w[0].numel() ** 0.5


def by_batch_norm(w: Tensor) -> Tensor:
    flat = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, eps=1e-6)
    return flat.reshape_as(w) * (1 / w[0].numel() ** 0.5)


def centred(w: Tensor) -> Tensor:
    return w - w.mean(tuple(range(1, w.ndim)), keepdim=True)


def plain(w: Tensor) -> Tensor:
    return w * 1.0


def gaussian(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.prod(shape[1:]) ** 0.5)


class Dense(nn.Module):
    """A layer, a relu, and a layer whose weight is ``change`` of a parameter."""

    def __init__(self, change: Standardize) -> None:
        super().__init__()
        self.a, self.b, self.change = gaussian(WIDTH, 32), gaussian(32, WIDTH), change

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.a)), self.change(self.b))


class Product(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", torch.relu(x @ self.a.T), self.change(self.b))


class Convolution(nn.Module):
    """The same with 3 x 3 taps, zero padding and a stride."""

    def __init__(self, change: Standardize) -> None:
        super().__init__()
        self.a, self.b, self.change = gaussian(WIDTH // 2, 16, 1, 1), gaussian(32, WIDTH // 2, 3, 3), change

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.conv2d(x, self.a))
        return F.conv2d(h, self.change(self.b), stride=2, padding=1)


class Transposed(Convolution):
    """The same back to more positions: every one meets one, two or four taps."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.conv2d(x, self.a))
        return F.conv_transpose2d(h, self.change(self.b).transpose(0, 1), stride=2, padding=1)


NETWORKS = {"linear": Dense, "einsum": Product, "convolution": Convolution, "transposed": Transposed}
SIGNS = 4


def inputs(name: str) -> Tensor:
    shape = (2, 32) if name in ("linear", "einsum") else (2, 16, 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def drawn_kernels(make: Callable[[], nn.Module], x: Tensor, draws: int = 40) -> list[tuple[Tensor, Tensor]]:
    """E[y y'] and the NTK, [2, 2], averaged over units and positions: means over networks and their standard errors.

    By autodiff: with random signs s, sum_i s_i dy_i has the trace of the NTK as its mean square.
    """
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        net = make().double()
        y = net(x.double()).flatten(1)
        total = torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(SIGNS):
            signs = torch.randn_like(y[0]).sign()
            grads = [torch.autograd.grad((row * signs).sum(), list(net.parameters()), retain_graph=True) for row in y]
            flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])
            total += flat @ flat.T / SIGNS
        found.append(((y @ y.T).detach() / y.shape[1], total / y.shape[1]))
    both = [torch.stack(kind) for kind in zip(*found, strict=True)]
    return [(k.mean(0), k.std(0) / draws**0.5) for k in both]


def agrees(found: Tensor, drawn: tuple[Tensor, Tensor]) -> bool:
    """Within four standard errors and the 4 / width that a weight's own mean and deviation cost."""
    found = found.flatten(2).mean(2) if found.ndim > 2 else found
    mean, error = drawn
    scale = mean.diagonal().sqrt()
    return bool(((found - mean).abs() <= 4 * error + 4 / WIDTH * scale[:, None] * scale).all())


@pytest.mark.parametrize("change", [by_hand, by_batch_norm, centred])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_weights_that_sum_to_zero(name: str, change: Standardize) -> None:
    """The layer does not see the mean of what it reads: K' = sw2 (K - m m'), at borders too."""
    x = inputs(name)
    torch.manual_seed(77)
    net = NETWORKS[name](change)
    found = kgraph.kernels(net, x)
    nngp, ntk = drawn_kernels(lambda: NETWORKS[name](change), x)
    assert agrees(found.nngp, nngp) and agrees(found.ntk, ntk)
    assert found.how == "exact" or name == "transposed"  # its weight is turned around on the way
    other = kgraph.kernels(NETWORKS[name](plain), x)  # what all entries as new ones would give, with the same variance
    ratio = float(sum_of_squares(net) / sum_of_squares(NETWORKS[name](plain)))
    assert not agrees(ratio * other.nngp, nngp)


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_stored_weights_that_sum_to_zero(name: str) -> None:
    """The gradient by a weight that is a parameter has the mean of what it reads: the NTK's own term keeps m m'."""
    x = inputs(name)

    def make() -> nn.Module:
        net = NETWORKS[name](lambda w: w)
        with torch.no_grad():
            net.b.copy_(centred(net.b))
        return net

    torch.manual_seed(77)
    found = kgraph.kernels(make(), x)
    nngp, ntk = drawn_kernels(make, x)
    assert found.how == "exact" and agrees(found.nngp, nngp) and agrees(found.ntk, ntk)
    computed = kgraph.kernels(NETWORKS[name](centred), x)
    assert agrees(computed.nngp, nngp) and not agrees(computed.ntk, ntk)


def probes(net: Callable[[], nn.Module], shape: tuple[int, ...], draws: int = 40) -> dict[str, tuple[float, float]]:
    """q, C(0), C(.5) and the slope over networks, with their standard errors; channels are dimension 1."""
    table = []
    generator = torch.Generator().manual_seed(5)
    for seed in range(draws):
        torch.manual_seed(seed)
        model, row = net().double().eval(), []
        for c in (0.0, 0.5, 1 - NEAR):
            a, b = (torch.randn(4, *shape, generator=generator, dtype=torch.float64).movedim(1, -1) for _ in range(2))
            a = F.normalize(a, dim=-1)
            b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
            pair = torch.cat([a, c * a + math.sqrt(1 - c * c) * b]) * a.shape[-1] ** 0.5
            with torch.no_grad():
                u, v = model(pair.movedim(-1, 1)).chunk(2)
            row += [(u.square() + v.square()).mean() / 2, (u * v).mean(), (u - v).square().mean() / 2 / NEAR]
        table.append(torch.stack(row))
    rows = torch.stack(table)
    without = torch.stack([_numbers(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(draws)])
    errors = ((without - without.mean(0)).square().sum(0) * (draws - 1) / draws).sqrt()  # jackknife
    return dict(
        zip(("q", "c0", "c.5", "slope"), zip(_numbers(rows).tolist(), errors.tolist(), strict=True), strict=True)
    )


NEAR = 1e-4


def _numbers(rows: Tensor) -> Tensor:
    m = rows.mean(0)
    return torch.stack([m[[0, 3, 6]].mean(), m[1] / m[0], m[4] / m[3], m[8] / m[6]])


def right(row: object, drawn: dict[str, tuple[float, float]], width: int = WIDTH) -> bool:
    found = {"q": row.q, "c0": row.c[0], "c.5": row.c[1], "slope": row.slope}  # type: ignore[attr-defined]
    scale = {"q": drawn["q"][0], "slope": drawn["slope"][0]}
    return all(abs(found[k] - m) <= 4 * e + 4 / width * scale.get(k, 1.0) for k, (m, e) in drawn.items())


@pytest.mark.parametrize("change", [by_hand, by_batch_norm, centred])
def test_analysis_of_weights_that_sum_to_zero(change: Standardize) -> None:
    """relu in front of a standardized layer: C(0) = 0 and slope pi / (pi - 1), not 1 / pi and 1."""
    torch.manual_seed(77)
    final = kgraph.analyze(Dense(change), torch.randn(2, 32)).final
    drawn = probes(lambda: Dense(change), (32,))
    assert final.how == "exact" and right(final, drawn)
    assert final.slope == pytest.approx(math.pi / (math.pi - 1)) and final.c[0] == pytest.approx(0, abs=1e-9)
    torch.manual_seed(77)
    assert not right(kgraph.analyze(Dense(plain), torch.randn(2, 32)).final, drawn)


class Wide(Convolution):
    """Without padding, and with two positions averaged: the numbers between positions count too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.relu(F.conv2d(x, self.a)), self.change(self.b), groups=1).mean((2, 3))


def test_analysis_of_convolutions_that_sum_to_zero() -> None:
    torch.manual_seed(77)
    final = kgraph.analyze(Wide(by_hand), torch.randn(2, 16, 4, 4)).final
    drawn = probes(lambda: Wide(by_hand), (16, 4, 4))
    assert right(final, drawn, WIDTH // 2)
    assert not right(kgraph.analyze(Wide(plain), torch.randn(2, 16, 4, 4)).final, drawn, WIDTH // 2)


def test_borders_of_convolutions_that_sum_to_zero() -> None:
    """At a border fewer taps are met: S^2 / k falls faster than their number."""
    torch.manual_seed(77)
    net = Convolution(by_hand)
    final = kgraph.analyze(net, torch.randn(2, 16, 4, 4)).final
    drawn = probes(lambda: Convolution(by_hand), (16, 4, 4))
    assert right(final, drawn, WIDTH // 2)


def test_analysis_of_stored_weights_that_sum_to_zero() -> None:
    """The NTK's own term keeps the mean: sw2 T + N K with K of relu, 1 / 2."""
    torch.manual_seed(77)
    net, same = Dense(lambda w: w), Dense(centred)
    with torch.no_grad():
        for model in (net, same):
            model.a.copy_(net.a)
            model.b.copy_(centred(net.b))
    stored, computed = (kgraph.analyze(model, torch.randn(2, 32)).final for model in (net, same))
    q = float(net.a.detach().square().mean()) * 32
    assert stored.q == pytest.approx(computed.q) and stored.slope == pytest.approx(computed.slope)
    assert stored.ntk - computed.ntk == pytest.approx(WIDTH * q / (2 * math.pi), rel=4 / WIDTH)


def test_what_sums_to_zero() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((64, 64), (8, 3, 7, 7), (1, 256), (512, 2)):
        w = torch.randn(shape, generator=generator)
        assert not sums_to_zero(w)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert sums_to_zero(centred(w.to(dtype).double()).to(dtype)), (shape, dtype)
        part = centred(w)
        part[0] = w[0]
        assert not sums_to_zero(part)
    for empty in (torch.zeros(4, 4), torch.ones(3, 1), torch.randn(9), torch.empty(4, 4, device="meta")):
        assert not sums_to_zero(empty)
    assert not sums_to_zero(torch.linalg.qr(torch.randn(32, 32, generator=generator))[0])


def sum_of_squares(net: nn.Module) -> Tensor:
    return net.change(net.b).detach().square().sum()  # type: ignore[operator, union-attr]


class Recurrent(nn.Module):
    """Two recurrent layers, and a part of what they give."""

    def __init__(self, cell: type[nn.Module], pick: Callable[[Tensor, Tensor], Tensor], **options: bool) -> None:
        super().__init__()
        self.cells = cell(16, 32, 2, **{"batch_first": True, **options})
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.cells(x if self.cells.batch_first else x.transpose(0, 1))
        return self.pick(y, h[0] if isinstance(h, tuple) else h)


class Cells(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.pick(*self.cells(x)[1])


PICKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, bool]]] = {
    "the last layer's state": (lambda y, h: h[-1], {}),
    "the first layer's state": (lambda y, h: h[0], {}),
    "the last time step": (lambda y, h: y[:, -1], {}),
    "the first time step": (lambda y, h: y.select(1, 0), {}),
    "time in front": (lambda y, h: y[-1], {"batch_first": False}),
    "backwards": (lambda y, h: h[-1], {"bidirectional": True}),
    "both directions": (lambda y, h: y[:, -1], {"bidirectional": True}),
    "one direction": (lambda y, h: y[:, -1, :32], {"bidirectional": True}),
    "unbound": (lambda y, h: h.unbind(0)[1], {}),
}


def of_itself(model: nn.Module, shape: tuple[int, ...], count: int = 1500) -> dict[str, tuple[float, float]]:
    """q, C(0) and C(.5) of one network over white inputs [count, ...], with standard errors over inputs."""
    generator = torch.Generator().manual_seed(9)
    found = {}
    for name, c in (("c0", 0.0), ("c.5", 0.5)):
        a, b = (torch.randn(*shape, generator=generator) for _ in range(2))
        with torch.no_grad():
            u, v = model(a), model(c * a + math.sqrt(1 - c * c) * b)
        per_input = torch.stack([(u * v).flatten(1).mean(1), u.square().flatten(1).mean(1)]).double()
        means, errors = per_input.mean(1), per_input.std(1) / count**0.5
        found[name] = (float(means[0] / means[1]), float(errors[0] / means[1]))
        found["q"] = (float(means[1]), float(errors[1]))
    return found


def measures(row: object, drawn: dict[str, tuple[float, float]]) -> bool:
    """Within four standard errors of the networks' and two of the printed ones."""
    printed = 2 * float(row.note.removeprefix("+-"))  # type: ignore[attr-defined]
    found = {"q": row.q, "c0": row.c[0], "c.5": row.c[1]}  # type: ignore[attr-defined]
    scale = {"q": drawn["q"][0]}
    return all(abs(found[k] - m) <= 4 * e + 2 * printed * scale.get(k, 1.0) for k, (m, e) in drawn.items())


@pytest.mark.parametrize(
    ("name", "cell"),
    [*((name, nn.RNN) for name in PICKS), ("the last layer's state", nn.LSTM), ("the last time step", nn.GRU)],
)
def test_states_and_steps_of_recurrent_layers(name: str, cell: type[nn.Module]) -> None:
    pick, options = PICKS[name]
    torch.manual_seed(1)
    model = Recurrent(cell, pick, **options)
    row = kgraph.analyze(model, torch.randn(2, 5, 16)).final
    assert row.how == "sampled" and measures(row, of_itself(model, (1500, 5, 16)))


def test_an_average_over_layers_is_no_layer() -> None:
    """What indexing gave: the mean square of both layers' states, several times the last one's."""
    torch.manual_seed(1)
    model = Recurrent(nn.GRU, lambda y, h: h)
    row = kgraph.analyze(model, torch.randn(2, 5, 16)).final
    model.pick = lambda y, h: h[-1]
    assert not measures(row, of_itself(model, (1500, 5, 16)))
    model.pick = lambda y, h: h.transpose(0, 1)
    assert measures(row, of_itself(model, (1500, 5, 16)))


def test_cell_states_are_told_apart() -> None:
    torch.manual_seed(1)
    model = Cells(nn.LSTM, lambda h, c: c[-1])
    row = kgraph.analyze(model, torch.randn(2, 5, 16)).final
    assert measures(row, of_itself(model, (1500, 5, 16)))


def test_long_sequences_and_cuts_across_time_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many steps the first and the last are told apart; several of one cut are counted like all."""
    monkeypatch.setattr("kgraph.rules.recurrent._MOST_STEPS", 4)
    torch.manual_seed(1)
    x = torch.randn(2, 7, 16)
    last = Recurrent(nn.RNN, lambda y, h: y[:, -1])
    row = kgraph.analyze(last, x).final
    assert row.how == "sampled" and measures(row, of_itself(last, (1500, 7, 16)))
    assert kgraph.analyze(Recurrent(nn.RNN, lambda y, h: y[:, 3]), x).final.how == "assumed"
    assert kgraph.analyze(Recurrent(nn.RNN, lambda y, h: y[:, :2]), x).final.how == "assumed"


class Radial(nn.Module):
    """Radial basis functions: exp(-|x - c|^2 / s) of distances to points."""

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        self.points, self.head, self.p = nn.Parameter(torch.randn(WIDTH, 64)), gaussian(32, WIDTH), p

    def forward(self, x: Tensor) -> Tensor:
        far = torch.cdist(x, self.points, p=self.p)
        return F.linear(torch.exp(-far.square() / 32) if self.p == 2 else far, self.head)


def test_distances_to_points() -> None:
    """q up to what the points' norms share with the products, E[chi^2] of 64: 2 / 64 of the variances, squared."""
    torch.manual_seed(0)
    row = kgraph.analyze(Radial(), torch.randn(2, 64)).final
    drawn = probes(Radial, (64,))
    assert row.how == "assumed" and row.note.startswith("distances") and right(row, drawn, 64)
    assert not right(replace(row, c=(1.0, 1.0, 1.0)), drawn, 64)


def test_a_slope_that_is_not_known_has_a_reason() -> None:
    torch.manual_seed(0)
    rows = kgraph.analyze(Radial(p=3.0), torch.randn(2, 64)).nodes
    row = next(row for row in rows if row.name.startswith("cdist"))
    assert math.isnan(row.slope) and ("no slope" in row.note)


def test_a_mean_that_hides_the_variance_is_said() -> None:
    """Norms of 4096 numbers: what the draws leave of the mean is more than the norms differ by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Angle(lambda a: torch.cdist(a, torch.zeros(8, 64) + 0.1, p=3.0)))
    row = kgraph.analyze(model, torch.randn(2, 64)).final
    assert row.how == "assumed" and "variance" in row.note


class Angle(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(64, 64), nn.Linear(64, 64), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.a(x), self.b(x)) if self.run.__code__.co_argcount == 2 else self.run(x)


@pytest.mark.parametrize(
    ("run", "jumps"),
    [
        (lambda a, b: torch.atan2(a, b), True),
        (lambda a, b: torch.atan2(a, b).tanh() + a, True),
        (lambda a, b: torch.atan2(a, 1 + b.square()), False),
        (lambda a, b: torch.atan2(a, b).sin(), False),
    ],
)
def test_angles_jump_where_they_are_cut(run: Callable[..., Tensor], jumps: bool) -> None:
    """Nearer inputs part by the root of what continuous functions do, in the network itself."""
    torch.manual_seed(0)
    net = Angle(run)
    row = kgraph.analyze(net, torch.randn(4, 64)).final
    torch.manual_seed(1)
    x, direction = torch.randn(2, 4000, 64, dtype=torch.float64)
    with torch.no_grad():
        net.double()
        large, small = ((net(x + d * direction) - net(x)).square().mean() for d in (1e-2, 1e-4))
    assert (float(large / small) < 1e3) == jumps
    assert math.isinf(row.slope) == jumps
