"""Orthogonal convolutions: singular values, norms and variances for every geometry, against the reference numbers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from kgraph.errors import InputError
from kgraph.initializers import reinitialize_weight_
from kgraph.meanfield import tap_shares
from kgraph.orthogonal_convolutions import orthogonal_convolution_
from kgraph.studies.isometry.chain import convolution_moments, matrix_moments

CONV = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())["S4_conv"]["data"]
MC = 0.03


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shape: tuple[int, ...], seed: int = 0, **options: Any) -> Tensor:
    given = {"scaling": "isometry"} | options
    return orthogonal_convolution_(torch.empty(shape, dtype=torch.float64), generator=generator(seed), **given)


def circular(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> Tensor:
    """Circular convolution, window starting at the position (a shift of any other choice)."""
    axes = weight.ndim - 2
    pads = [p for size in reversed(weight.shape[2:]) for p in (0, dilation * (size - 1))]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return convolve(F.pad(x, pads, mode="circular"), weight, stride=stride, dilation=dilation, groups=groups)


def operator(weight: Tensor, n: int, **geometry: int) -> Tensor:
    """Matrix of the circular operator on a field of n positions an axis."""
    axes, channels = weight.ndim - 2, weight.shape[1] * geometry.get("groups", 1)
    eye = torch.eye(channels * n**axes, dtype=torch.float64).reshape(-1, channels, *[n] * axes)
    return circular(eye, weight, **geometry).flatten(1).T


def singular_values(weight: Tensor, n: int, **geometry: int) -> Tensor:
    return torch.linalg.svdvals(operator(weight, n, **geometry))


GEOMETRIES = [
    ((6, 6, 3), {}),
    ((6, 10, 3, 3), {}),
    ((10, 6, 5, 5), {}),
    ((6, 6, 2, 2), {"dilation": 2}),
    ((6, 6, 4), {"dilation": 3}),
    ((4, 4, 4, 4), {"stride": 2}),
    ((8, 4, 3, 3), {"stride": 2}),
    ((16, 4, 2, 2), {"stride": 2}),
    ((5, 3, 3, 3), {"stride": 3, "dilation": 2}),
    ((6, 2, 3, 3), {"stride": 2, "groups": 2}),
    ((6, 1, 3), {"groups": 6}),
    ((3, 3, 2, 2, 2), {}),
]


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES, ids=repr)
@pytest.mark.parametrize("form", ["delta", "general"])
def test_all_singular_values_are_the_gain(form: str, shape: tuple[int, ...], geometry: dict[str, int]) -> None:
    weight = drawn(shape, form=form, gain=1.3, **geometry)
    n = {1: 12, 2: 6, 3: 4}[len(shape) - 2]
    values = singular_values(weight, n, **geometry)
    torch.testing.assert_close(values, torch.full_like(values, 1.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES, ids=repr)
@pytest.mark.parametrize("form", ["delta", "general"])
def test_transposed_gets_the_adjoint(form: str, shape: tuple[int, ...], geometry: dict[str, int]) -> None:
    """A transposed convolution's weight is that of the convolution it is the adjoint of."""
    one, two = drawn(shape, form=form, **geometry), drawn(shape, form=form, transposed=True, **geometry)
    torch.testing.assert_close(one, two)


def test_negative_control_gaussian_taps_are_far_from_isometric() -> None:
    weight = torch.empty(32, 32, 3, 3, dtype=torch.float64)
    reinitialize_weight_(weight, distribution="gaussian", delta=False, generator=generator())
    transfer = torch.fft.fft2(weight, s=(8, 8)).movedim((0, 1), (-2, -1))  # its singular values are the operator's
    values, want = torch.linalg.svdvals(transfer), CONV["gauss_k3_c32_sv"]
    assert float(values.square().mean()) == pytest.approx(want["mean_sq"], rel=MC)
    assert float(values.max()) == pytest.approx(want["max"], rel=0.1) and float(values.min()) < 0.05


@pytest.mark.parametrize("key", [key for key in CONV if key.startswith("delta_circ_")])
def test_delta_keeps_the_norm_on_a_circle(key: str) -> None:
    size, channels = int(key[12]), tuple(map(int, key[14:].split("to")))
    x = torch.randn(2, channels[0], 8, 8, generator=generator(), dtype=torch.float64)
    weight = drawn((channels[1], channels[0], size, size))
    assert float(circular(x, weight).norm() / x.norm()) == pytest.approx(CONV[key], abs=1e-10)


@pytest.mark.parametrize("key", [key for key in CONV if key.endswith("sv_minmax")])
def test_general_reference(key: str) -> None:
    size, channels = int(key[4]), tuple(map(int, key[6:-10].split("to")))
    values = singular_values(drawn((channels[1], channels[0], size, size), form="general"), 6)
    assert [float(values.min()), float(values.max())] == pytest.approx(CONV[key], abs=1e-10)


def test_norms_of_the_reference() -> None:
    x = torch.randn(8, 6, 9, 9, generator=generator(), dtype=torch.float64)
    found = {
        "delta_zero_same_k3": F.conv2d(x, drawn((6, 6, 3, 3), padding=1), padding=1).norm() / x.norm(),
        "delta_groups3_6to12": circular(x, drawn((12, 2, 3, 3), groups=3), groups=3).norm() / x.norm(),
        "delta_depthwise": circular(x, drawn((6, 1, 3, 3), groups=6), groups=6).norm() / x.norm(),
        "kt_k3_circ_norm": circular(x, drawn((6, 6, 3, 3), form="general")).norm() / x.norm(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {k: CONV[k] for k in found}, abs=1e-10
    )
    cropped = F.conv2d(x, drawn((6, 6, 4, 4), padding=1), padding=1)
    want = CONV["delta_zero_k4_pad1_tap=pad(1): out 8x8 (crops), norm"]
    assert cropped.shape[2:] == (8, 8) and float(cropped.norm() / x.norm()) == pytest.approx(want, rel=MC)
    border = F.conv2d(x[..., :8, :8], drawn((6, 6, 3, 3), form="general"), padding=1).norm() / x[..., :8, :8].norm()
    assert float(border) == pytest.approx(CONV["kt_k3_zero_norm"], rel=MC)


def test_variance_scaling() -> None:
    """E z^2 = |x|^2 / in for every shape; a stride that drops inputs keeps the variance, not the norm."""
    g = generator()
    x = torch.randn(64, 16, 8, 8, generator=g, dtype=torch.float64)
    narrow = circular(x, drawn((4, 16, 3, 3), scaling="variance"))
    assert float(narrow.square().mean() / x.square().mean()) == pytest.approx(
        CONV["delta_16to4_perchannel_var_ratio"], rel=MC
    )
    wide = circular(x[:, :4], drawn((16, 4, 3, 3), scaling="variance"))
    want = CONV["delta_4to16_variance_norm_perchannel_var_ratio"]
    assert float(wide.square().mean() / x[:, :4].square().mean()) == pytest.approx(want, rel=1e-10)
    delta = torch.empty(16, 16, 3, 3, dtype=torch.float64)
    reinitialize_weight_(delta, padding=1, stride=2, generator=g)
    ratio = F.conv2d(x, delta, stride=2, padding=1).square().sum() / x.square().sum()
    assert float(ratio) == pytest.approx(CONV["delta_stride2_norm2_ratio"], rel=MC)


VARIANCE = [
    nn.Conv2d(8, 8, 3, stride=2, padding=1),
    nn.Conv2d(4, 64, 3, stride=2, padding=1),
    nn.Conv1d(8, 24, 4, stride=4),
    nn.Conv2d(8, 16, 5, padding=2, groups=2),
    nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
    nn.ConvTranspose2d(64, 4, 4, stride=2, padding=1),
    nn.ConvTranspose2d(4, 16, 3, padding=1, groups=2),
    nn.ConvTranspose1d(8, 8, 5, stride=3, padding=1),
]


@pytest.mark.parametrize("conv", VARIANCE, ids=repr)
@pytest.mark.parametrize("form", ["delta", "general"])
def test_variance_scaling_keeps_q_inside(form: Any, conv: Any) -> None:
    options = {"groups": conv.groups, "padding": conv.padding, "dilation": conv.dilation, "stride": conv.stride}
    options["transposed"] = isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    kernels, found = conv.weight.ndim - 2, []
    x = torch.randn(64, conv.in_channels, *[16] * kernels, generator=generator())
    nn.init.zeros_(conv.bias)
    for seed in range(4):
        orthogonal_convolution_(conv.weight.data, form=form, generator=generator(seed), **options)
        y = conv(x).detach()
        inner = tuple(slice(n // 4, n - n // 4) for n in y.shape[2:])
        found.append(float(y[(..., *inner)].square().mean()))
    assert sum(found) / 4 == pytest.approx(float(x.square().mean()), rel=0.12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_taps_of_the_general_form_are_binomial(size: int) -> None:
    shares = tap_shares(drawn((64, 64, size, size), form="general"))
    binomial = torch.tensor([math.comb(size - 1, i) for i in range(size)]).double() / 2 ** (size - 1)
    torch.testing.assert_close(shares, binomial.outer(binomial), rtol=0, atol=0.02)
    row = CONV[f"kt_k{size}_v_marginal"]
    assert shares.sum(1).tolist() == pytest.approx(row["measured"], abs=0.03)
    assert row["binomial"] == pytest.approx(binomial.tolist())
    delta = tap_shares(drawn((64, 64, size, size), padding=size // 2))
    assert float(delta[size // 2, size // 2]) == 1


def test_refused() -> None:
    weight, g = torch.empty(4, 4, 3, 3), generator()
    for options in (
        {"form": "gaussian"},
        {"scaling": "none"},
        {"groups": 3},
        {"stride": 2, "dilation": 2},
        {"padding": "reflect"},
        {"dilation": (1, 1, 1)},
    ):
        with pytest.raises(InputError):
            orthogonal_convolution_(weight, generator=g, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        orthogonal_convolution_(torch.empty(4), generator=g)


def test_a_meta_weight_is_left_and_draws_follow_the_seed() -> None:
    meta = torch.empty(4, 4, 3, device="meta")
    assert orthogonal_convolution_(meta, generator=generator()) is meta
    assert torch.equal(drawn((4, 4, 3), 1, form="general"), drawn((4, 4, 3), 1, form="general"))
    assert not torch.equal(drawn((4, 4, 3), 1), drawn((4, 4, 3), 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_moments_of_the_operator(stride: int, transposed: bool) -> None:
    """tr(W W^T) and tr((W W^T)^2) of the operator from its kernel alone."""
    weight = torch.randn(4, 6, 3, 3, generator=generator(), dtype=torch.float64)
    matrix = operator(weight, 8, stride=stride)
    found = convolution_moments(weight, transposed, 1, [stride, stride])
    assert found == pytest.approx(matrix_moments(matrix.T if transposed else matrix), rel=1e-10)
    blocks = torch.randn(4, 3, 3, generator=generator(), dtype=torch.float64)
    grouped = operator(blocks, 8, groups=2)
    assert convolution_moments(blocks, False, 2, [1]) == pytest.approx(matrix_moments(grouped), rel=1e-10)


def test_groups_differ() -> None:
    weight = drawn((12, 4, 3), groups=3)
    for one, two in itertools.combinations(weight.chunk(3), 2):
        assert not torch.allclose(one, two)
