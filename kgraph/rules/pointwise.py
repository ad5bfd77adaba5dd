"""Pointwise functions of one random tensor: any operation PyTorch tags as pointwise, and shaped activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from kgraph import algebra
from kgraph.canonical import aten
from kgraph.how import assumed
from kgraph.kernel import Kernel
from kgraph.maps import Pointwise, closed_form, pointwise
from kgraph.modules import FunctionModule, Scale, ShapedActivation
from kgraph.rules.table import Context, drops, rule

_known: dict[Any, Pointwise] = {}


_UNTAGGED = {aten.hardswish.default, aten.log_sigmoid.default}
"""Pointwise operations that PyTorch 2.13 forgets to tag."""


def is_pointwise(target: object) -> bool:
    """Whether PyTorch itself says that an operation acts entry by entry, without random numbers of its own."""
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target in _UNTAGGED


COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
)
"""Operations that make another tensor of the same entries, or round them to another type."""


def _trunc(u: Tensor) -> Tensor:
    return u.trunc() if u.is_floating_point() else u.to(torch.float64)  # truth values have no fractions


_TRUNCATED, _NOT_ZERO = Pointwise(_trunc), Pointwise(lambda u: (u != 0).to(u.dtype))
_AS_NUMBER = Pointwise(lambda u: u.to(torch.float64))


def rounding_of(args: tuple[object, ...], kwargs: dict[str, object], node: fx.Node) -> Pointwise | None:
    """What a cast does to an entry: rounds towards 0, or to true and false; None where both types hold fractions."""
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
    source = node.args[0]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex:
        counted = dtype is not None and isinstance(before, Tensor) and not before.is_floating_point()
        return _AS_NUMBER if counted else None
    return _NOT_ZERO if dtype == torch.bool else _TRUNCATED


def apply_all(fn: Pointwise, x: Kernel) -> Kernel:
    """``fn`` on every channel group."""
    return x.with_parts(*(algebra.apply(fn, part) for part in x.parts))


def function_of(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Pointwise:
    """The map u -> target(..., u, ...) with ``u`` in place of argument ``index``; made once per function."""
    key = (target, args[:index], args[index + 1 :], tuple(sorted(kwargs.items())))
    if key not in _known:

        def fn(u: Tensor) -> Tensor:
            return target(*args[:index], u, *args[index + 1 :], **kwargs)

        _known[key] = Pointwise(fn, _closed(target, args[1:], kwargs) if index == 0 else None)
    return _known[key]


def leaky(negative_slope: float) -> Pointwise:
    """Leaky relu with its closed form."""
    return function_of(aten.leaky_relu.default, (None, negative_slope), {}, 0)


def _closed(target: object, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if target is aten.leaky_relu.default:
        return closed_form("leaky_relu", *(rest or (0.01,)))
    if target is aten.gelu.default:
        return closed_form("gelu_exact") if kwargs.get("approximate", "none") == "none" else None
    if target is aten.pow.Tensor_Scalar and rest and rest[0] in (2, 3):
        return closed_form("monomial", int(rest[0]))
    names: dict[Any, str] = {aten.relu.default: "relu", aten.abs.default: "abs", aten.erf.default: "erf"}
    names |= {aten.sin.default: "sin", aten.cos.default: "cos", aten.square.default: "square"}
    return closed_form(names[target]) if target in names else None


def unary(context: Context, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kernel:
    """Any pointwise operation with one random argument and numbers otherwise."""
    index = next(i for i, value in enumerate(args) if isinstance(value, Kernel))
    x: Kernel = args[index]
    return apply_all(function_of(target, args, kwargs, index), x)


def pointwise_of_module(module: nn.Module) -> Pointwise:
    """A parameter-free activation module as a pointwise map, with its closed form where one is known."""
    key = (type(module), repr(module))
    if key not in _known or next(module.parameters(), None) is not None:
        _known[key] = Pointwise(_callable(module), _closed_of_module(module))
    return _known[key]


def _callable(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda u: module(u)


def _closed_of_module(module: nn.Module) -> Any:
    if isinstance(module, FunctionModule) and isinstance(module.function, OpOverload):
        return _closed(module.function, module.args, module.kwargs)
    if isinstance(module, nn.LeakyReLU):
        return closed_form("leaky_relu", module.negative_slope)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return closed_form("gelu_exact")
    return closed_form("relu") if isinstance(module, nn.ReLU) else None


@rule(ShapedActivation)
def shaped_activation(context: Context, module: ShapedActivation, x: Kernel, *weights: Tensor) -> Kernel:
    if any(isinstance(w, Kernel) or not bool((w == w.flatten()[0]).all()) for w in weights):
        return context.sample()
    slopes = tuple(float(w.flatten()[0]) for w in weights)
    shaped = apply_all(shaped_map(module, slopes), x)
    for index in range(len(slopes)):
        own = apply_all(_by_slope(module, slopes, index), x)
        shaped = shaped.with_parts(
            *(algebra.trained(p, o.cov, of_itself=True) for p, o in zip(shaped.parts, own.parts, strict=True))
        )
    return shaped


def shaped_map(module: ShapedActivation, slopes: tuple[float, ...] = ()) -> Pointwise:
    """phi_hat of a shaped activation whose learnable slopes, if it has any, have these values."""
    constants = (module.input_scale, module.input_shift, module.output_shift, module.output_scale)
    key = (_with_slopes(module.activation, slopes), constants)
    if key not in _known:
        _known[key] = key[0].affine(*constants)
    return _known[key]


def _with_slopes(activation: nn.Module, slopes: tuple[float, ...]) -> Pointwise:
    if not slopes:
        return pointwise_of_module(activation)
    if _is_prelu(activation):
        return leaky(slopes[0])
    key = (activation, slopes)
    if key not in _known:
        _known[key] = Pointwise(lambda u: activation(u, *(u.new_tensor([slope]) for slope in slopes)))
    return _known[key]


def _is_prelu(activation: nn.Module) -> bool:
    return isinstance(activation, FunctionModule) and activation.function is aten.prelu.default


POSITIVE_PART = pointwise("relu")
NEGATIVE_PART = POSITIVE_PART.affine(input_scale=-1.0, output_scale=-1.0)
_STEP = 2.0**-10


def _by_slope(module: ShapedActivation, slopes: tuple[float, ...], index: int) -> Pointwise:
    """d phi_hat / d slope: min(u, 0) behind prelu, shaped like it; else by a central difference.

    The difference is exact, for phi is a polynomial of degree at most 2 in its slopes.
    """
    scale, shift = module.input_scale, module.input_shift
    if _is_prelu(module.activation):
        key = (NEGATIVE_PART, scale, shift, module.output_scale)
        if key not in _known:
            _known[key] = NEGATIVE_PART.affine(scale, shift, 0.0, module.output_scale)
        return _known[key]
    key = (module.activation, tuple(module.constants.values()), slopes, index)
    if key not in _known:
        high, low = (
            shaped_map(module, (*slopes[:index], slopes[index] + step, *slopes[index + 1 :]))
            for step in (_STEP, -_STEP)
        )
        _known[key] = Pointwise(lambda u: (high(u) - low(u)) / (2 * _STEP))
    return _known[key]


@rule(Scale)
def scale(context: Context, module: Scale, x: Kernel) -> Kernel:
    shifted = (algebra.shift(part, module.shift) for part in x.parts)
    return x.with_parts(*(algebra.scale(part, module.factor) for part in shifted))


@rule(nn.Identity)
def identity_module(context: Context, module: nn.Identity, x: Kernel) -> Kernel:
    return x


@rule(aten.dropout.default, aten.feature_dropout.default)
def dropout(context: Context, x: Kernel, p: float, train: bool) -> Kernel:
    """eval: nothing; train: entries survive with probability 1-p, divided by it.

    `feature_dropout` draws one mask for every index of the first two dimensions: whole channels, where the second
    one is the channels'; whole inputs, where it is the batch (`kgraph.drop_path`); else one mask for all channels of
    a position. Where channels share a mask the law is no longer Gaussian.
    """
    if not train or not drops(context.node, context.mode) or p == 0:
        return x
    by_feature = context.node.target is aten.feature_dropout.default
    roles = {role for role, _ in x.axes[1]} if by_feature else {"p"}
    whole = roles <= {"c", "b"}
    parts = [algebra.drop(part, p, context.node.name, whole=whole) for part in x.parts]
    if by_feature and roles != {"c"}:
        of = "an input" if whole else "a position"
        parts = [replace(part, how=part.how | assumed(f"one mask for all channels of {of}")) for part in parts]
    return x.with_parts(*parts)


@rule(aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def alpha_dropout(context: Context, x: Kernel, p: float, train: bool) -> Kernel:
    """eval: nothing; train: dropped entries get selu's lower bound, sampled."""
    return x if not train or not drops(context.node, context.mode) or p == 0 else context.sample()
