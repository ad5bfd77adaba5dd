"""Weights as draws: their moments, and what is taken for granted when rows count as independent ones about zero."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.special import ndtr, stdtrit
from scipy.stats import chi2, norm
from torch import Tensor, fx

from kgraph.canonical import operation_name
from kgraph.how import EXACT, How, assumed

_SHARE_OF_MEAN = 5e-3
"""Of a unit's q in the mean of its weights: (sum_j w_j)^2 against the sum of their squares."""
UNEVEN_ROWS = assumed("channels of one variance, though rows of the weight differ in theirs (pruned, masked or scaled)")
UNEVEN_COLUMNS = assumed("channels read alike, though they differ, and columns of the weight differ in variance")
_SPREAD = 5e-3
"""Of the variance of the units' variances, against their mean's square: below it a function of them hardly differs."""
_LEFT, _ROUNDINGS = 1e-5, 4.0
"""Of a unit's sum against the root of the sum of its squares: of weights once held in 32 bits, and in roundings."""
_SIX_SIGMA = 2 * float(norm.sf(6.0))
_MIRRORS = {"t", "transpose", "permute", "numpy_T", "mT", "flip", "rot90", "roll"}


def mean_square(tensor: Tensor) -> float:
    """E[x^2] over all entries, accumulated in float64; a meta tensor has no values and counts as variance 1/fan."""
    if tensor.is_meta:
        return tensor.shape[0] / max(tensor.numel(), 1)
    if tensor.numel() > 1 and not any(tensor.stride()):
        return float(tensor[(0,) * tensor.ndim]) ** 2  # one number, expanded
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return float(torch.linalg.vector_norm(real, dtype=torch.float64)) ** 2 / max(tensor.numel(), 1)


def one_number(x: Tensor) -> float | None:
    """The value that all entries have; None where they differ, or there are none."""
    first = x.detach().flatten()[:1]
    return float(first) if len(first) and bool((x == first).all()) else None


def real_mean(x: Tensor) -> float:
    """E[x], taken as 0 where it differs from it by no more than sampling noise (four standard errors).

    A bias drawn around 0 has a mean of its size over sqrt(n); as a shift it would cost every closed form after it. The
    standard error is that of the entries' own spread, by Student's law where they are few; one entry alone is noise.
    """
    values = (x.real if x.is_complex() else x).detach().double()
    if values.numel() < 2:
        return 0.0
    mean = values.mean()
    noise = _four_sigma(values.numel() - 1) * values.std() / math.sqrt(values.numel())
    return float(mean) if bool(mean.abs() > noise) else 0.0


def assumed_of(source: fx.Node | None, off: bool, uneven: bool) -> How:
    """What is assumed of a weight: entries about zero (it is ``off`` centre), and, if computed, not mirror images.

    With a mean m, all channels share m times the sum over the inputs: neither their second moments nor their
    independence are those of draws about zero. With ``uneven`` rows the mean of functions is not that of the mean.
    """
    if off:
        return assumed("weights about zero, though their mean is not")
    if uneven:
        return UNEVEN_ROWS
    if source is not None and source.op != "get_attr" and _mirrored(source):
        return assumed("a weight and its mirror image taken as new weights")
    return EXACT


def off_centre(weight: Tensor) -> bool:
    """Whether the mean of weights [out, ...], beyond sampling noise, makes a share of a unit's q."""
    if weight.is_meta or weight.is_complex() or weight.ndim < 2 or not weight.numel() or not any(weight.stride()):
        return False  # one number expanded stands for weights without values
    least = _SHARE_OF_MEAN * mean_square(weight) / weight[0].numel()
    mean = float(weight.detach().mean(dtype=torch.float64))  # cheap: most weights end here
    return mean**2 > least and real_mean(weight) ** 2 > least


def sums_to_zero(weight: Tensor) -> bool:
    """Whether every unit of a weight [out, ...] sums to 0 up to rounding, as a standardized weight's do.

    The square of a sum of independent entries is the sum of their squares on average; rounding leaves eps^2 of it.
    """
    if weight.is_meta or weight.is_complex() or weight.ndim < 2 or not any(weight.stride()):
        return False
    if not weight.numel() or weight[0].numel() < 2 or not weight.is_floating_point():
        return False
    least = max(_LEFT, _ROUNDINGS * torch.finfo(weight.dtype).eps)
    sums, squares = _sums(weight[:1])  # cheap: most weights end here
    if sums > least**2 * squares:
        return False
    sums, squares = _sums(weight)
    return squares > 0 and sums <= least**2 * squares


def _sums(weight: Tensor) -> tuple[float, float]:
    """Sums of the units' squared sums, and of all squares."""
    rows = weight.detach().flatten(1).double()
    return float(rows.sum(1).square().sum()), float(rows.square().sum())


def uneven_rows(weight: Tensor) -> bool:
    """Whether units of a weight [out, ...] differ in variance (pruned, masked or scaled rows), beyond sampling noise.

    Analysis of variance of the squares: n Var_i[v_i] / Var[w^2] is 1 on average for v_i = mean_j w_ij^2 of alike
    entries, with the spread of a chi square of R - 1 degrees over R - 1, and more where squares have heavy tails.
    """
    if weight.is_meta or weight.is_complex() or weight.ndim < 2 or not any(weight.stride()):
        return False
    rows = weight.detach().flatten(1)
    n = rows.shape[1]
    if len(rows) < 2 or n < 2:
        return False
    units = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() / n
    mean, variance = float(units.mean()), float(units.var())
    if not variance > _SPREAD * mean**2:  # cheap: wide layers end here
        return False
    squares = rows.square()
    off = squares - mean
    spread = float(off.square().mean(dtype=torch.float64))
    if variance - spread / n <= _SPREAD * mean**2:
        return False
    tails = float(off.pow(4).mean(dtype=torch.float64)) / max(spread**2, 1e-300) - 3
    freedom = (len(units.unique()) - 1) / (1 + max(tails, 0.0) / (2 * n))
    return n * variance > spread * float(chi2.isf(_SIX_SIGMA, freedom)) / freedom


def uneven_columns(weight: Tensor) -> bool:
    """The same of what its units read: weights [out, in, ...] by input."""
    if weight.ndim < 2 or not uneven_rows(weight.transpose(0, 1)):
        return False
    if not repeats(weight):
        return True
    rows = torch.unique(weight.detach().flatten(1), dim=0)  # copies are no draws of their own
    return uneven_rows(rows.reshape(-1, *weight.shape[1:]).transpose(0, 1))


def _mirrored(source: fx.Node) -> bool:
    queue, found = [source], set[fx.Node]()
    while queue:
        one = queue.pop()
        if one not in found:
            found.add(one)
            queue += one.all_input_nodes
    sums = any(operation_name(one) in ("add", "sub", "rsub") for one in found)
    return sums and any(operation_name(one) in _MIRRORS for one in found)


def repeats(weight: Tensor) -> bool:
    """Whether two rows are one and the same, other than zero (a pixel shuffle's ICNR initialization)."""
    if weight.is_meta or weight.is_complex() or weight.ndim < 2 or not any(weight.stride()):
        return False
    rows = weight.detach().flatten(1)
    rows = rows[(rows != 0).any(1)]
    if rows.shape[1] < 2 or not _same_marks(rows.float()):  # cheap; rounding may make two rows look alike
        return False
    return _same_marks(rows.double())


def _same_marks(rows: Tensor) -> bool:
    marks = rows @ torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).sqrt()
    return bool((marks.sort()[0].diff() == 0).any())


@lru_cache
def _four_sigma(freedom: int) -> float:
    """Quantile of Student's law that a normal variable's four standard deviations are."""
    return float(stdtrit(freedom, ndtr(4.0)))
