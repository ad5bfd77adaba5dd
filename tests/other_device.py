"""A second device without a second processor: tensors that torch takes to be elsewhere, and that refuse to mix.

A GPU refuses an operation on tensors of two devices; a machine without one never notices. Here tensors say that they
are on the device "lazy" (which every build of torch knows and none uses), hold their numbers on the CPU, and every
operation checks what a GPU checks: no tensor from the CPU among its arguments, but for numbers without dimensions and
indices; no generator of the CPU; no `numpy()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
_aten: Any = torch.ops.aten
_TRANSFERS = {_aten._to_copy.default, _aten.copy_.default, _aten._local_scalar_dense.default}
_EAGER = {
    _aten._conj.default: torch.conj_physical,
    _aten._neg_view.default: torch.neg,
    _aten._efficientzerotensor.default: _aten.zeros.default,
}
"""Tensors with a flag (conjugate, negative, zero): wrappers do not carry it, so they are made at once."""
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """A tensor on the other device; ``numbers`` holds what it contains."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.numbers!r})"

    def tolist(self) -> Any:
        """Numbers of the CPU, as a GPU gives them; torch refuses this for every subclass."""
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """While it is on, factories can be asked for tensors on the other device."""

    def __enter__(self) -> Any:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=d) is made on the CPU, then moved
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on either device: computed on the CPU, refused where a GPU would refuse it."""
    leaves = pytree.tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim]
    inputs_elsewhere = any(isinstance(x, Elsewhere) for x in leaves)
    target = kwargs.get("device")
    elsewhere = inputs_elsewhere if target is None else torch.device(target).type == DEVICE.type
    _check(func, args, kwargs, inputs_elsewhere, elsewhere, here)
    raw_args, raw_kwargs = pytree.tree_map_only(Elsewhere, lambda x: x.numbers, (args, kwargs))
    if target is not None:
        raw_kwargs["device"] = "cpu"
    result = _EAGER.get(func, func)(*raw_args, **raw_kwargs)
    if func is _aten.copy_.default:
        return args[0]
    if func is _aten._to_copy.default and elsewhere != inputs_elsewhere:
        result = result.clone()
    own = {id(x.numbers): x for x in leaves if isinstance(x, Elsewhere)}
    wrap = lambda x: own.get(id(x)) if id(x) in own else Elsewhere(x)  # noqa: E731
    return pytree.tree_map_only(Tensor, wrap, result) if elsewhere else result


def _check(func: Any, args: Any, kwargs: Any, inputs_elsewhere: bool, elsewhere: bool, here: list[Tensor]) -> None:
    if func in _TRANSFERS:
        return
    if func in _INDEXED and isinstance(args[0], Elsewhere):
        here = [x for x in here if not any(x is index for index in args[1])]
    if inputs_elsewhere and here:
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found {DEVICE} and cpu")
    generator = kwargs.get("generator")
    if elsewhere and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a generator of {DEVICE}, found one of cpu")


def away(x: Tensor) -> Tensor:
    """A tensor on the other device."""
    return Elsewhere(x.detach().clone())
