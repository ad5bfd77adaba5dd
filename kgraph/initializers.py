"""Random weights: Haar orthogonal, scale-corrected uniform orthogonal (SUO), Gaussian; dense and delta.

Every draw is made in float64 from an explicit generator; the global seed is never read. Large matrices are made
orthogonal in float32. The gain is sigma_w, the standard deviation's factor, not its square. With gain 1 each weight
here keeps q: E z^2 = |x|^2 / fan_in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from kgraph.errors import InputError

Distribution = Literal["suo", "gaussian"]
Taps = list[list[int]]

_LARGE = 1 << 18


def _randn(shape: Sequence[int], generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float64)


def haar_orthogonal(rows: int, cols: int, generator: Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """A uniformly (Haar) distributed matrix with orthonormal rows (rows <= cols) or columns (rows >= cols).

    QR of a Gaussian matrix, columns times sign(diag R): without the signs the law is not uniform. The QR is
    of the tall shape, which has the law of a cropped square one at a fraction of the cost.

    Shapes: [rows, cols], on the generator's device; float64, large ones float32 where that is asked for.
    Source: Mezzadri 2007, arXiv math-ph/0609050.
    """
    gaussian = _randn((max(rows, cols), min(rows, cols)), generator).to(dtype)
    q = _orthonormal_columns(gaussian)
    return q if rows >= cols else q.T


def _orthonormal_columns(tall: Tensor) -> Tensor:
    """The Q of ``tall = Q R`` whose R has a positive diagonal, which is unique.

    At least twice as tall as wide, a Gaussian matrix has a condition number below 6: then the Cholesky factor
    of ``tall.T @ tall`` is that R, accurately, and several times faster than Householder reflections.
    """
    if tall.shape[0] >= 2 * tall.shape[1] >= 64:
        upper = torch.linalg.cholesky(tall.T @ tall, upper=True)
        return torch.linalg.solve_triangular(upper, tall, upper=True, left=False)
    q, r = torch.linalg.qr(tall)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(tall.dtype)


def suo(out_features: int, in_features: int, generator: Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scale-corrected uniform orthogonal: a semi-orthogonal matrix times sqrt(max(1, out / in)).

    E z^2 = |x|^2 / in per output for every shape: a matrix with out <= in only projects, and loses the length
    that averaging over ``out`` instead of ``in`` gives back; one with out > in is isometric, and must be
    stretched.

    Shapes: [out_features, in_features], of ``dtype``, entries of variance 1 / in.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    stretch = math.sqrt(max(1.0, out_features / in_features))
    return haar_orthogonal(out_features, in_features, generator, dtype) * stretch


def _draw(distribution: Distribution, rows: int, cols: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    """A [rows, cols] matrix of entry variance 1 / cols."""
    if distribution == "suo":
        return suo(rows, cols, generator, dtype)
    return _randn((rows, cols), generator) / math.sqrt(cols)


def delta_tap(size: int, padding: int, dilation: int = 1, last: int | None = None) -> int:
    """The tap that meets the output position: clamp(round(padding / dilation), 0, last), last = size - 1.

    Output o reads input o * stride - padding + dilation * tap, which is o * stride at tap = padding /
    dilation. Even kernels included; ``same`` padding puts it at (size - 1) // 2.
    """
    return min(max(round(padding / dilation), 0), size - 1 if last is None else last)


def convolution_taps(size: int, padding: int, dilation: int, delta: bool) -> Taps:
    """Taps of one kernel axis that share one matrix: the delta tap alone, or all of them."""
    return [[delta_tap(size, padding, dilation)]] if delta else [list(range(size))]


def transposed_taps(size: int, padding: int, dilation: int, stride: int, delta: bool) -> Taps:
    """Taps of one kernel axis of a transposed convolution, grouped by the output positions they reach.

    Output o receives input i through tap t where o + padding = stride * i + dilation * t: only the taps of
    one residue class of dilation * t mod stride. Each class therefore has a matrix of its own. Delta keeps
    one tap of every class, the window that starts at the tap meeting the position: exactly one tap for each
    output position, so q' = q at every interior one. (One tap in all would leave 1 - 1/stride of them zero.)
    """
    classes = min(size, stride // math.gcd(stride, dilation))
    if delta:
        start = delta_tap(size, padding, dilation, last=size - classes)
        return [[tap] for tap in range(start, start + classes)]
    return [list(range(first, size, classes)) for first in range(classes)]


def per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values = values * axes
    if len(values) != axes:
        raise InputError(f"{name} must have one entry for each of the {axes} kernel axes, got {value}")
    return values


def layer_padding(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Padding before the first position, by axis; PyTorch's 'same' and 'valid' included."""
    if padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    if padding == "valid":
        return (0,) * len(kernel)
    if isinstance(padding, str):
        raise InputError(f"padding must be 'same', 'valid' or numbers, got '{padding}'")
    return per_axis("padding", padding, len(kernel))


def _check(weight: Tensor, distribution: str, groups: int, gain: float) -> None:
    if distribution not in ("suo", "gaussian"):
        raise InputError(f"distribution must be 'suo' or 'gaussian', got '{distribution}'")
    if weight.ndim < 2 or not weight.is_floating_point():
        raise InputError(f"weight must be floating point of two or more axes, got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups={groups} does not divide the weight's first axis, {weight.shape[0]}")
    if not math.isfinite(gain):
        raise InputError(f"gain must be finite, got {gain}")


@torch.no_grad()
def reinitialize_weight_(
    weight: Tensor,
    *,
    distribution: Distribution = "suo",
    delta: bool = True,
    groups: int = 1,
    transposed: bool = False,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    gain: float = 1.0,
    corrected: bool = False,
    generator: Generator,
) -> Tensor:
    """Redraws the weight of a linear layer or a convolution in place, so that q' = gain^2 q.

    An independent block for each group (a depthwise block is +-gain under "suo") and, in a transposed
    convolution, for each residue class of the stride (`transposed_taps`). A block spans its taps:

    - delta: one tap, [out/groups, in/groups]; the rest of the kernel is zero. q' = q at each position.
    - not delta: all taps, flattened to [out/groups, in/groups * taps]: variance gain^2 / fan_in, where fan_in
      counts the entries an interior output position reads. q' is the mean of q over the window. Not the
      general orthogonal convolution.

    Args:
        weight: PyTorch's layout, [out, in/groups, *kernel]; transposed [in, out/groups, *kernel]. A layer
            that stores [in, out] (transformers' Conv1D) passes ``weight.T``. A meta tensor is left as it is
            and nothing is drawn.
        distribution: "suo" or "gaussian".
        padding, dilation, stride: the layer's, a number or one for each kernel axis; stride matters only for
            transposed convolutions.
        gain: sigma_w.
        corrected: give a Gaussian weight the mean square of its law exactly, as "suo" has by itself, so that no
            constant computed from it depends on the draw.
        generator: source of all randomness, read on its own device.

    Returns: weight.
    Raises: InputError for arguments that do not fit the weight.
    Source: Martens et al. 2021, arXiv 2110.01765 (SUO, Delta); Xiao et al. 2018, arXiv 1806.05393
    (delta-orthogonal).
    """
    _check(weight, distribution, groups, gain)
    kernel = tuple(weight.shape[2:])
    dilations = per_axis("dilation", dilation, len(kernel))
    strides = per_axis("stride", stride, len(kernel))
    if min((1, *kernel, *dilations, *strides)) < 1:
        raise InputError(f"kernel {kernel}, dilation {dilations} and stride {strides} must be at least 1")
    geometry = list(zip(kernel, layer_padding(padding, kernel, dilations), dilations, strides, strict=True))
    if weight.is_meta:
        return weight
    if transposed:
        axes = [transposed_taps(k, p, d, s, delta) for k, p, d, s in geometry]
    else:
        axes = [convolution_taps(k, p, d, delta) for k, p, d, _ in geometry]
    fan_out, fan_in = weight.shape[0] // groups, weight.shape[1]
    if transposed:
        fan_out, fan_in = fan_in, fan_out
    # float32 is enough where the weight keeps no more, and halves the work on large matrices
    dtype = torch.float64 if weight.dtype == torch.float64 or weight.numel() < _LARGE else torch.float32
    values = torch.zeros(groups, fan_out, fan_in, *kernel, dtype=dtype, device=generator.device)
    wanted = 0.0
    for group, shared in itertools.product(range(groups), itertools.product(*axes)):
        taps = list(itertools.product(*shared))
        block = _draw(distribution, fan_out, fan_in * len(taps), generator, dtype) * gain
        wanted += gain**2 * fan_out
        for tap, part in zip(taps, block.reshape(fan_out, fan_in, len(taps)).unbind(-1), strict=True):
            values[(group, slice(None), slice(None), *tap)] = part
    if corrected and distribution == "gaussian":
        values *= math.sqrt(wanted / max(float(values.square().sum()), torch.finfo(dtype).tiny))
    if transposed:
        values = values.transpose(1, 2)
    return weight.copy_(values.reshape(weight.shape))
