"""Position models that average: exact for fields that are as they assume, and near the truth for others."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import Net
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

import kgraph
from kgraph.errors import InputError

SIZE = 6


def shifted(size: int = SIZE) -> Tensor:
    """Two images whose channels are all circular shifts of one: their kernels depend on displacements alone."""
    images = torch.randn(2, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rolls = [images.roll((a, b), (1, 2)) for a in range(size) for b in range(size)]
    return torch.stack(rolls, 1)


def symmetric(size: int = 4) -> Tensor:
    """Two inputs of one channel a position and one for all: equal positions are alike, and so are different ones."""
    count = size * size
    own = torch.eye(count, dtype=torch.float64).reshape(count, size, size)
    one = torch.cat([own * 3.0, torch.full((1, size, size), 0.5, dtype=torch.float64)])
    other = torch.cat([own * 2.0, torch.full((1, size, size), -0.8, dtype=torch.float64)])
    return torch.stack([one, other])


def conv(inputs: int, outputs: int = 16, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, padding_mode="circular", **options)  # type: ignore[arg-type]


def circular_net() -> Net:
    """Convolutions, a residual sum, strided average pooling, global pooling."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = relu(m.a(x))
        x = x + relu(m.b(x))
        x = relu(m.c(avg_pool2d(x, 2)))
        x = torch.erf(m.d(x))
        return m.head(x.mean((2, 3)))

    layers = {"a": conv(SIZE * SIZE), "b": conv(16), "c": conv(16), "d": conv(16)}
    return Net(forward, **layers, head=nn.Linear(16, 4))


def pointwise_net() -> Net:
    """Layers that keep different positions alike: 1 x 1 convolutions, pooling."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = relu(m.a(x))
        x = avg_pool2d(relu(m.b(x)) + 0.5 * x, 2)
        return m.head(torch.tanh(m.c(x)).mean((2, 3)))

    return Net(forward, a=conv(17, size=1), b=conv(16, size=1), c=conv(16, size=1), head=nn.Linear(16, 4))


CASES = [("stationary", circular_net, shifted), ("exchangeable", pointwise_net, symmetric)]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_exact_where_the_assumption_holds(case: tuple) -> None:
    positions, build, inputs = case
    torch.manual_seed(0)
    model, x = build().double().eval(), inputs()
    full = kgraph.kernels(model, x, positions="full", nodes="all")
    found = kgraph.kernels(model, x, positions=positions, nodes="all")
    assert found.positions == positions
    torch.testing.assert_close(found.nngp, full.nngp, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.ntk, full.ntk, rtol=1e-10, atol=1e-12)
    for name, gram in full.nodes.items():
        if not gram.places:
            continue
        mine = found.nodes[name].nngp
        truth = gram.nngp.flatten(2 + len(gram.places)).flatten(2, -2)  # every pair of positions, averaged
        same = truth.diagonal(dim1=2, dim2=3).mean(2)
        first = mine[..., 0] if positions == "exchangeable" else mine[(..., *(size - 1 for size in gram.places))]
        torch.testing.assert_close(first, same, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        count = truth.shape[2]
        if positions == "exchangeable":
            every = (mine[..., 0] + (count - 1) * mine[..., 1]) / count
        else:
            counts = torch.ones(())
            for size in gram.places:
                counts = counts[..., None] * (size - torch.arange(1 - size, size).abs())
            every = (mine * counts).flatten(2).sum(2) / count**2
        torch.testing.assert_close(every, truth.mean((2, 3)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_not_exact_where_it_does_not(case: tuple) -> None:
    """Negative control: one image's pixels differ from each other; the average over them is near, not equal."""
    positions, build, _ = case
    torch.manual_seed(0)
    model = build().double().eval()
    channels = model.a.in_channels
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    full, found = (kgraph.nngp(model, x, positions=name) for name in ("full", positions))
    difference = ((found - full).abs() / full.diagonal().mean()).max()
    assert 1e-9 < difference < 0.05


def test_different_second_inputs_and_one_sided_moves() -> None:
    """A shifted copy is added: the two sides of a pair move differently."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = relu(m.a(x))
        return m.head((x + x.roll(1, 2)).square().mean((2, 3)))

    torch.manual_seed(0)
    model = Net(forward, a=conv(SIZE * SIZE), head=nn.Linear(16, 4)).double()
    x = shifted()
    for first, second in ((x, None), (x, x[:1])):
        full = kgraph.nngp(model, first, second, positions="full")
        assert torch.isfinite(full).all()
        found = kgraph.nngp(model, first, second, positions="stationary")
        error = (found - full).abs().max() / full.abs().max()
        assert error < 0.05  # the square of a sum of Gaussians and their relus is drawn


def test_large_images_take_little_memory() -> None:
    """Every pair of 112 x 112 positions would take 1.2 GiB a tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"memory_gib.*positions=.stationary."):
        kgraph.nngp(model, x, memory_gib=0.5)
    stationary = kgraph.kernels(model, x, positions="stationary", memory_gib=0.5)
    exchangeable = kgraph.kernels(model, x, positions="exchangeable", memory_gib=0.5)
    torch.testing.assert_close(stationary.nngp, exchangeable.nngp, rtol=0.05, atol=1e-4)
    assert stationary.how == exchangeable.how == "assumed"  # zero padding: borders are not like the rest


def test_without_positions_nothing_is_assumed() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    for positions in ("stationary", "exchangeable"):
        assert kgraph.kernels(model, x, positions=positions).how == "exact"


def test_what_they_cannot_hold_is_refused() -> None:
    model = Net(lambda m, x: torch.cat([x[:, :, :2], relu(m.a(x))], 2), a=conv(3, 3)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for positions in ("stationary", "exchangeable"):
        with pytest.raises(InputError, match=f'positions="{positions}" does not determine'):
            kgraph.nngp(model, x, positions=positions)
