"""Methods by name or instance, alone or several: who may be combined, and the rewriting by systems."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from kgraph.capture import Graph
from kgraph.errors import InputError
from kgraph.methods import DKS, TAT, Auto, Method
from kgraph.passes.base import Pipeline, Workspace
from kgraph.propagate import Propagation
from kgraph.suggestions import meant
from kgraph.systems.system import System

AnyMethod = Method | Auto | System
MODE = "eval"
"""Of the analyses between passes: dropout's noise is no part of the kernel's shape."""


def resolve_methods(method: object) -> tuple[AnyMethod, ...]:
    """One or several methods, by name or instance, that do not set the same thing.

    Raises:
        InputError: an unknown name, an empty list, or two methods that both set, say, the weights.
    """
    given = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    if not given:
        raise InputError("the list of methods is empty", hint="Pass a method, such as 'tat'")
    chosen = tuple(_resolve(one) for one in given)
    for one, two in combinations(chosen, 2):
        both = sorted(_sets(one) & _sets(two))
        if both:
            raise InputError(
                f"{type(one).__name__} and {type(two).__name__} both set the model's {' and '.join(both)}",
                hint="Leave one of them out",
            )
    return chosen


def compose(graph: Graph, systems: Sequence[System], seed: int, first: Propagation | None = None) -> Workspace:
    """Run the passes of all ``systems`` on ``graph``, in place and in their order, then their checks."""
    work = Workspace(graph, MODE, seed, first)
    steps = [step for system in systems for step in system.passes()]
    Pipeline((*steps, *(check for system in systems for check in system.checks()))).run(work)
    return work


def _sets(method: AnyMethod) -> frozenset[str]:
    return method.sets if isinstance(method, System) else frozenset({"norms", "residuals", "activations", "weights"})


def _resolve(method: object) -> AnyMethod:
    if isinstance(method, (Auto, DKS, TAT, System)):
        return method
    named: dict[str, type[AnyMethod]] = {"auto": Auto, "dks": DKS, "tat": TAT}
    named |= {system.label: system for system in System.__subclasses__()}
    if isinstance(method, str) and method.lower() in named:
        return named[method.lower()]()
    near, names = meant(method, named), ", ".join(repr(name) for name in named)
    hint = f"{f'{near}? ' if near else ''}Pass {names}, or an instance such as DKS(zeta=1.5)"
    raise InputError(f"unknown method {method!r}", hint=hint)
