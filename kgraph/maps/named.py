"""The usual activation functions by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kgraph.errors import InputError
from kgraph.maps.closed import closed_form
from kgraph.maps.pointwise import Pointwise

Function = Callable[[Tensor], Tensor]


def _leaky_relu(negative_slope: float = 0.01) -> Function:
    return lambda u: torch.where(u > 0, u, negative_slope * u)


def _monomial(degree: float) -> Function:
    return lambda u: u ** int(degree)


def _bent_identity(u: Tensor) -> Tensor:
    return (torch.sqrt(u * u + 1) - 1) / 2 + u


_PLAIN: dict[str, Function] = {
    "identity": lambda u: u,
    "relu": torch.relu,
    "abs": torch.abs,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "square": torch.square,
    "sign": torch.sign,
    "step": lambda u: (u > 0).to(u.dtype),
    "heaviside": lambda u: (u > 0).to(u.dtype),
    "gelu": lambda u: functional.gelu(u, approximate="tanh"),
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "gelu_exact": functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "silu": functional.silu,
    "swish": functional.silu,
    "mish": functional.mish,
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "softsign": functional.softsign,
    "bentid": _bent_identity,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "hardtanh": functional.hardtanh,
    "relu6": functional.relu6,
    "logsigmoid": functional.logsigmoid,
    "tanhshrink": functional.tanhshrink,
    "exp": torch.exp,
}
_WITH_PARAMS: dict[str, Callable[..., Function]] = {
    "leaky_relu": _leaky_relu,
    "monomial": _monomial,
    "elu": lambda alpha: lambda u: functional.elu(u, alpha),
    "celu": lambda alpha: lambda u: functional.celu(u, alpha),
    "hardshrink": lambda lambd=0.5: lambda u: functional.hardshrink(u, lambd),
    "softshrink": lambda lambd=0.5: lambda u: functional.softshrink(u, lambd),
}
NAMES = tuple(sorted({*_PLAIN, *_WITH_PARAMS}))


def pointwise(name: str, *params: float) -> Pointwise:
    """The named function as a `Pointwise`, with its closed form where one is known.

    "gelu" is the tanh approximation, "gelu_exact" is ``u Phi(u)`` (PyTorch's default). Parameters are
    positional: ``pointwise("leaky_relu", .1)``, ``pointwise("monomial", 3)``.

    Raises:
        InputError: unknown name, or parameters for a function that has none.
    """
    if name in _WITH_PARAMS and (params or name not in _PLAIN):
        return Pointwise(_WITH_PARAMS[name](*params), closed_form(name, *params))
    if name not in _PLAIN:
        raise InputError(f"No activation is called '{name}'", hint=f"Known: {', '.join(NAMES)}; or pass a callable")
    if params:
        raise InputError(f"'{name}' takes no parameters")
    return Pointwise(_PLAIN[name], closed_form(name))


def relu() -> Pointwise:
    """``max(u, 0)``."""
    return pointwise("relu")


def leaky_relu(negative_slope: float = 0.01) -> Pointwise:
    """``u`` for u > 0, ``negative_slope * u`` else."""
    return pointwise("leaky_relu", negative_slope)
