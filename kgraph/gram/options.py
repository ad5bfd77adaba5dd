"""What a caller of `kernels` asks for: wrong names and numbers are refused before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from kgraph.capture import Graph
from kgraph.checks import choice, flag, seeded
from kgraph.errors import InputError
from kgraph.gram.exchangeable import Exchangeable
from kgraph.gram.layout import Diagonal, Full, Layout
from kgraph.gram.stationary import Stationary

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "auto": (Diagonal(), Full()),
    "full": (Full(),),
    "diagonal": (Diagonal(),),
    "stationary": (Stationary(),),
    "exchangeable": (Exchangeable(),),
}


@dataclass(frozen=True)
class Asked:
    """The options of `kernels`, which says what they mean.

    Raises:
        InputError: one of them has a value that it cannot have.
    """

    nodes: Sequence[str] | str = ()
    parametrization: str = "standard"
    positions: str = "auto"
    mode: str | None = None
    with_ntk: bool = True
    variances: Mapping[str, float] | None = None
    multipliers: Mapping[str, float | Tensor] | None = None
    count_frozen: bool = False
    seed: int = 0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        choice("parametrization", self.parametrization, ("standard", "ntk"))
        choice("positions", self.positions, tuple(LAYOUTS))
        flag("with_ntk", self.with_ntk)
        flag("count_frozen", self.count_frozen)
        seeded(self.seed)
        check_nodes(self.nodes)
        check_memory(self.memory_gib)

    def but(self, options: Mapping[str, Any]) -> Asked:
        """The same with other values for some.

        Raises:
            InputError: there is no such option.
        """
        known = [one.name for one in fields(self)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1) or known
                raise InputError(f"kernels have no option {name!r}", hint=f"Such as {', '.join(near)}")
        return replace(self, **options)


def check_nodes(nodes: object) -> None:
    """Names of nodes, or "all"."""
    if isinstance(nodes, str) and nodes == "all":
        return
    if isinstance(nodes, Sequence) and not isinstance(nodes, str) and all(isinstance(name, str) for name in nodes):
        return
    raise InputError(f"nodes is {nodes!r}", hint='Pass a list of node names, or "all"')


def check_memory(memory_gib: object) -> None:
    """A positive number."""
    if not isinstance(memory_gib, (int, float)) or isinstance(memory_gib, bool) or not memory_gib > 0:
        raise InputError(f"memory_gib is {memory_gib!r}", hint="Pass a number of GiB above 0")


def learning(model: nn.Module, multipliers: Mapping[str, Any], count_frozen: bool) -> dict[str, Any]:
    """Learning-rate multipliers, 0 for every frozen parameter that is given none (tied ones by all their names).

    Raises:
        InputError: nothing is trained at all.
    """
    if not isinstance(multipliers, Mapping):
        raise InputError(f"multipliers is {multipliers!r}", hint="Pass a dict of numbers by parameter name")
    if count_frozen:
        return dict(multipliers)
    named = list(model.named_parameters(remove_duplicate=False))
    given = {id(p) for name, p in named if name in multipliers}
    frozen = {name: 0.0 for name, p in named if not p.requires_grad and id(p) not in given}
    if named and len(frozen) == len(named):
        raise InputError(
            "every parameter of the model is frozen (requires_grad=False): there is no NTK",
            hint="count_frozen=True counts them, kgraph.nngp leaves the NTK out",
        )
    return {**frozen, **multipliers}


def check_by_parameter(name: str, values: object, graph: Graph) -> None:
    """Non-negative numbers (or 0-d tensors) by names of the model's parameters."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is a {type(values).__name__}", hint="Pass a dict of numbers by parameter name")
    known = [parameter for parameter, _ in graph.root.named_parameters(remove_duplicate=False)]
    known += [buffer for buffer, _ in graph.root.named_buffers(remove_duplicate=False)]
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=3, cutoff=0.4) or known[:3]
            raise InputError(f"{name} names {key!r}, which is no parameter", hint=f"Such as {', '.join(near)}")
        if not _is_size(value):
            raise InputError(f"{name}[{key!r}] is {value!r}", hint="Pass a finite number of at least 0")


def _is_size(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite().all()) and float(value.detach()) >= 0
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
