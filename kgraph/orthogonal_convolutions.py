"""Orthogonal convolutions: delta and general, any number of axes, with stride, groups, dilation, transposed.

The operator ``x -> conv(x)`` on a circular field has all singular values equal to the gain (`scaling="isometry"`),
however its taps are shared: one tap (delta), or a random product of k - 1 two-tap blocks on every axis (general).

Source: Xiao et al. 2018, arXiv 1806.05393, algorithms 1 and 2; Kautsky and Turcajova 1994.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from kgraph.errors import InputError
from kgraph.initializers import delta_tap, haar_orthogonal, layer_padding, per_axis

Form = Literal["delta", "general"]
Scaling = Literal["variance", "isometry"]


@torch.no_grad()
def orthogonal_convolution_(
    weight: Tensor,
    *,
    form: Form = "delta",
    scaling: Scaling = "variance",
    gain: float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    generator: Generator,
) -> Tensor:
    """Redraws the weight of a convolution (or a linear layer) in place as an orthogonal one.

    Every group has an independent kernel of its own. With a stride s the positions of each s x s cell are channels
    of one position: a semi-orthogonal matrix [out, in s^d] is laid over s^d neighbouring taps, so that no input is
    lost and the operator is isometric wherever out <= in s^d or out >= in s^d allows it (a single tap would drop
    1 - 1/s^d of the inputs). A transposed convolution gets the adjoint.

    Args:
        weight: PyTorch's layout, ``[out, in/groups, *kernel]``; transposed ``[in, out/groups, *kernel]``. A meta
            tensor is left as it is.
        form: "delta": one matrix on one tap (of each residue of the stride); keeps every Fourier mode of the
            variances. "general": Kautsky and Turcajova's product over the whole kernel; the variance of the taps is
            binomial, so that modes decay.
        scaling: "isometry": all singular values are ``gain``. "variance": times sqrt(max(1, out / (in s^d))), so that
            ``E z^2 = gain^2 |x|^2 / in`` whatever the shape; the same where out <= in.
        gain: sigma_w.
        padding, dilation, stride: the layer's. Norm is kept exactly under circular padding, and by the delta form
            under zero padding too where the output is not cropped.
        generator: source of all randomness.

    Raises:
        InputError: arguments that do not fit the weight; a stride whose cells the kernel cannot cover (dilation and
            stride with a common factor).
    """
    _check(weight, form, scaling, groups, gain)
    kernel = tuple(weight.shape[2:])
    dilations, strides = per_axis("dilation", dilation, len(kernel)), per_axis("stride", stride, len(kernel))
    if min((1, *kernel, *dilations, *strides)) < 1:
        raise InputError(f"kernel {kernel}, dilation {dilations} and stride {strides} must be at least 1")
    pads = layer_padding(padding, kernel, dilations)
    axes = [_Axis(*geometry) for geometry in zip(kernel, pads, dilations, strides, strict=True)]
    if weight.is_meta:
        return weight
    rows, cols = weight.shape[0] // groups, weight.shape[1]
    drawn = [_kernel(form, rows, cols, axes, generator) for _ in range(groups)]
    cell = math.prod(axis.cell for axis in axes)
    out, read = (cols * cell, rows) if transposed else (rows, cols * cell)
    stretch = math.sqrt(max(1.0, out / read)) if scaling == "variance" else 1.0
    return weight.copy_(torch.cat(drawn) * (gain * stretch))


def _check(weight: Tensor, form: str, scaling: str, groups: int, gain: float) -> None:
    if form not in ("delta", "general") or scaling not in ("variance", "isometry"):
        raise InputError(f"form={form!r}, scaling={scaling!r}", hint="delta or general, variance or isometry")
    if weight.ndim < 2 or not weight.is_floating_point():
        raise InputError(f"weight must be floating point of two or more axes, got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups={groups} does not divide the weight's first axis, {weight.shape[0]}")
    if not math.isfinite(gain):
        raise InputError(f"gain must be finite, got {gain}")


class _Axis:
    """One kernel axis: how many taps make a cell of the stride, how many cells fit, and where they begin."""

    def __init__(self, size: int, padding: int, dilation: int, stride: int) -> None:
        self.size, self.dilation = size, dilation
        self.cell = min(size, stride)
        # Taps t of a cell read the residues dilation * t mod stride, of which there are stride / gcd.
        if self.cell > stride // math.gcd(dilation, stride):
            raise InputError(
                f"dilation {dilation} and stride {stride} have a common factor: the taps reach only some inputs",
                hint="Such a layer has no orthogonal form",
            )
        self.cells = size // self.cell if size >= stride else 1
        centre = delta_tap(size, padding, dilation)
        self.delta_start = min(centre, size - self.cell)


def _kernel(form: Form, rows: int, cols: int, axes: Sequence[_Axis], generator: Generator) -> Tensor:
    """[rows, cols, *kernel] of a forward convolution whose operator is semi-orthogonal.

    The cells' positions count as channels (space to depth): a kernel of stride 1 over cells, then laid out.
    """
    cell = [axis.cell for axis in axes]
    wide = cols * math.prod(cell)
    counts = [1 if form == "delta" else axis.cells for axis in axes]
    blocks = kautsky_turcajova(rows, wide, counts, generator)
    values = torch.zeros(rows, cols, *[axis.size for axis in axes], dtype=torch.float64, device=blocks.device)
    starts = [axis.delta_start if form == "delta" else 0 for axis in axes]
    inside = blocks.reshape(rows, cols, *cell, *counts)
    for place in itertools.product(*map(range, counts)):
        part = inside[(..., *place)]
        corner = [s + c * p for s, c, p in zip(starts, cell, place, strict=True)]
        window = [slice(a, a + c) for a, c in zip(corner, cell, strict=True)]
        values[(slice(None), slice(None), *window)] = part
    return values


def kautsky_turcajova(rows: int, cols: int, sizes: Sequence[int], generator: Generator) -> Tensor:
    """A semi-orthogonal convolution kernel [rows, cols, *sizes] of stride 1.

    On each axis k - 1 blocks (P, I - P), P a random projection of rank about n / 2, are convolved; a Haar matrix
    follows. For all z on the unit circle P z + (I - P) is unitary, so the product is.

    Source: Kautsky and Turcajova 1994; Xiao et al. 2018, arXiv 1806.05393, algorithm 1 (two axes at a time).
    """
    n = max(rows, cols)
    matrix = haar_orthogonal(rows, cols, generator)
    at = torch.eye(n, dtype=torch.float64, device=generator.device).reshape(n, n, *[1] * len(sizes))
    left = list(sizes)
    while any(size > 1 for size in left):
        for axis, size in enumerate(left):
            if size > 1:
                at = _convolved(at, _projection(n, generator), axis + 2)
                left[axis] -= 1
    equation = "ij,jk...->ik..." if rows <= cols else "ij...,jk->ik..."
    return torch.einsum(equation, *((matrix, at) if rows <= cols else (at, matrix)))


def _projection(n: int, generator: Generator) -> Tensor:
    """On a random subspace of dimension n / 2; of an odd n, rounded up or down by chance."""
    odd = int(torch.randint(2, (), generator=generator, device=generator.device)) if n % 2 else 0
    basis = haar_orthogonal(n, n, generator)[:, : n // 2 + odd]
    return basis @ basis.T


def _convolved(kernel: Tensor, projection: Tensor, axis: int) -> Tensor:
    """``kernel * (P, I - P)`` along one axis: one tap longer."""
    other = torch.eye(len(projection), dtype=projection.dtype, device=projection.device) - projection
    zero = torch.zeros_like(kernel.narrow(axis, 0, 1))
    first = torch.einsum("ij...,jk->ik...", kernel, projection)
    second = torch.einsum("ij...,jk->ik...", kernel, other)
    return torch.cat([first, zero], axis) + torch.cat([zero, second], axis)
