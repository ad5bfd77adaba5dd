"""Networks of a chain's law, drawn many at a time: units z, NTK over units H, and contractions of its derivative dH.

H comes layer by layer, H' = 1 (lambda_b + lambda_W |s|^2 / n) + (W phi') H (W phi')^T with s = phi(z), which is
the sum over parameters itself; dH by nested forward derivatives of the drawn networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.func import jvp, vjp, vmap

from kgraph.maps import Pointwise
from kgraph.maps.quadrature import value_and_slope
from kgraph.studies.finite_width.chain import ChainLayer
from kgraph.studies.finite_width.recursion import jumps

Parameters = list[tuple[Tensor, Tensor]]
"""(W, b) of every layer."""
Progress = Callable[[int, int], None]
STATISTICS = ("z z", "zi zi zj zj", "Hii", "Hii Hjj", "Hii zj zj", "Hij Hij", "Hij zi zj", "dHijj zi", "dHiij zj")
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


def derivative_statistics(
    layers: Sequence[ChainLayer], parameters: Parameters, x: Tensor, parametrization: str
) -> Tensor:
    """The last two `STATISTICS` at the last of ``layers``, [draws, 2].

    With v_j = lambda grad z_j: dH_ijj = D^2 z_i [v_j, v_j] and sum_j dH_iij z_j = D^2 z_i [v_i, sum_j z_j v_j], each a
    forward derivative of a forward derivative (`torch.func.jvp`), for all draws and units at once (`vmap`).
    """
    rates = [layer.learning_rates(parametrization) for layer in layers]
    gains = [(lambda_W / layer.width_in, lambda_b) for layer, (lambda_W, lambda_b) in zip(layers, rates, strict=True)]

    def network(own: Parameters) -> Tensor:
        z = x
        for index, (layer, (W, b)) in enumerate(zip(layers, own, strict=True)):
            z = W @ (layer.phi.fn(z) if index else z) + b
        return z

    def second(own: Parameters, v: Parameters, w: Parameters) -> Tensor:
        """D^2 z [v, w]."""
        return jvp(lambda p: jvp(network, (p,), (v,))[1], (own,), (w,))[1]

    def one(own: Parameters) -> Tensor:
        z, pullback = vjp(network, own)[:2]
        (gradients,) = vmap(pullback)(torch.eye(len(z), dtype=z.dtype))
        v = [(g_W * W, g_b * b) for (g_W, g_b), (W, b) in zip(gains, gradients, strict=True)]
        w = [(_others(z, W), _others(z, b)) for W, b in v]
        twice = [(torch.cat([W, W]), torch.cat([b, b])) for W, b in v]
        both = [(torch.cat([W, X]), torch.cat([b, c])) for (W, b), (X, c) in zip(v, w, strict=True)]
        same, mixed = vmap(second, (None, 0, 0))(own, twice, both).chunk(2)  # D^2 z_i [v_j, v_j], D^2 z_i [v_j, w_j]
        pairs = len(z) * (len(z) - 1) or math.nan
        p = ((same * z).sum() - (same.diagonal() * z).sum()) / pairs
        return torch.stack([p, mixed.diagonal().sum() / pairs])

    return vmap(one)(parameters)


def _others(z: Tensor, v: Tensor) -> Tensor:
    """``sum_{j != i} z_j v_j`` for every i."""
    weighted = v * z.reshape(-1, *(1 for _ in v.shape[1:]))
    return weighted.sum(0) - weighted


def second_derivative_is_seen(phi: Pointwise, K: float) -> bool:
    """Whether differentiating phi twice by rule misses nothing that counts: no jump of phi' except at phi(0) = 0."""
    plan, root = phi.plan(K), torch.tensor(K, dtype=torch.float64).sqrt()
    if not len(plan.kinks):
        return True
    size = float(value_and_slope(phi.fn, root * torch.linspace(-2, 2, 41, dtype=torch.float64))[1].abs().max())
    bent = jumps(lambda z: value_and_slope(phi.fn, z)[1], plan, root, size)
    at = plan.kinks[bent]
    with torch.no_grad():
        return not bool(((at.abs() > 1e-9) | (phi.fn(at).abs() > 1e-9)).any())


class Sampler:
    """Draws networks in batches and takes their statistics.

    Args:
        layers: of the chain.
        wanted: indices of the layers whose dH is wanted too.
        q: |x|^2 / dimension of the one input, whose direction is drawn.
        parametrization: of H.
        seed: of all draws.
    """

    def __init__(
        self, layers: Sequence[ChainLayer], wanted: list[int], q: float, parametrization: str, seed: int
    ) -> None:
        self.layers, self.wanted, self.parametrization = layers, wanted, parametrization
        self.generator = Generator().manual_seed(seed)
        x = torch.randn(layers[0].width_in, generator=self.generator, dtype=torch.float64)
        self.x = x * torch.sqrt(q / x.square().mean())

    def run(self, draws: int, progress: Progress | None) -> Tensor:
        """[draws, layers, 9]: columns `STATISTICS`, nan where dH is not wanted."""
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
        other = torch.full((*own.shape[:2], 2), math.nan, dtype=torch.float64)
        for index in self.wanted:
            other[:, index] = self._derivatives(index + 1, parameters)
        return torch.cat([own, other], -1)

    def _derivatives(self, depth: int, parameters: Parameters) -> Tensor:
        layers, own = self.layers[:depth], parameters[:depth]
        # every output unit has its own direction through all weights, and nesting keeps a few of each
        directions = 12 * layers[-1].width_out * sum(layer.width_in * layer.width_out for layer in layers)
        step = max(1, _NUMBERS // directions)
        draws = len(own[0][0])
        pieces = [[(W[low : low + step], b[low : low + step]) for W, b in own] for low in range(0, draws, step)]
        return torch.cat([derivative_statistics(layers, piece, self.x, self.parametrization) for piece in pieces])
