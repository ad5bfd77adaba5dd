"""The few leaf modules that a rewritten model contains.

Their constants are plain Python floats, not buffers. A float is exact in every dtype (a buffer that went
through ``.to(float16)`` and back is not), survives ``deepcopy``, ``pickle`` and ``to_empty`` after a
meta-device build (which leaves a non-persistent buffer uninitialized), needs no broadcast under DDP, and adds
no state_dict key, so the original checkpoint still loads strictly. ``torch.add(b, x, alpha=a)`` with a
0-dimensional b on the CPU is ``a * x + b`` in one pass over memory, forward and backward; compilers fold b
into the kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kgraph.checks import finite
from kgraph.errors import InputError
from kgraph.fused import Fusible, fused, fusible_function, fusible_module, runs_eagerly
from kgraph.shaped_attention import ShapedAttention as ShapedAttention

_LOW_PRECISION = (torch.float16, torch.bfloat16)


# Wrapped: branches on a dtype, and dtype arguments, must not meet a Proxy when a user symbolically traces a
# rewritten model.
@torch.fx.wrap
def _widen(x: Tensor) -> Tensor:
    """x in float32 if it is half precision, x itself otherwise."""
    return x.float() if x.dtype in _LOW_PRECISION else x


@torch.fx.wrap
def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``; x itself, without a node in an exported graph, if it already is."""
    return x if x.dtype == dtype else x.to(dtype)


@torch.fx.wrap
def affine(x: Tensor, scale: float, shift: float) -> Tensor:
    """``scale * x + shift`` in at most one pass over memory; ``x`` itself when that is the identity."""
    if shift == 0.0:
        return x if scale == 1.0 else x * scale
    if scale == 1.0:
        return x + shift
    # device: a default device (``with torch.device("meta")``) must not catch it. A CPU scalar fits any x.
    return torch.add(torch.full((), shift, dtype=x.dtype, device="cpu"), x, alpha=scale)


class FunctionModule(nn.Module):
    """A pointwise function as a module: ``forward(x, *more) = function(x, *more, *args, **kwargs)``.

    Exists so that a captured call such as ``aten.gelu.default(x, approximate="tanh")`` can be pickled:
    torch's operator overloads cannot, so they are stored by name.

    Args:
        function: any callable; a ``functools.partial`` is unpacked (its positional arguments, which stand
            before the tensor, are refused).
        args: further positional arguments, after the tensor.
        kwargs: keyword arguments.
    """

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        while isinstance(function, functools.partial):
            if function.args:
                raise InputError("A partial function must bind its arguments by keyword")
            function, kwargs = function.func, {**function.keywords, **kwargs}
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """``function(x, *more, *args, **kwargs)``; shape as the function gives it."""
        return self.function(x, *more, *self.args, **self.kwargs)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        named = [f"{key}={value!r}" for key, value in self.kwargs.items()]
        return ", ".join([name, *map(repr, self.args), *named])

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if isinstance(self.function, torch._ops.OpOverload):
            state["function"] = ("operator", self.function.name(), self.function._overloadname)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state["function"]
        if isinstance(stored, tuple):
            namespace, name = stored[1].split("::")
            packet = getattr(getattr(torch.ops, namespace), name.split(".")[0])
            state = {**state, "function": getattr(packet, stored[2])}
        super().__setstate__(state)


class ShapedActivation(nn.Module):
    """An affinely transformed activation, the model-class preserving rewrite of DKS and TAT.

        phi_hat(u) = output_scale * (phi(input_scale * u + input_shift) + output_shift)

    Typical constants cancel (softplus: output_scale 8.9, output_shift -.92), so float16 and bfloat16 inputs,
    as under autocast, are computed in float32 and cast back: the result differs from the float32 one by one
    rounding.

    Args:
        activation: the original phi, kept as the submodule ``activation``; a plain function is wrapped in
            `FunctionModule`.
        input_scale, input_shift, output_shift, output_scale: finite numbers, kept exactly.

    A learnable slope (PReLU's) that another module owns is handed to ``forward`` after u, so that its name in the
    state dict stays what it was.

    Shapes: any; the output has the input's shape and dtype.
    Raises: InputError for a constant that is not finite, or a zero scale.
    Source: Martens et al. 2021, arXiv 2110.01765; Zhang et al. 2022, arXiv 2203.08120.
    """

    def __init__(
        self,
        activation: nn.Module | Callable[[Tensor], Tensor],
        input_scale: float = 1.0,
        input_shift: float = 0.0,
        output_shift: float = 0.0,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation = activation if isinstance(activation, nn.Module) else FunctionModule(activation)
        self.input_scale = finite("input_scale", input_scale)
        self.input_shift = finite("input_shift", input_shift)
        self.output_shift = finite("output_shift", output_shift)
        self.output_scale = finite("output_scale", output_scale)
        if self.input_scale == 0.0 or self.output_scale == 0.0:
            raise InputError("input_scale and output_scale must not be zero: the activation would be constant")

    @property
    def constants(self) -> dict[str, float]:
        """The four constants by name, exact."""
        return {
            "input_scale": self.input_scale,
            "input_shift": self.input_shift,
            "output_shift": self.output_shift,
            "output_scale": self.output_scale,
        }

    def forward(self, u: Tensor, *slopes: Tensor) -> Tensor:
        """phi_hat(u), of u's shape and dtype."""
        if not slopes and runs_eagerly(u) and u.dtype not in _LOW_PRECISION and (known := self._fusible()) is not None:
            return fused(u, known, (self.input_scale, self.input_shift, self.output_shift, self.output_scale))
        x = affine(_widen(u), self.input_scale, self.input_shift)
        y = affine(self._activate(x, slopes), self.output_scale, self.output_scale * self.output_shift)
        return _cast(y, u.dtype)

    def _fusible(self) -> Fusible | None:
        """How phi runs in one pass, where it is known."""
        phi = self.activation
        if phi._forward_hooks or phi._forward_pre_hooks or phi._backward_hooks:  # somebody looks at it
            return None
        if isinstance(phi, FunctionModule):
            return fusible_function(phi.function, phi.args, phi.kwargs)
        return fusible_module(phi)

    def _activate(self, x: Tensor, slopes: tuple[Tensor, ...]) -> Tensor:
        if slopes:
            return self.activation(x, *(_cast(slope, x.dtype) for slope in slopes))
        # A learnable activation (PReLU) of a half-precision model takes only its own parameters' dtype.
        for parameter in self.activation.parameters():
            return _cast(self.activation(_cast(x, parameter.dtype)), x.dtype)
        return self.activation(x)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:.8g}" for name, value in self.constants.items())


class WeightedSum(nn.Module):
    """``sum_i w_i t_i`` with constant weights: the normalized sum of a shortcut and its residual branches.

    Independent terms of q value 1 give q = sum w_i^2, hence sum w_i^2 = 1 keeps q = 1.

    Args:
        weights: one finite non-zero number for each term (a zero weight would leave a dead branch in the
            model: drop the branch instead).

    Shapes: as many tensors as weights, broadcast against each other as ``+`` does.
    Raises: InputError for no weights, a zero or non-finite weight, or another number of tensors.
    Source: Martens et al. 2021, arXiv 2110.01765, section on sums.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(finite(f"weights[{i}]", w) for i, w in enumerate(weights))
        if not self.weights or 0.0 in self.weights:
            raise InputError(f"weights must be one or more non-zero numbers, got {self.weights}")
        # A term of weight 1 goes first: it needs no multiplication.
        self._first = self.weights.index(1.0) if 1.0 in self.weights else 0

    def forward(self, *tensors: Tensor) -> Tensor:
        """The weighted sum of the tensors, in the order of the weights."""
        if len(tensors) != len(self.weights):
            raise InputError(f"WeightedSum has {len(self.weights)} weights but got {len(tensors)} tensors")
        first = self._first
        total = affine(tensors[first], self.weights[first], 0.0)
        own = total is not tensors[first] and runs_eagerly(total)
        for i, (weight, tensor) in enumerate(zip(self.weights, tensors, strict=True)):
            if i == first:
                continue
            if own and tensor.shape == total.shape and tensor.dtype == total.dtype:
                total = total.add_(tensor, alpha=weight)
            else:
                total, own = torch.add(total, tensor, alpha=weight), runs_eagerly(total)
        return total

    def extra_repr(self) -> str:
        return "weights=(" + ", ".join(f"{w:.8g}" for w in self.weights) + ")"


NORM_FACTOR = "a norm's own factor"
"""The reason of a `Scale` that stands in a removed norm's place, and changes q on purpose."""


class Scale(nn.Module):
    """``factor * (x + shift)``: restores q after a gate, a pooling or an embedding, and takes a mean off.

    Args:
        factor: a finite number.
        shift: a finite number.
        reason: why it is there; shown when the model is printed.
        average: whether it stands behind an average over positions, how much of which is left depends on the inputs.

    Attributes:
        measured: whether the factor is that of inputs which `kgraph.calibration` has seen.

    Shapes: any to the same.
    Raises: InputError for a constant that is not finite.
    """

    def __init__(self, factor: float, shift: float = 0.0, reason: str = "", *, average: bool = False) -> None:
        super().__init__()
        self.factor, self.shift, self.reason = finite("factor", factor), finite("shift", shift), reason
        self.average, self.measured = average, False

    def fit(self, x: Tensor) -> float:
        """Make q = 1 of what comes out for x; returns q without the factor."""
        q = float((x.detach().double() + self.shift).square().mean())
        self.fit_to(q)
        return q

    def fit_to(self, q: float) -> None:
        """The factor for which q = 1 comes out; 0 and NaN leave it."""
        if 0 < q < math.inf:
            self.factor, self.measured = q**-0.5, True

    def forward(self, x: Tensor) -> Tensor:
        """``factor * (x + shift)``."""
        return affine(x, self.factor, self.factor * self.shift)

    def extra_repr(self) -> str:
        shift = f", shift={self.shift:.8g}" if self.shift else ""
        return f"{self.factor:.8g}{shift}" + (f", reason={self.reason!r}" if self.reason else "")


@torch.fx.wrap
def per_location_norm(x: Tensor, append_constant: bool, eps: float) -> Tensor:
    """The function of `PerLocationNorm`."""
    if not x.is_floating_point():
        raise InputError(f"PerLocationNorm takes a floating point input, got {x.dtype}")
    axis = 1 if x.ndim >= 3 else -1
    wide = _widen(x)  # a square overflows float16 above 256
    if append_constant:
        wide = torch.cat([wide, torch.ones_like(wide.narrow(axis, 0, 1))], axis)
    mean_square = wide.square().mean(axis, keepdim=True)
    return _cast(wide * mean_square.clamp_min(eps).rsqrt(), x.dtype)


class PerLocationNorm(nn.Module):
    """Per-location normalization (PLN): each location's channel vector gets the q value 1.

        y = x / sqrt(max(mean_c x_c^2, eps))

    With ``append_constant`` the vector first gets a further channel of constant 1 (a homogeneous coordinate),
    which keeps the length of x readable from y and is never zero. It is stateless and stands in front of a
    model, or in a dataset transform.

    Args:
        append_constant: add the constant channel; the output then has one channel more.
        eps: floor of the mean square. Not an addend: above it q is 1 exactly. A zero vector stays zero.

    Shapes: [N, C, ...] of three or more dimensions normalizes over dimension 1; [N, C] or [C] over the last.
    Raises: InputError for an input that is not floating point.
    Source: Martens et al. 2021, arXiv 2110.01765, per-location normalization.
    """

    def __init__(self, append_constant: bool = False, eps: float = 1e-12) -> None:
        super().__init__()
        self.append_constant, self.eps = append_constant, finite("eps", eps)
        if self.eps <= 0.0:
            raise InputError(f"eps must be positive, got {eps}")

    def forward(self, x: Tensor) -> Tensor:
        """x scaled to mean square 1 over its channels, in x's dtype."""
        return per_location_norm(x, self.append_constant, self.eps)

    def extra_repr(self) -> str:
        return f"append_constant={self.append_constant}, eps={self.eps:g}"
