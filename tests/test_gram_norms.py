"""Normalization layers against brute force."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import CHANNELS, WIDTH, Case, Net, check_nngp, conv, dense, images, vectors
from torch import Tensor, nn
from torch.nn.functional import relu

import kgraph

GENERATOR_SEED = 7


def varied(norm: nn.Module) -> nn.Module:
    """A norm whose gains and shifts differ from channel to channel."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(0.5 + 0.8 * torch.randn(parameter.shape, generator=generator))
    return norm


class Plain(nn.Module):
    """A norm over the channels of vectors, without its centre or its gains: what a wrong rule would do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


def mlp(norm: nn.Module) -> Net:
    return Net(lambda m, x: m.b(m.norm(relu(m.a(x)))), a=dense(8), norm=norm, b=dense())


def rms(gain: bool) -> nn.Module:
    return varied(nn.RMSNorm(WIDTH)) if gain else nn.RMSNorm(WIDTH)


VECTOR_NORMS = {
    "LayerNorm after relu": (
        lambda: mlp(nn.LayerNorm(WIDTH, elementwise_affine=False)),
        lambda: mlp(nn.RMSNorm(WIDTH, elementwise_affine=False)),
    ),
    "LayerNorm with gain and bias": (lambda: mlp(varied(nn.LayerNorm(WIDTH))), lambda: mlp(nn.LayerNorm(WIDTH))),
    "RMSNorm after relu": (
        lambda: mlp(nn.RMSNorm(WIDTH, elementwise_affine=False)),
        lambda: mlp(nn.LayerNorm(WIDTH, elementwise_affine=False)),
    ),
    "RMSNorm with gain": (lambda: mlp(rms(True)), lambda: mlp(rms(False))),
}


@pytest.mark.parametrize("name", VECTOR_NORMS)
def test_over_channels(name: str) -> None:
    right, wrong = VECTOR_NORMS[name]
    check_nngp(Case(right, wrong, vectors))


def running(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """A norm with stored statistics away from (0, 1)."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    norm.running_mean = 0.5 + 0.3 * torch.randn(norm.num_features, generator=generator)
    norm.running_var = 0.5 + torch.rand(norm.num_features, generator=generator)
    return norm


def image_net(norm: nn.Module) -> Net:
    """The average over half an image: over the whole, what is centred image by image is 0."""
    return Net(lambda m, x: m.b(m.norm(relu(m.a(x)))[..., :2].mean((2, 3))), a=conv(3), norm=norm, b=dense(CHANNELS))


IMAGE_NORMS = {
    "BatchNorm train": (
        lambda: varied(nn.BatchNorm2d(CHANNELS)),
        lambda: varied(nn.GroupNorm(1, CHANNELS)),
        True,
    ),
    "BatchNorm eval": (
        lambda: varied(running(nn.BatchNorm2d(CHANNELS))),
        lambda: varied(nn.BatchNorm2d(CHANNELS)),
        False,
    ),
    "GroupNorm of one group": (
        lambda: nn.GroupNorm(1, CHANNELS),
        lambda: nn.GroupNorm(CHANNELS, CHANNELS),
        False,
    ),
    "GroupNorm of several channels a group": (
        lambda: varied(nn.GroupNorm(2, CHANNELS)),
        lambda: nn.GroupNorm(2, CHANNELS),
        False,
    ),
    "GroupNorm of four channels a group": (
        lambda: nn.GroupNorm(CHANNELS // 4, CHANNELS),
        lambda: nn.GroupNorm(CHANNELS, CHANNELS),
        False,
    ),
    "GroupNorm of one channel a group": (
        lambda: nn.GroupNorm(CHANNELS, CHANNELS),
        lambda: nn.GroupNorm(1, CHANNELS),
        False,
    ),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(CHANNELS), lambda: nn.GroupNorm(1, CHANNELS), False),
}


@pytest.mark.parametrize("name", IMAGE_NORMS)
def test_of_images(name: str) -> None:
    right, wrong, train = IMAGE_NORMS[name]
    check_nngp(
        Case(lambda: image_net(right()), lambda: image_net(wrong()), images, 2, CHANNELS, 100, train)  # type: ignore[no-untyped-call]
    )


def vector_batch(norm: nn.Module) -> Net:
    return Net(lambda m, x: m.b(relu(m.norm(m.a(x)))), a=dense(8), norm=norm, b=dense())


def test_batch_norm_of_three_vectors() -> None:
    """Statistics of three numbers a channel: far from those of an infinite batch."""
    right = lambda: vector_batch(nn.BatchNorm1d(WIDTH))  # noqa: E731
    wrong = lambda: vector_batch(nn.LayerNorm(WIDTH))  # noqa: E731
    check_nngp(Case(right, wrong, vectors, train=True))


def test_group_norm_of_concatenated_channels() -> None:
    """Each half is normalized by itself where the norm's groups are the halves."""

    def net(groups: int) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            return m.norm(torch.cat([m.a(x), 3 * relu(m.b(x))], 1))[..., :2].mean((2, 3))

        return Net(forward, a=conv(3), b=conv(3), norm=nn.GroupNorm(groups, 2 * CHANNELS))

    check_nngp(Case(lambda: net(2), lambda: net(1), images, 1, CHANNELS, 60))


def test_every_node_of_a_shuffle_behind_a_norm() -> None:
    """Draws of a layer's channels and of ranges of them stand side by side: q is 1 behind the norm, and is shuffled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.PixelShuffle(2))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = kgraph.kernels(model, x, nodes="all", with_ntk=False)
    shuffled = next(gram for name, gram in found.nodes.items() if "shuffle" in name)
    assert shuffled.places == (4, 2, 4, 2)  # cells, and pixels in a cell
    own = found.nngp[0, 0].reshape(64, 64).diagonal().mean()
    assert float(own) == pytest.approx(1.0, abs=0.05)
