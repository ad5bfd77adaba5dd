"""Networks of a chain's law, drawn many at a time: units z, NTK over units H, and contractions of its derivatives.

H comes layer by layer, H' = 1 (lambda_b + lambda_W |s|^2 / n) + (W phi') H (W phi')^T with s = phi(z), which is
the sum over parameters itself; dH and ddH by `kgraph.studies.finite_width.derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from kgraph.maps import Pointwise
from kgraph.maps.quadrature import value_and_slope
from kgraph.studies.finite_width.chain import ChainLayer
from kgraph.studies.finite_width.derivatives import DERIVED, Parameters, derivative_statistics, numbers
from kgraph.studies.finite_width.recursion import jumps

Progress = Callable[[int, int], None]
STATISTICS = ("z z", "zi zi zj zj", "Hii", "Hii Hjj", "Hii zj zj", "Hij Hij", "Hij zi zj", *DERIVED)
"""Means over units, or over pairs i != j, of one network."""
_NUMBERS = 1 << 25
"""Numbers held at once by the draws of one batch."""


def draw_parameters(layers: Sequence[ChainLayer], draws: int, generator: Generator) -> Parameters:
    """W [draws, out, in] of variance C_W / in, Haar orthogonal or Gaussian, and b [draws, out] of variance C_b."""
    return [(_matrices(layer, draws, generator), _biases(layer, draws, generator)) for layer in layers]


def _matrices(layer: ChainLayer, draws: int, generator: Generator) -> Tensor:
    rows, cols = layer.width_out, layer.width_in
    long, short = max(rows, cols), min(rows, cols)
    if layer.law == "gaussian":
        return _normal((draws, rows, cols), generator) * math.sqrt(layer.C_W / cols)
    q, r = torch.linalg.qr(_normal((draws, long, short), generator))
    q = q * torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None]  # without the signs it is not Haar's law
    return (q if rows >= cols else q.mT) * math.sqrt(layer.C_W * max(1.0, rows / cols))


def _biases(layer: ChainLayer, draws: int, generator: Generator) -> Tensor:
    if not layer.C_b:
        return torch.zeros(draws, layer.width_out, dtype=torch.float64)
    return _normal((draws, layer.width_out), generator) * math.sqrt(layer.C_b)


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer_statistics(layers: Sequence[ChainLayer], parameters: Parameters, x: Tensor, parametrization: str) -> Tensor:
    """The first seven `STATISTICS` of every layer and draw, [draws, layers, 7]."""
    z = H = torch.zeros(())
    rows = []
    for index, (layer, (W, b)) in enumerate(zip(layers, parameters, strict=True)):
        lambda_W, lambda_b = layer.learning_rates(parametrization)
        if index:
            s, slope = value_and_slope(layer.phi.fn, z)
            J = W * slope[:, None]
            H = J @ H @ J.mT
        else:
            s = x.expand(len(W), -1)
            H = torch.zeros(len(W), layer.width_out, layer.width_out, dtype=torch.float64)
        z = (W @ s[..., None])[..., 0] + b
        own = lambda_b + lambda_W * s.square().mean(-1)
        H = H + own[:, None, None] * torch.eye(layer.width_out, dtype=torch.float64)
        rows.append(_statistics(z, H))
    return torch.stack(rows, 1)


def _statistics(z: Tensor, H: Tensor) -> Tensor:
    n = z.shape[-1]
    h, z2 = H.diagonal(dim1=1, dim2=2), z.square()
    pairs = n * (n - 1) or math.nan  # a single unit has no other

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (a.sum(-1) * b.sum(-1) - (a * b).sum(-1)) / pairs

    squares = (H.square().sum((1, 2)) - h.square().sum(-1)) / pairs
    crossed = ((z[:, None] @ H @ z[..., None])[:, 0, 0] - (h * z2).sum(-1)) / pairs
    return torch.stack([z2.mean(-1), apart(z2, z2), h.mean(-1), apart(h, h), apart(h, z2), squares, crossed], -1)


def derivatives_are_seen(phi: Pointwise, K: float, third: bool) -> bool:
    """Whether differentiating phi by rule misses nothing that counts.

    Twice: no jump of phi' except at phi(0) = 0. For ``third``, where phi'' is squared and differentiated: no kink.
    """
    plan, root = phi.plan(K), torch.tensor(K, dtype=torch.float64).sqrt()
    if third or not len(plan.kinks):
        return not len(plan.kinks)
    size = float(value_and_slope(phi.fn, root * torch.linspace(-2, 2, 41, dtype=torch.float64))[1].abs().max())
    bent = jumps(lambda z: value_and_slope(phi.fn, z)[1], plan, root, size)
    at = plan.kinks[bent]
    with torch.no_grad():
        return not bool(((at.abs() > 1e-9) | (phi.fn(at).abs() > 1e-9)).any())


class Sampler:
    """Draws networks in batches and takes their statistics.

    Args:
        layers: of the chain.
        wanted: indices of the layers whose dH is wanted too, and whether ddH is.
        q: |x|^2 / dimension of the one input, whose direction is drawn.
        parametrization: of H.
        seed: of all draws.
    """

    def __init__(
        self, layers: Sequence[ChainLayer], wanted: dict[int, bool], q: float, parametrization: str, seed: int
    ) -> None:
        self.layers, self.wanted, self.parametrization = layers, wanted, parametrization
        self.generator = Generator().manual_seed(seed)
        x = torch.randn(layers[0].width_in, generator=self.generator, dtype=torch.float64)
        self.x = x * torch.sqrt(q / x.square().mean())

    def run(self, draws: int, progress: Progress | None) -> Tensor:
        """[draws, layers, 13]: columns `STATISTICS`, nan where dH or ddH is not wanted."""
        weights = sum(layer.width_in * layer.width_out for layer in self.layers)
        step = max(1, _NUMBERS // (4 * weights))
        parts: list[Tensor] = []
        for low in range(0, draws, step):
            size = min(step, draws - low)
            parts.append(self._batch(draw_parameters(self.layers, size, self.generator)))
            if progress is not None:
                progress(low + size, draws)
        return torch.cat(parts)

    def _batch(self, parameters: Parameters) -> Tensor:
        own = layer_statistics(self.layers, parameters, self.x, self.parametrization)
        other = torch.full((*own.shape[:2], len(DERIVED)), math.nan, dtype=torch.float64)
        for index, third in self.wanted.items():
            other[:, index] = self._derivatives(index + 1, third, parameters)
        return torch.cat([own, other], -1)

    def _derivatives(self, depth: int, third: bool, parameters: Parameters) -> Tensor:
        layers, own = self.layers[:depth], parameters[:depth]
        step = max(1, _NUMBERS // numbers(layers, third))
        draws = len(own[0][0])
        pieces = [[(W[low : low + step], b[low : low + step]) for W, b in own] for low in range(0, draws, step)]
        return torch.cat([derivative_statistics(layers, p, self.x, self.parametrization, third) for p in pieces])
