"""One pass forward, one saved tensor: y = s (phi(a u + b) + c) of the activations whose derivative one tensor tells.

    dy/du = s a phi'(x),   x = a u + b,   t = phi(x) = y / s - c

phi' of relu, leaky relu, tanh and sigmoid is a function of t, which is told from the output y: the layer that reads
it keeps y anyway. gelu, silu and softplus need x, which is told from the input u. Written as a chain of operations,
t is a third tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

aten = torch.ops.aten
Constants = tuple[float, float, float, float]
"""a, b, c, s."""


@dataclass(frozen=True)
class Fusible:
    """An activation and its derivative.

    Attributes:
        apply: phi(x), in the memory of x if the second argument says so.
        slope: g phi', of g and what is kept.
        keeps_output: whether that is t; else it is x.
        sign_only: whether phi' asks for no more than the sign of t.
    """

    apply: Callable[[Tensor, bool], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool
    sign_only: bool = False


def _relu() -> Fusible:
    return Fusible(
        lambda x, own: torch.relu_(x) if own else torch.relu(x),
        lambda g, t: aten.threshold_backward(g, t, 0),
        keeps_output=True,
        sign_only=True,
    )


def _leaky_relu(negative_slope: float = 0.01) -> Fusible | None:
    if negative_slope < 0:  # the output's sign does not tell the input's
        return None
    return Fusible(
        lambda x, own: functional.leaky_relu(x, negative_slope, own),
        lambda g, t: aten.leaky_relu_backward(g, t, negative_slope, True),
        keeps_output=True,
        sign_only=True,
    )


def _tanh() -> Fusible:
    return Fusible(lambda x, own: torch.tanh_(x) if own else torch.tanh(x), aten.tanh_backward, keeps_output=True)


def _sigmoid() -> Fusible:
    return Fusible(
        lambda x, own: torch.sigmoid_(x) if own else torch.sigmoid(x), aten.sigmoid_backward, keeps_output=True
    )


def _silu() -> Fusible:
    return Fusible(lambda x, own: functional.silu(x, inplace=own), _silu_slope, keeps_output=False)


def _silu_slope(g: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(g, x)
    s = torch.sigmoid(x)  # torch's operator has no derivative
    return g * s * (1 + x * (1 - s))


def _gelu(approximate: str = "none") -> Fusible:
    return Fusible(
        lambda x, own: functional.gelu(x, approximate=approximate),
        lambda g, x: aten.gelu_backward(g, x, approximate=approximate),
        keeps_output=False,
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Fusible:
    return Fusible(
        lambda x, own: functional.softplus(x, beta, threshold),
        lambda g, x: aten.softplus_backward(g, x, beta, threshold),
        keeps_output=False,
    )


_OF_MODULES: Mapping[type, Callable[[Any], Fusible | None]] = {
    nn.ReLU: lambda m: _relu(),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.Tanh: lambda m: _tanh(),
    nn.Sigmoid: lambda m: _sigmoid(),
    nn.SiLU: lambda m: _silu(),
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
}
_OF_FUNCTIONS: Mapping[Any, Callable[..., Fusible | None]] = {
    aten.relu.default: _relu,
    aten.leaky_relu.default: _leaky_relu,
    aten.tanh.default: _tanh,
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
}


def fusible_module(module: nn.Module) -> Fusible | None:
    """What is known of one of torch's own activations (not of what is derived from them), else None."""
    made = _OF_MODULES.get(type(module))
    return None if made is None else made(module)


def fusible_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fusible | None:
    """The same of an operator and what follows its tensor."""
    made = _OF_FUNCTIONS.get(function)
    return None if made is None else made(*args, **kwargs)


def runs_eagerly(x: object) -> bool:
    """Whether x is a tensor of real numbers, computed now: tracers and compilers get the chain of operations."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def fused(u: Tensor, phi: Fusible, constants: Constants) -> Tensor:
    """``s (phi(a u + b) + c)``, in float32 or float64."""
    y: Tensor = _Fused.apply(u, phi, constants)  # type: ignore[assignment]
    return y


def _forward(u: Tensor, phi: Fusible, constants: Constants) -> Tensor:
    a, b, c, s = constants
    if phi.sign_only and b == 0 and a > 0:  # a phi(u)
        y, a = phi.apply(u, False), s * a
        return _image(y, a, s * c, own=True)
    x = _image(u, a, b, own=False)
    return _image(phi.apply(x, x is not u), s, s * c, own=True)


def _image(x: Tensor, scale: float, shift: float, *, own: bool) -> Tensor:
    """``scale x + shift``, in the memory of x if ``own``: on a CPU new memory costs more than arithmetic."""
    if shift == 0:
        return x if scale == 1 else x.mul_(scale) if own else x * scale
    number = torch.full((), shift, dtype=x.dtype, device="cpu")  # fits any tensor, whatever the default device is
    there = x if own and x.device.type == "cpu" else None
    return torch.add(number, x, alpha=scale, out=there)


def _kept_output(phi: Fusible, constants: Constants) -> bool:
    _, _, c, s = constants
    if phi.sign_only:
        return phi.keeps_output and c == 0 and s > 0
    return phi.keeps_output and abs(c) <= 1  # y / s - c loses the digits of t where c is large


class _Fused(torch.autograd.Function):
    """Twice differentiable, forward and backward, under `torch.func` as well."""

    @staticmethod
    def forward(u: Tensor, phi: Fusible, constants: Constants) -> Tensor:
        return _forward(u, phi, constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Fusible, Constants], output: Tensor) -> None:
        u, ctx.phi, ctx.constants = inputs
        kept = output if _kept_output(ctx.phi, ctx.constants) else u
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _times_slope(ctx, grads[0]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _times_slope(ctx, tangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        u, phi, constants = args
        return fused(u, phi, constants), in_dims[0]


def _times_slope(ctx: Any, g: Tensor) -> Tensor:
    """``s a phi' g``."""
    phi, (a, b, c, s), (kept,) = ctx.phi, ctx.constants, ctx.saved_tensors
    if not _kept_output(phi, ctx.constants):
        x = _image(kept, a, b, own=False)
        kept = phi.apply(x, False) if phi.keeps_output else x
    elif not phi.sign_only:
        kept = _image(kept, 1 / s, -c, own=False)
    product = phi.slope(g, kept)
    return product if s * a == 1 else product.mul_(s * a)


__all__ = ["Fusible", "fused", "fusible_function", "fusible_module", "runs_eagerly"]
