"""What a forward does that no graph of its operations holds: seen by watching one run of it.

A transform of torch.func, a derivative of the forward's own layers, numbers that Python or NumPy draws: a capture of
such a forward fails with words of the front end's, or gives another function. Only then is a run watched.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn
from torch._functorch import eager_transforms, vmap
from torch.utils import _pytree as pytree

from kgraph.errors import CaptureError
from kgraph.inputs import Inputs

_TORCH = str(Path(torch.__file__).parent)
_TRANSFORMS = {
    vmap.__file__: {"vmap_impl": "vmap"},
    eager_transforms.__file__: {
        "_jvp_with_argnums": "jvp",
        "_vjp_with_argnums": "vjp",
        "grad_impl": "grad",
        "grad_and_value_impl": "grad_and_value",
        "linearize": "linearize",
    },
}
"""Functions that every use of a transform of torch.func passes through, by file; and the transform each is of."""

_OPERATORS = str(Path(_TORCH, "_higher_order_ops"))
_FLEX = str(Path(_TORCH, "nn", "attention", "flex_attention.py"))
_DERIVATIVES = (autograd.grad.__code__, autograd.backward.__code__)


@dataclass
class _Seen:
    """What one run called first, of each kind, and the ``file:line`` of the call."""

    lines: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        for kind, look in _LOOKS.items():
            found = None if kind in self.lines else look(frame, event, argument)
            if found is not None:
                what, caller = found
                self.lines[kind] = what, _line(caller)


def not_held(model: nn.Module, inputs: Inputs) -> CaptureError | None:
    """Which call of the forward no graph of operations holds, where a run shows one."""
    seen = _watched(model, inputs)
    if "operator" in seen.lines:
        return _operates(model, *seen.lines["operator"])
    if "transform" in seen.lines:
        transform, line = seen.lines["transform"]
        return CaptureError(
            f"{type(model).__name__}.forward applies {transform} of torch.func, and a graph of tensor operations holds "
            "no transform",
            source=line or None,
            hint="Write its result with tensor operations: layers take a batch as it is",
        )
    return _derives(model, seen.lines["derivative"][1]) if "derivative" in seen.lines else None


def drawn_elsewhere(model: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
    """Whose random numbers, Python's or NumPy's, a forward draws, and the ``file:line`` that calls Python's."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    seen = _watched(model, inputs)
    if random.getstate() != python:
        return "Python's random", seen.lines.get("random", ("", ""))[1]
    return ("NumPy's", "") if str(np.random.get_state(legacy=False)) != str(numpy) else None


def failed_derivative(model: nn.Module, error: BaseException) -> CaptureError | None:
    """Why a forward did not run without gradients, if it takes derivatives."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = next((frame for frame in frames if frame.f_code in _DERIVATIVES), None)
    return None if inside is None else _derives(model, _line(inside))


def failed_operator(model: nn.Module, error: BaseException) -> CaptureError | None:
    """Why a forward did not run, if it did so inside one of torch's operators on functions."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = next((frame for frame in frames if _is_operator(frame)), None)
    return None if inside is None else _operates(model, inside.f_code.co_name, _line(inside))


def _operates(model: nn.Module, name: str, line: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}.forward calls {_LONG.get(name, name)}, one of torch's operators on functions, which a "
        "graph of tensor operations does not hold",
        source=line or None,
        hint="Write it with plain tensor operations: torch.where for a condition, a Python loop for a fixed number of "
        "steps, scaled_dot_product_attention for attention",
    )


_LONG = {"cond": "torch.cond", "flex_attention": "torch.nn.attention.flex_attention"}


def _is_operator(frame: FrameType) -> bool:
    """Whether a frame is the call of such an operator, as users make it."""
    code = frame.f_code
    return code.co_filename == _FLEX or (Path(code.co_filename).parent == Path(_OPERATORS) and _by_users(frame))


def _by_users(frame: FrameType) -> bool:
    return frame.f_back is not None and not frame.f_back.f_code.co_filename.startswith(_TORCH)


def _derives(model: nn.Module, line: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}.forward takes derivatives by torch.autograd, which a graph of its operations does not "
        "hold",
        source=line or None,
        hint="Pass the part whose derivative is taken (the energy) as a module of its own",
    )


def _watched(model: nn.Module, inputs: Inputs) -> _Seen:
    """One run, with gradients: a forward that takes derivatives needs them."""
    seen, outer = _Seen(), sys.getprofile()
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))  # a forward may write to its inputs
    with torch.enable_grad():
        sys.setprofile(seen)
        try:
            model(*args, **kwargs)
        except Exception:  # whoever asks has an error to raise already, and what was seen until here explains it
            pass
        finally:
            sys.setprofile(outer)
    return seen


def _line(frame: FrameType | None) -> str:
    """``file:line`` of the innermost caller outside PyTorch."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _transform(frame: FrameType, event: str, _: Any) -> tuple[str, FrameType] | None:
    names = _TRANSFORMS.get(frame.f_code.co_filename, {}) if event == "call" else {}
    name = names.get(frame.f_code.co_name)
    return None if name is None else (name, frame)


def _operator(frame: FrameType, event: str, _: Any) -> tuple[str, FrameType] | None:
    return (frame.f_code.co_name, frame) if event == "call" and _is_operator(frame) else None


def _derivative(frame: FrameType, event: str, _: Any) -> tuple[str, FrameType] | None:
    own = event == "call" and frame.f_code in _DERIVATIVES
    return ("grad", frame) if own else None


def _random(frame: FrameType, event: str, argument: Any) -> tuple[str, FrameType] | None:
    own: Callable[[FrameType], bool] = lambda f: f.f_code.co_filename == random.__file__  # noqa: E731
    if event == "c_call" and isinstance(getattr(argument, "__self__", None), random.Random) and not own(frame):
        return "random", frame
    if event == "call" and own(frame) and frame.f_back is not None and not own(frame.f_back):
        return "random", frame.f_back
    return None


_LOOKS = {"operator": _operator, "transform": _transform, "derivative": _derivative, "random": _random}


__all__ = ["drawn_elsewhere", "failed_derivative", "failed_operator", "not_held"]
