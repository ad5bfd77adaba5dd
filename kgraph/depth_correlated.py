"""Weights that are correlated across depth, and the mean-field law of a residual chain made of them.

A path is one weight entry seen as a function of the layer: Gaussian, of variance 1 in every layer, with the
autocovariance of its generator. Entries are independent of one another.

    rbf   increments of a Gaussian process of covariance exp(-u^2 / (2 l^2)), l^2 = .01, at L + 1 points of [0, 1],
          renormalized: r(k) -> (1 - u^2/l^2) exp(-u^2 / (2 l^2)), u = k / L
    fbm   increments of a fractional Brownian motion of Hurst index H (fractional Gaussian noise):
          r(k) = ((k+1)^2H - 2 k^2H + (k-1)^2H) / 2, hence r(1) = 2^(2H-1) - 1

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929; Davies and Harte 1987, Biometrika 74.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from kgraph.errors import InputError

DepthWeights = Literal["iid", "rbf", "fbm"]
RBF_VARIANCE = 0.01
"""l^2 of the RBF process."""
STORED = 2500
"""Depth up to which the law of gradients is computed: it needs the covariances of all pairs of layers."""
_CHUNK = 1 << 22
"""Numbers of one Fourier transform."""

Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q1, q2, cov) -> (E[phi phi], E[phi' phi']), as `kgraph.maps.Pointwise.dual`."""


def check_generator(weights: str, hurst: float | None) -> None:
    """Refuse an unknown generator, and a Hurst index where none belongs or outside (0, 1)."""
    if not isinstance(weights, str) or weights not in ("iid", "rbf", "fbm"):
        raise InputError(f"weights is {weights!r}", hint="Choose 'iid', 'rbf' or 'fbm'")
    if weights == "fbm" and (hurst is None or not 0 < hurst < 1):
        raise InputError(f"hurst is {hurst}", hint="weights='fbm' needs a Hurst index in (0, 1)")
    if weights != "fbm" and hurst is not None:
        raise InputError(f"hurst is an option of weights='fbm', not of {weights!r}", hint="Leave it out")


def autocovariance(weights: DepthWeights, length: int, hurst: float | None = None) -> Tensor:
    """r(0), ..., r(length): covariance of an entry with itself k layers on; r(0) = 1.

    Shapes: [length + 1], float64. Exact at every length, not the limit of many layers.
    """
    check_generator(weights, hurst)
    k = torch.arange(length + 1, dtype=torch.float64)
    if weights == "rbf":
        raw = 2 * _rbf(k, length) - _rbf(k + 1, length) - _rbf(k - 1, length)
        return raw / raw[0]
    if weights == "fbm":
        assert hurst is not None
        two = 2 * hurst
        return ((k + 1) ** two - 2 * k**two + (k - 1).abs() ** two) / 2
    return (k == 0).double()


def _rbf(k: Tensor, length: int) -> Tensor:
    """exp(-(k/length)^2 / (2 l^2)) - 1: differences of neighbours keep their digits."""
    return torch.expm1(-((k / length) ** 2) / (2 * RBF_VARIANCE))


def draw_paths(
    weights: DepthWeights, length: int, entries: int, generator: Generator, hurst: float | None = None
) -> Tensor:
    """``entries`` independent Gaussian paths over ``length`` layers with exactly the generator's autocovariance.

    Circulant embedding (Davies-Harte): the autocovariance, laid on a circle of 2 length places, has the Fourier
    transform lambda >= 0; the real and imaginary parts of fft(sqrt(lambda / n) (a + i b)) are two such paths.

    Shapes: [length, entries], float64. Cost: O(length log length) an entry.
    """
    r = autocovariance(weights, length, hurst)
    if weights == "iid":
        return torch.randn(length, entries, generator=generator, dtype=torch.float64)
    circle = torch.cat([r, r[1:-1].flip(0)]) if length > 1 else r
    spectrum = torch.fft.fft(circle.to(torch.complex128)).real
    if float(spectrum.min()) < -1e-9 * float(spectrum.max()):
        raise InputError(f"no circulant embedding of {weights} over {length} layers", hint="Report this depth")
    root = (spectrum.clamp_min(0) / len(circle)).sqrt()[:, None]
    pairs = max(1, _CHUNK // len(circle))
    drawn = [
        _two_each(root, min(pairs, -(-(entries - start) // 2)), generator)[:length]
        for start in range(0, entries, 2 * pairs)
    ]
    return torch.cat(drawn, 1)[:, :entries]


def _two_each(root: Tensor, pairs: int, generator: Generator) -> Tensor:
    noise = torch.randn(2, len(root), pairs, generator=generator, dtype=torch.float64)
    waves = torch.fft.fft(root * torch.complex(noise[0], noise[1]), dim=0)
    return torch.cat([waves.real, waves.imag], 1)


def displacement_exponent(weights: DepthWeights, hurst: float | None, law: str) -> float:
    """x of displacement ~ L^(x - beta), so that beta = x is the scaling of a non-trivial limit.

    Args:
        law: how the branch's last affine layer is fed: "fixed" (by a function of h alone: x = H), "centred" (by an
            odd function of other weights: x = max(2H - 1, 1/2)), "positive" (by one of nonzero mean:
            x = max(H, 1/2)), or "drift" (its output is rectified, and the means of all layers add up: x = 1).

    iid weights are those of H = 1/2; rbf paths are smooth, H = 1.
    Source: arXiv 2206.06929 for "fixed" and "positive"; the others by the same count of correlated pairs of layers.
    """
    check_generator(weights, hurst)
    h = {"iid": 0.5, "rbf": 1.0}.get(weights, hurst or 0.5)
    if weights == "iid" and law != "drift":
        return 0.5
    return {"fixed": h, "centred": max(2 * h - 1, 0.5), "positive": max(h, 0.5), "drift": 1.0}[law]


@dataclass(frozen=True)
class ChainLaw:
    """Mean squares of |h_l - h_0| / |h_0| and |p_l - p_L| / |p_L| (p = dL/dh) at infinite width.

    Attributes:
        forward: [L + 1], from h_0 on.
        backward: [L + 1], from p_0 to p_L = 0; not a number beyond `STORED` layers of correlated weights.
    """

    forward: Tensor
    backward: Tensor


def chain_law(
    dual: Dual, r_outer: Tensor, r_inner: Tensor | None, length: int, alpha: float, outer: float, inner: float, q: float
) -> ChainLaw:
    """Law of h_{l+1} = h_l + alpha V_l phi(W_l h_l), or of phi(h_l) where ``r_inner`` is None.

        D(s, t) = E[(h_s - h_0)(h_t - h_0)] = alpha^2 sum_{a<s, b<t} outer r_V(a - b) G(a, b)
        G(a, b) = E[phi(z_a) phi(z_b)],  cov(z_a, z_b) = inner r_W(a - b) (q + D(a, b))

    Conditional on the past every h_l is Gaussian at infinite width, correlated weights included, which closes D. The
    gradients follow the same recursion backwards with r_V r_W E[phi' phi']; there, that forward and backward
    weights are independent is exact for independent layers and holds to first order in alpha^2 otherwise.

    Args:
        dual: Gaussian integrals of phi.
        r_outer, r_inner: autocovariances r(0..L) of V and W.
        outer, inner: variances of V and W times fan-in.
        q: mean square of h_0, Gaussian.

    Cost: length^2 evaluations of ``dual``, by rows; length of them where the layers are independent.
    """
    if not bool(r_outer[1:length].any()) and (r_inner is None or not bool(r_inner[1:length].any())):
        return _independent(dual, length, alpha**2 * outer, inner if r_inner is not None else 1.0, q)
    r_w = torch.ones_like(r_outer) if r_inner is None else inner * r_inner
    gain = alpha**2 * outer
    row, diagonal = torch.zeros(1, dtype=torch.float64), [0.0]  # D(s, 0..s)
    slopes: list[Tensor] = []
    q_at = torch.full((length + 1,), q, dtype=torch.float64)
    for s in range(length):
        lags = torch.arange(s, -1, -1)
        value, slope = dual(r_w[0] * q_at[s], r_w[0] * q_at[: s + 1], r_w[lags] * (q + row))
        below = torch.cumsum(gain * r_outer[lags] * value, 0)
        nxt = torch.cat([row.new_zeros(1), _column(row) + below])  # D(s+1, t+1) = D(s, t+1) + ...
        last = float(nxt[-2] + below[-1]) if s else float(below[-1])  # D(s, s+1) = D(s+1, s), which nxt holds
        row = torch.cat([nxt[:-1], row.new_tensor([last])])
        diagonal.append(last)
        q_at[s + 1] = q + last
        if length <= STORED:
            slopes.append(slope * r_outer[lags] * r_w[lags] * gain)
    forward = torch.tensor(diagonal, dtype=torch.float64) / q
    return ChainLaw(forward, _backward(slopes, length) if slopes else torch.full_like(forward, math.nan))


def _column(row: Tensor) -> Tensor:
    """D(s, 1..s+1) without its last entry, which the caller fills in."""
    return torch.cat([row[1:], row.new_zeros(1)])


def _independent(dual: Dual, length: int, gain: float, inner: float, q: float) -> ChainLaw:
    """q' = q + alpha^2 q_branch and its derivative: nothing but the diagonal is needed."""
    forward, factors = [q], []
    for _ in range(length):
        level = torch.tensor(inner * forward[-1], dtype=torch.float64)
        value, slope = dual(level, level, level)
        forward.append(forward[-1] + gain * float(value))
        factors.append(1 + gain * inner * float(slope))
    grown = torch.tensor([1.0, *factors[::-1]], dtype=torch.float64).cumprod(0).flip(0)
    return ChainLaw(torch.tensor(forward, dtype=torch.float64) / q - 1, grown - 1)


def _backward(slopes: list[Tensor], length: int) -> Tensor:
    """The recursion of `chain_law` for gradients: ``slopes[s][t]`` is alpha^2 r_V r_W E[phi' phi'](s, t), t <= s."""
    full = torch.zeros(length, length, dtype=torch.float64)
    for s, values in enumerate(slopes):
        full[s, : s + 1] = values
        full[: s + 1, s] = values
    full = full.flip(0, 1)  # from the last layer on
    row, diagonal = torch.zeros(1, dtype=torch.float64), [0.0]
    for s in range(length):
        below = torch.cumsum(full[s, : s + 1] * (1 + row), 0)
        nxt = torch.cat([row.new_zeros(1), _column(row) + below])
        last = float(nxt[-2] + below[-1]) if s else float(below[-1])
        row = torch.cat([nxt[:-1], row.new_tensor([last])])
        diagonal.append(last)
    return torch.tensor(diagonal, dtype=torch.float64).flip(0)
