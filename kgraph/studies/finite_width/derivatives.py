"""Contractions of the derivative tensors of the NTK, dH and ddH, along the gradients of a chain's units.

Every contraction is along directions v_j = lambda grad z_j of parameter space, which are of rank one in each matrix:

    v_j: W_l += g_l delta_l^j s_l^T,  b_l += lambda_b delta_l^j,    delta_l^j = dz_j/dz_l, s_l = phi(z_(l-1)),
    g_l = lambda_W / n

so a network at theta + sum_j t_j v_j costs no more than one at theta, and dH, ddH are its derivatives by t at 0:

    dH_ijk = d2z_i/dt_j dt_k,    dd_I H_ijkl = d3z_i/dt_j dt_k dt_l,
    dd_II H_ijkl = <d(grad z_i)/dt_k, lambda d(grad z_j)/dt_l>

Source: Roberts, Yaida, Hanin 2022, arXiv 2106.10165, chapter "The end of training" (dNTK, the two ddNTKs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from kgraph.studies.finite_width.chain import ChainLayer

Parameters = list[tuple[Tensor, Tensor]]
"""(W, b) of every layer."""
Gain = tuple[float, float]
"""(lambda_W / n, lambda_b)."""
Function = Callable[[Tensor], Tensor]
DERIVED = ("dHijj zi", "dHiij zj", "ddIHiijj", "ddIIHiijj", "ddIIHijij", "ddIIHijji")
"""Means over pairs of units i != j of one network."""


def derivative_statistics(
    layers: Sequence[ChainLayer], parameters: Parameters, x: Tensor, parametrization: str, third: bool = False
) -> Tensor:
    """`DERIVED` at the last of ``layers``, [draws, 6]; the four of ddH are nan unless ``third``.

    By nested forward derivatives (`torch.func.jvp`), for all draws and units at once (`vmap`).
    """
    rates = [layer.learning_rates(parametrization) for layer in layers]
    gains = [(lambda_W / layer.width_in, lambda_b) for layer, (lambda_W, lambda_b) in zip(layers, rates, strict=True)]

    def one(own: Parameters) -> Tensor:
        line = _Line(layers, own, x, gains)
        missing = torch.full((4,), math.nan, dtype=torch.float64)
        return torch.cat([line.dntk(), line.ddntk() if third else missing])

    return vmap(one)(parameters)


def numbers(layers: Sequence[ChainLayer], third: bool) -> int:
    """About how many numbers `derivative_statistics` holds at once for one draw."""
    units, widest = layers[-1].width_out, max(max(layer.width_in, layer.width_out) for layer in layers)
    if not third:
        return 24 * units * widest
    return units**2 * (16 * widest + 8 * sum(layer.width_in + layer.width_out for layer in layers))


class _Line:
    """One network at theta + sum_j t_j v_j, as a function of t."""

    def __init__(self, layers: Sequence[ChainLayer], own: Parameters, x: Tensor, gains: list[Gain]) -> None:
        self.layers, self.own, self.x, self.gains = layers, own, x, gains
        self.inputs: list[Tensor] = []
        self.slopes: list[Tensor] = []
        units = layers[-1].width_out
        self.eye = torch.eye(units, dtype=torch.float64)
        self.pairs = units * (units - 1) or math.nan  # a single unit has no other
        self.origin = torch.zeros(units, dtype=torch.float64)
        self.slopes, self.inputs = self.gradients(self.origin)
        self.z = self.units(self.origin)

    def run(self, t: Tensor, shifts: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """z at t, every layer's units shifted by ``shifts``, and the inputs s_l of the layers."""
        z, inputs = self.x, []
        for index, (layer, (W, b), (g_W, g_b)) in enumerate(zip(self.layers, self.own, self.gains, strict=True)):
            s = layer.phi.fn(z) if index else z
            inputs.append(s)
            z = W @ s + b
            if self.slopes:
                z = z + (t @ self.slopes[index]) * (g_W * (self.inputs[index] @ s) + g_b)
            if shifts is not None:
                z = z + shifts[index]
        return z, inputs

    def units(self, t: Tensor) -> Tensor:
        return self.run(t)[0]

    def gradients(self, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """delta_l [units, n_l] and s_l [n_(l-1)] of every layer at t: grad z_i by W_l is delta_l^i s_l^T."""
        shifts = [torch.zeros(layer.width_out, dtype=torch.float64) for layer in self.layers]
        pullback = vjp(lambda e: self.run(t, e)[0], shifts)[1]
        return vmap(pullback)(self.eye)[0], self.run(t)[1]

    def along(self, *directions: Tensor) -> Tensor:
        """The derivative of z by t along each of the directions in turn."""
        function = self.units
        for direction in directions:
            function = _derivative(function, direction)
        return function(self.origin)

    def dntk(self) -> Tensor:
        """Means of dH_ijj z_i and of dH_iij z_j."""
        others = self.z.expand_as(self.eye) * (1 - self.eye)
        both = vmap(self.along)(torch.cat([self.eye, self.eye]), torch.cat([self.eye, others]))
        same, mixed = both.chunk(2)  # d2z_i/dt_j^2 [j, i]; sum_k z_k d2z_i/dt_j dt_k
        p = ((same * self.z).sum() - (same.diagonal() * self.z).sum()) / self.pairs
        return torch.stack([p, mixed.diagonal().sum() / self.pairs])

    def ddntk(self) -> Tensor:
        """Means of dd_I H_iijj and of dd_II H_iijj, H_ijij, H_ijji."""
        off = 1 - self.eye
        count = len(self.z)
        i, j = self.eye.repeat_interleave(count, 0), self.eye.repeat(count, 1)
        third = vmap(lambda a, b: self.along(b, b, a) @ a)(i, j).reshape(count, count)
        means = [third, *(torch.zeros_like(third) for _ in range(3))]

        def turned(direction: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return jvp(self.gradients, (self.origin,), (direction,))[1]

        bent, moved = vmap(turned)(self.eye)  # d delta_l^i/dt_j [j, i, n_l], d s_l/dt_j [j, n_(l-1)]
        for delta, s, ddelta, ds, gain in zip(self.slopes, self.inputs, bent, moved, self.gains, strict=True):
            for k, order in enumerate(("ijij", "iijj", "ijji"), start=1):
                means[k] = means[k] + _products(order, delta, s, ddelta.transpose(0, 1), ds, gain)
        return torch.stack([(off * mean).sum() / self.pairs for mean in means])


def _derivative(function: Function, direction: Tensor) -> Function:
    return lambda t: jvp(function, (t,), (direction,))[1]


def _products(order: str, delta: Tensor, s: Tensor, bent: Tensor, moved: Tensor, gain: Gain) -> Tensor:
    """``<h_ab, lambda h_cd>`` of one layer for every i, j, ``order`` being abcd: "ijji" is <h_ij, h_ji>.

    h_ab = d(grad z_a)/dt_b = (d delta^a/dt_b) s^T + delta^a (ds/dt_b)^T for the matrix, d delta^a/dt_b for the bias.
    """
    a, b, c, d = order
    g_W, g_b = gain
    along = moved @ s
    out = torch.einsum(f"{a}{b}x,{c}{d}x->ij", bent, bent) * (g_W * (s @ s) + g_b)
    out = out + g_W * torch.einsum(f"{a}{b}x,{c}x,{d}->ij", bent, delta, along)
    out = out + g_W * torch.einsum(f"{a}x,{c}{d}x,{b}->ij", delta, bent, along)
    return out + g_W * torch.einsum(f"{a}{c},{b}{d}->ij", delta @ delta.mT, moved @ moved.mT)
