"""Initializers: orthogonality, norms and variances, kernel taps, transposed convolutions, seeds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from kgraph.errors import InputError
from kgraph.initializers import Distribution, delta_tap, haar_orthogonal, reinitialize_weight_, suo

SHAPES = [(7, 7), (12, 5), (5, 12)]
BOTH: list[Distribution] = ["suo", "gaussian"]


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def redrawn(shape: tuple[int, ...], seed: int = 0, **options: Any) -> Tensor:
    return reinitialize_weight_(torch.empty(shape, dtype=torch.float64), generator=generator(seed), **options)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_haar_orthogonal_has_orthonormal_rows_or_columns(rows: int, cols: int) -> None:
    q = haar_orthogonal(rows, cols, generator())
    gram = q @ q.T if rows <= cols else q.T @ q
    assert q.shape == (rows, cols)
    torch.testing.assert_close(gram, torch.eye(min(rows, cols), dtype=torch.float64), rtol=0, atol=1e-13)


def test_haar_orthogonal_is_uniform_in_sign() -> None:
    # Under the Haar law the trace is symmetric about 0; raw LAPACK QR has a diagonal of one sign mostly.
    g = generator()
    traces = torch.stack([haar_orthogonal(4, 4, g).trace() for _ in range(2000)])
    assert abs(traces.mean()) < 4 / 2000**0.5
    assert abs(traces.var() - 1) < 0.15  # E trace^2 = 1 on O(n)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_suo_keeps_the_per_unit_square(rows: int, cols: int) -> None:
    g = generator()
    x = torch.randn(cols, generator=g, dtype=torch.float64)
    draws = torch.stack([suo(rows, cols, g) for _ in range(3000)])
    measured = (draws @ x).square().mean()
    torch.testing.assert_close(measured, x.square().mean(), rtol=0.03, atol=0)
    torch.testing.assert_close(draws.var(), torch.tensor(1 / cols).double(), rtol=0.03, atol=0)
    if rows >= cols:  # then it is not only so in the mean
        torch.testing.assert_close((draws @ x).square().mean(1), x.square().mean().expand(3000))


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize(("rows", "cols"), [(600, 150), (150, 600)])
def test_linear_variance_is_gain_squared_over_fan_in(distribution: Distribution, rows: int, cols: int) -> None:
    weight = redrawn((rows, cols), distribution=distribution, gain=1.5)
    assert float(weight.var() * cols) == pytest.approx(2.25, rel=0.02)


@pytest.mark.parametrize("distribution", BOTH)
def test_negative_control_reading_the_layout_as_in_out_fails(distribution: Distribution) -> None:
    wrong = redrawn((150, 600), distribution=distribution).T  # a layer of 600 outputs and 150 inputs
    assert float(wrong.var() * 150) < 0.3


@pytest.mark.parametrize(
    ("size", "padding", "dilation", "tap"),
    [
        (3, 1, 1, 1),
        (7, 3, 1, 3),
        (4, 1, 1, 1),
        (2, 0, 1, 0),
        (3, 2, 2, 1),
        (3, 0, 1, 0),
        (3, 9, 1, 2),
        (3, 3, 2, 2),
    ],
)
def test_delta_tap(size: int, padding: int, dilation: int, tap: int) -> None:
    assert delta_tap(size, padding, dilation) == tap


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("kernel", [(3,), (4, 3), (3, 2, 5)])
def test_delta_kernel_is_zero_but_for_one_tap(kernel: tuple[int, ...], distribution: Distribution) -> None:
    padding = tuple((k - 1) // 2 for k in kernel)
    weight = redrawn((6, 6, *kernel), distribution=distribution, padding=padding)
    block = weight[(slice(None), slice(None), *padding)]
    assert int(weight.count_nonzero()) == 36
    if distribution == "suo":
        torch.testing.assert_close(block @ block.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 3, padding="same", dilation=2),
        nn.Conv2d(6, 18, 4, padding="same"),
        nn.Conv1d(6, 12, 5, padding=2, groups=3),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.Conv3d(6, 6, 3, padding=1, groups=6),
    ],
    ids=repr,
)
def test_delta_suo_convolution_keeps_q_at_each_position(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    reinitialize_weight_(
        conv.weight,
        groups=conv.groups,
        padding=conv.padding,
        dilation=conv.dilation,
        stride=conv.stride,
        generator=generator(1),
    )
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    x = torch.randn(2, 6, *[9] * (conv.weight.ndim - 2), generator=generator())
    torch.testing.assert_close(conv(x).square().mean(1), x.square().mean(1), rtol=1e-4, atol=1e-5)


def test_depthwise_blocks_are_plus_or_minus_the_gain() -> None:
    weight = redrawn((400, 1, 3, 3), groups=400, padding=1, gain=0.5)
    centre = weight[:, 0, 1, 1]
    assert bool((centre.abs() == 0.5).all()) and abs(int(centre.sign().sum())) < 80


def test_groups_are_independent_blocks() -> None:
    weight = redrawn((8, 4), groups=2)
    for block in weight.split(4):
        torch.testing.assert_close(block @ block.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert abs(float((weight[:4] * weight[4:]).sum())) < 3.9  # equal blocks would give 4


@pytest.mark.parametrize("distribution", BOTH)
def test_dense_kernel_variance_counts_all_taps(distribution: Distribution) -> None:
    weight = redrawn((60, 20, 3, 3), distribution=distribution, delta=False, gain=2.0)
    assert float(weight.var() * 180) == pytest.approx(4.0, rel=0.05)
    if distribution == "suo":
        flat = weight.flatten(1)
        torch.testing.assert_close(flat @ flat.T, 4 * torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


TRANSPOSED = [
    nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),  # DCGAN
    nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4),
    nn.ConvTranspose1d(8, 8, 5, stride=3, padding=1),
    nn.ConvTranspose1d(8, 8, 3, stride=2, dilation=3, padding=3),
    nn.ConvTranspose3d(8, 8, 4, stride=2, padding=1),
    nn.ConvTranspose2d(8, 8, 3, stride=1, padding=1),
]


def position_q(conv: Any, *, delta: bool, distribution: Distribution, draws: int = 1) -> Tensor:
    """q of each output position for inputs of q = 1, mean over draws; the border is cut off."""
    g, kernels = generator(2), conv.weight.ndim - 2
    x = torch.randn(64, 8, *[8] * kernels, generator=g)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    total = []
    for _ in range(draws):
        reinitialize_weight_(
            conv.weight,
            distribution=distribution,
            delta=delta,
            groups=conv.groups,
            transposed=True,
            padding=conv.padding,
            dilation=conv.dilation,
            stride=conv.stride,
            generator=g,
        )
        nn.init.zeros_(conv.bias)
        total.append(conv(x).detach().square().mean((0, 1)))
    q = torch.stack(total).mean(0)
    return q[(slice(4, -4),) * kernels]


@pytest.mark.parametrize("conv", TRANSPOSED, ids=repr)
def test_transposed_delta_keeps_q_at_every_interior_position(conv: nn.Module) -> None:
    q = position_q(conv, delta=True, distribution="suo")
    torch.testing.assert_close(q, torch.ones_like(q), rtol=1e-4, atol=0)


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("conv", [TRANSPOSED[0], TRANSPOSED[1], TRANSPOSED[3]], ids=repr)
def test_transposed_dense_kernel_keeps_q_in_the_mean(conv: nn.Module, distribution: Distribution) -> None:
    q = position_q(conv, delta=False, distribution=distribution, draws=60)
    torch.testing.assert_close(q, torch.ones_like(q), rtol=0.12, atol=0)


def test_dcgan_upsampling_keeps_q_to_the_border_and_one_tap_alone_does_not() -> None:
    weight = redrawn((8, 8, 4, 4), transposed=True, padding=1, stride=2)
    x = torch.randn(1, 8, 5, 5, generator=generator(), dtype=torch.float64)
    y = F.conv_transpose2d(x, weight, stride=2, padding=1)
    q = x.square().mean(1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(y.square().mean(1), q)
    # Negative control: the delta of an ordinary convolution leaves three quarters of the positions zero.
    single = redrawn((8, 8, 4, 4), padding=1)
    zeros = F.conv_transpose2d(x, single, stride=2, padding=1).square().mean(1) == 0
    assert float(zeros.double().mean()) == pytest.approx(0.75)


def test_seeds_reproduce_and_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    for distribution, delta in itertools.product(BOTH, [True, False]):
        options = {"distribution": distribution, "delta": delta}
        first, second = redrawn((6, 4, 3), seed=3, **options), redrawn((6, 4, 3), seed=3, **options)
        assert torch.equal(first, second)
        assert not torch.equal(first, redrawn((6, 4, 3), seed=4, **options))
    assert torch.equal(torch.get_rng_state(), before)


def test_in_place_on_parameters_of_any_dtype_layout_and_device() -> None:
    exact = redrawn((6, 4, 3, 3), padding=1)
    half = nn.Parameter(torch.empty(6, 4, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    assert reinitialize_weight_(half, padding=1, generator=generator()) is half and half.requires_grad
    assert torch.equal(half.detach(), exact.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)
    stored = nn.Parameter(torch.empty(4, 6, dtype=torch.float64))
    reinitialize_weight_(stored.T, generator=generator())
    assert torch.equal(stored.detach().T, redrawn((6, 4)))


def test_meta_weights_are_left_alone_and_draw_nothing() -> None:
    g = generator()
    before = g.get_state()
    assert reinitialize_weight_(torch.empty(4, 4, 3, device="meta"), generator=g).is_meta
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, "two or more axes"),
        ((4, 4), {"distribution": "uniform"}, "distribution"),
        ((4, 4), {"groups": 3}, "groups=3"),
        ((4, 4), {"gain": float("nan")}, "gain"),
        ((4, 4, 3, 3), {"padding": "full"}, "padding"),
        ((4, 4, 3, 3), {"padding": (1, 1, 1)}, "padding"),
        ((4, 4, 3, 3), {"stride": (1, 1, 1)}, "stride"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        redrawn(shape, **options)
