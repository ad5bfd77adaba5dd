"""PReLU on real inputs: its kernel, and the part of its slopes in the NTK, against networks of finite width."""

from __future__ import annotations

import pytest
import torch
from gaussian_weights import with_gaussian_weights
from gram_montecarlo import SIGMAS, Case, Net, check_nngp, dense, vectors
from torch import Tensor, nn

import kgraph
from kgraph.errors import RuleError

WIDTH, DRAWS = 256, 24
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(slopes: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.PReLU(slopes), nn.Linear(width, width), nn.PReLU(slopes), last(width))


def without_biases(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return with_gaussian_weights(model)


def last(width: int) -> nn.Linear:
    return nn.Linear(width, 16)


def test_kernel() -> None:
    def net(slope: float) -> Net:
        return Net(lambda m, x: m.w(m.act(m.a(x))), a=dense(8), w=dense(), act=nn.PReLU(init=slope))

    check_nngp(Case(lambda: net(0.25), lambda: net(0.0), vectors))


@pytest.mark.parametrize("layer", ["1.weight", "3.weight"])
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_part_of_the_slopes(layer: str, parametrization: str) -> None:
    """Within four standard errors of measured networks, and 5 / width a layer; half of it is not."""
    torch.manual_seed(0)
    model = network(WIDTH)
    alone = {name: float(name == layer) for name, _ in model.named_parameters()}
    found = kgraph.ntk(model, X, multipliers=alone, parametrization=parametrization)
    samples = torch.stack([kgraph.empirical_ntk(network(WIDTH), X, multipliers=alone).matrix for _ in range(DRAWS)])
    if parametrization == "ntk":
        samples = samples * 0.25**2  # of a unit parameter times its size
    allowed = SIGMAS * samples.std(0) / DRAWS**0.5 + 3 * 2.5 / WIDTH * found.diagonal().max()
    assert bool(((samples.mean(0) - found).abs() <= allowed).all())
    assert bool(((samples.mean(0) - found / 2).abs() > allowed).any())


def test_one_slope_for_all_channels_is_assumed_to_be_independent() -> None:
    one, many = (without_biases(network(slopes)) for slopes in (1, WIDTH))
    assert (kgraph.kernels(one, X).how, kgraph.kernels(many, X).how) == ("assumed", "exact")
    assert kgraph.kernels(one, X, with_ntk=False).how == "exact"


def test_slopes_that_differ() -> None:
    """Measured on draws of the channels; their part of the NTK is not known."""
    model = network(WIDTH)
    with torch.no_grad():
        model[1].weight.uniform_(0, 1)
    assert kgraph.kernels(model, X, with_ntk=False).how != "exact"
    with pytest.raises(RuleError, match=r"1\.weight in the NTK"):
        kgraph.ntk(model, X)


def test_multipliers_reach_the_slopes() -> None:
    """Without their parts the NTK is smaller."""
    model = network(1)
    nothing: dict[str, float | Tensor] = {"1.weight": 0.0, "3.weight": 0.0}
    assert bool((kgraph.ntk(model, X) > kgraph.ntk(model, X, multipliers=nothing)).all())


def test_slopes_of_channel_groups_that_are_drawn() -> None:
    """Two groups of channels that read two halves of an input: their slopes are other numbers, and meet in a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(32, 32, 1, groups=2, bias=False), nn.PReLU(32), nn.GroupNorm(4, 32), nn.Tanh(), nn.Flatten(), last(96)
    )
    x = torch.randn(2, 32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 16:] *= 2
    found, without = kgraph.ntk(model, x), kgraph.ntk(model, x, multipliers={"1.weight": 0.0})
    assert bool((found.diagonal() > without.diagonal()).all())
    assert bool((found - without < 0.5 * found).all())
