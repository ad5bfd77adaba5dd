"""The kernel of a model as a function of inputs: captured and measured once, called often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kgraph.capture import check_model
from kgraph.checks import choice
from kgraph.copies import copied
from kgraph.errors import InputError
from kgraph.gram.kernels import batched_inputs, captured, kernels_of, of_model
from kgraph.gram.moments import Moments
from kgraph.gram.options import Asked
from kgraph.gram.result import Kernels

_NAMES = ("nngp", "ntk")


class KernelFunction:
    """NNGP and NTK of one model, at the weights that it had when the function was made.

    Args:
        model: any bare module; a copy of it is kept.
        example_inputs: inputs as the model takes them, for its capture.
        asked: the options of every call; a call may give others.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, asked: Asked) -> None:
        inputs, _ = batched_inputs(example_inputs)
        self.graph = captured(copied(check_model(model)), inputs)
        of_model(self.graph, asked)  # wrong options are named before the first call
        self.asked, self._moments = asked, Moments()

    def __call__(self, x1: Any, x2: Any = None, get: str | Sequence[str] = _NAMES, **options: Any) -> Tensor | Kernels:
        """Kernels of all pairs of inputs of ``x1``, or of ``x1`` with ``x2``.

        Args:
            x1, x2: inputs, [n, ...]: a tensor, or a tuple or dict of the model's arguments. x2 None: x1, at half the
                cost, for kernels are symmetric.
            get: "nngp" or "ntk", for that matrix, [n1, n2]; or both, for a `Kernels`.
            options: as for `kgraph.kernels`, in place of those that the function was made with.

        Raises:
            InputError, RuleError: see `kgraph.errors`.
        """
        wanted = _wanted(get)
        for x in (x1, x2):
            self._check_form(x)
        asked = self.asked.but({**options, "with_ntk": "ntk" in wanted})
        found = kernels_of(self.graph, x1, x2, asked, self._moments)
        if not isinstance(get, str):
            return found
        result = getattr(found, get)
        assert isinstance(result, Tensor)
        return result

    def _check_form(self, x: Any) -> None:
        """Raise an InputError if inputs are not of the form that the model was captured with, but for their number."""
        if x is None:
            return
        given, made = tuple(batched_inputs(x)[0]), tuple(self.graph.inputs)
        sizes, own = _sizes(given), _sizes(made)
        if pytree.tree_structure(given) != pytree.tree_structure(made) or sizes != own:
            raise InputError(
                f"the inputs hold {sizes} each, and the function was made with {own}",
                hint="Make another with kgraph.kernel_function for inputs of this form",
            )


def _wanted(get: object) -> tuple[str, ...]:
    """The kernels that are asked for; an InputError for anything but the name of one, or a sequence of names."""
    if isinstance(get, bytes) or not isinstance(get, (str, Sequence)):
        raise InputError(f"get is {get!r}", hint=f"Pass {' or '.join(map(repr, _NAMES))}, or both in a tuple")
    names = (get,) if isinstance(get, str) else tuple(get)
    if not names:
        raise InputError("get names no kernel", hint=f"Pass one of {', '.join(_NAMES)}, or both")
    return tuple(choice("get", name, _NAMES) for name in names)


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def kernel_function(
    model: nn.Module,
    example_inputs: Any,
    *,
    nodes: Sequence[str] | str = (),
    parametrization: str = "standard",
    positions: str = "auto",
    mode: str | None = None,
    variances: Mapping[str, float] | None = None,
    multipliers: Mapping[str, float | Tensor] | None = None,
    count_frozen: bool = False,
    seed: int = 0,
    memory_gib: float = 4.0,
) -> KernelFunction:
    """The kernel of a model as a function: ``kernel(x1, x2, get="ntk")``.

    The model is captured once and what its weights enter by is measured once; `kgraph.kernels` does both at every call.
    Options are those of `kgraph.kernels`, and may be given to a call instead.

        kernel = kgraph.kernel_function(model, x)
        kernel(x, get="nngp")                               # [n, n]
        kernel(x, y, get="ntk", parametrization="ntk")      # [n, m]
        kernel(x).one_minus_c                               # everything: a `Kernels`

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`.
    """
    asked = Asked(nodes, parametrization, positions, mode, True, variances, multipliers, count_frozen, seed, memory_gib)
    return KernelFunction(model, example_inputs, asked)


__all__ = ["KernelFunction", "kernel_function"]
