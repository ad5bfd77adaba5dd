"""Parameters on the meta device have a shape and no values: what is taken in their place, and said so.

    weight of an affine layer     fan_in E[W^2] = 1, the same at every tap
    bias                          0
    norm                          gain 1, bias 0, running mean 0, running variance 1: what reset_parameters sets
    PReLU                         slope 0.25, its own start
    embedding                     standard normal rows
    other factors, summands       1, 0

Stand-ins take no memory: one number, expanded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.canonical import operation_name
from kgraph.errors import RuleError
from kgraph.site import site_of

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("matmul", "mm", "addmm")
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_OF_NORMS = {
    "weight": (1.0, "gain 1 of norms"),
    "bias": (0.0, "bias 0 of norms"),
    "running_mean": (0.0, "running mean 0"),
    "running_var": (1.0, "running variance 1"),
}
_NAMES_SHOWN = 3


class Unallocated:
    """Hands out stand-ins for meta tensors, and remembers what it assumed.

    Attributes:
        values: the last stand-in of every node.
    """

    def __init__(self) -> None:
        self.values: dict[fx.Node, Any] = {}
        self._assumed: dict[str, list[str]] = {}

    def filled(self, reader: fx.Node, known: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        """Arguments of ``reader`` with stand-ins for meta tensors.

        Raises:
            RuleError: it needs the values of an index or mask.
        """

        def value(source: fx.Node) -> Any:
            own = known[source]
            if not (isinstance(own, Tensor) and own.is_meta):
                return own
            self.values[source] = self._stand_in(reader, source, own)
            return self.values[source]

        return fx.node.map_arg((reader.args, reader.kwargs), value)  # type: ignore[return-value]

    def notes(self) -> tuple[str, ...]:
        """What was assumed of which tensors, in plain words."""
        lines = []
        for what, names in self._assumed.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            lines.append(f"no values on the meta device, assumed {what}: {', '.join(names[:_NAMES_SHOWN])}{more}")
        return tuple(lines)

    def _stand_in(self, reader: fx.Node, source: fx.Node, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            if operation_name(reader) == "embedding":
                return tensor  # token ids: only their shape counts
            raise _no_values(reader, source)
        value, what = _assumption(reader, source, tensor)
        names = self._assumed.setdefault(what, [])
        name = str(source.target) if source.op == "get_attr" else source.name
        if name not in names:
            names.append(name)
        return value


def _assumption(reader: fx.Node, source: fx.Node, tensor: Tensor) -> tuple[Tensor, str]:
    name, argument = operation_name(reader), _argument(reader, source)
    if name in _NORMS and argument in _OF_NORMS:
        number, what = _OF_NORMS[argument]
        return _constant(number, tensor), what
    if name in ("linear", *_CONVOLUTIONS, *_TRANSPOSED, *_PRODUCTS):
        return _of_affine(reader, name, argument, tensor)
    if name == "prelu":
        return _constant(0.25, tensor), "slope 0.25 of PReLU"
    if name == "embedding" or operation_name(source) == "embedding":
        return _normal_rows(tensor), "standard normal rows of embeddings"
    if name in ("mul", "div"):
        return _constant(1.0, tensor), "factor 1"
    if name in ("add", "sub", "rsub", "cat"):
        return _constant(0.0, tensor), "0 where it is added or concatenated"
    raise _no_values(reader, source)


def _of_affine(reader: fx.Node, name: str, argument: str, tensor: Tensor) -> tuple[Tensor, str]:
    if argument == "bias" or (name == "addmm" and argument == "self"):
        return _constant(0.0, tensor), "bias 0 of affine layers"
    fan_in = tensor.numel() // max(tensor.shape[0], 1)
    if name in _PRODUCTS:
        fan_in = tensor.shape[0]
    elif name in _TRANSPOSED:
        groups = int(reader.args[6]) if len(reader.args) > 6 else 1  # type: ignore[call-overload]
        fan_in = tensor.shape[0] // groups * tensor[0, 0].numel()
    return _constant(max(fan_in, 1) ** -0.5, tensor), "fan_in E[W^2] = 1 of affine layers (not PyTorch's default, 1/3)"


def _constant(number: float, like: Tensor) -> Tensor:
    return torch.full((), number, dtype=torch.float64, device="cpu").expand(like.shape)


def _normal_rows(like: Tensor) -> Tensor:
    """At most 64 rows of mean 0 and variance 1: a rule reads their moments and the length of one."""
    rows = like.shape[:-1] if like.ndim != 2 else (min(like.shape[0], 64),)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((*rows, like.shape[-1]), generator=generator, dtype=torch.float64)
    return (drawn - drawn.mean()) / drawn.std(unbiased=False) if drawn.numel() > 1 else drawn


def _argument(reader: fx.Node, source: fx.Node) -> str:
    schema = getattr(reader.target, "_schema", None)
    if schema is None or source not in reader.args:
        return next((key for key, value in reader.kwargs.items() if value is source), "")
    return str(schema.arguments[reader.args.index(source)].name)


def _no_values(reader: fx.Node, source: fx.Node) -> RuleError:
    name = str(source.target) if source.op == "get_attr" else source.name
    return RuleError(
        f"{operation_name(reader)} needs the values of {name}, which the meta device does not hold",
        node=reader.name,
        source=site_of(reader).source or None,
        hint="Build the model on the CPU; the kernel does not depend on the width, so a narrow copy will do",
    )
