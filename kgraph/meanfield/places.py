"""What a convolution does to the field of per-position variances: ``Sigma' = chi v * C(Sigma)``.

A deviation of Fourier mode k from the mean over positions is multiplied by chi lambda_k in every layer,

    lambda_k = sum_b v_b e^(2 pi i k b / n)        v_b: share of tap b in the variance of the weights

so that uniform taps lose every mode but the constant one, and a delta kernel (one tap) keeps all.

Source: Xiao et al. 2018, arXiv 1806.05393.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kgraph.errors import InputError


def tap_shares(weight: Tensor) -> Tensor:
    """Variance shares of the taps of a convolution's weight [out, in, *kernel]: [*kernel], sum 1."""
    if weight.ndim < 3:
        raise InputError(f"a weight of shape {tuple(weight.shape)} has no taps")
    squares = weight.detach().double().square().mean((0, 1))
    total = squares.sum()
    if not total > 0:
        raise InputError("the weight is zero: its taps have no shares")
    return squares / total


def fourier_multipliers(shares: Tensor, size: int | Sequence[int], *, dilation: int | Sequence[int] = 1) -> Tensor:
    """``|lambda_k|`` of every Fourier mode k of a circular field.

    Args:
        shares: variance shares of the taps, [*kernel]; where the kernel is not centred lambda_k has a phase, a
            mere shift, which is left out.
        size: positions by axis.
        dilation: of the kernel.

    Shapes: [*size]; entry 0 is the constant mode's.
    """
    shares = torch.as_tensor(shares, dtype=torch.float64)
    sizes = (size,) * shares.ndim if isinstance(size, int) else tuple(size)
    if len(sizes) != shares.ndim or min((1, *sizes)) < 1:
        raise InputError(f"{shares.ndim} kernel axes, but the sizes are {sizes}", hint="Give one above 0 an axis")
    apart = [dilation] * shares.ndim if isinstance(dilation, int) else list(dilation)
    apart *= shares.ndim if len(apart) == 1 else 1
    if len(apart) != shares.ndim:
        raise InputError(f"{shares.ndim} kernel axes, but {len(apart)} dilations")
    field = torch.zeros(sizes, dtype=torch.float64)
    for tap in np.ndindex(*shares.shape):
        field[tuple(t * d % n for t, d, n in zip(tap, apart, sizes, strict=True))] += shares[tap]
    return torch.fft.fftn(field).abs()


def top_multiplier(shares: Tensor, size: int) -> float:
    """Largest multiplier of one axis with zero padding: borders lose variance, so that no mode is kept in full.

    For uniform taps 3: (1 + 2 cos(pi / (n + 1))) / 3.
    """
    shares = torch.as_tensor(shares, dtype=torch.float64)
    if shares.ndim != 1:
        raise InputError("one axis at a time", hint="Sum the shares over the other axes")
    if size < 1:
        raise InputError(f"size is {size}", hint="A field has at least one position")
    centre = (len(shares) - 1) // 2
    operator = torch.zeros(size, size, dtype=torch.float64)
    for tap, share in enumerate(shares.tolist()):
        if abs(tap - centre) >= size:  # reads zeros at every position
            continue
        operator += share * torch.diag(torch.ones(size - abs(tap - centre), dtype=torch.float64), tap - centre)
    return float(torch.linalg.eigvals(operator).abs().max())
