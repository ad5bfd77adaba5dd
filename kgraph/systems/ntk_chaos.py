"""Order and chaos by activations and variances: networks in NTK form without normalization layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kgraph.checks import choice, flag, number, positive
from kgraph.errors import InputError
from kgraph.meanfield.order_chaos import Form
from kgraph.passes.base import Pass
from kgraph.passes.graph_parametrize import GraphParametrize
from kgraph.passes.ntk_chaos import BalanceActivations, DrawNTK, NoteNorms, NoteVariances
from kgraph.passes.remove_norms import RemoveNorms
from kgraph.systems.system import Aspect, System


@dataclass(frozen=True)
class NTKChaos(System):
    """Place a network in order (r < 1), at the edge or in chaos (r > 1), r = (1 - beta^2) E[sigma'^2].

    Activations become standardized (E[sigma^2] = 1), normalized (also E[sigma] = 0) or, for a given r, something
    between; weights are drawn with std sqrt((1 - beta^2) / fan_in), biases with std beta. Norms are removed: in the
    limit one in front of an activation changes nothing, one behind it is the normalized activation.
    `kgraph.param_groups` gives the learning rates that make SGD follow the NTK parametrization step by step.

    Args:
        beta: standard deviation of the biases, in [0, 1).
        r: wanted characteristic value; None: that of ``form``.
        form: "normalized" (the largest r that a constant can give) or "standardized".
        graph: scale every pixel of transposed and padded convolutions by its number of parents.

    Raises:
        InputError: an option outside its domain. TargetError (in `kgraph.transform`): r out of reach; names the range.
    Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
    """

    label: ClassVar[str] = "ntk-chaos"
    beta: float = 0.1
    r: float | None = None
    form: Form = "normalized"
    graph: bool = True

    def __post_init__(self) -> None:
        flag("graph", self.graph)
        choice("form", self.form, ("standardized", "normalized"))
        if not 0 <= number("beta", self.beta) < 1:
            raise InputError(f"beta is {self.beta}", hint="It is the standard deviation of the biases, in [0, 1)")
        if self.r is not None:
            positive("r", self.r)

    @property
    def sets(self) -> frozenset[Aspect]:
        return frozenset({"norms", "activations", "weights"})

    def passes(self) -> tuple[Pass, ...]:
        balance = BalanceActivations(self.beta, self.r, self.form)
        steps = (NoteNorms(), RemoveNorms(), balance, DrawNTK(self.beta))
        return (*steps, GraphParametrize()) if self.graph else steps

    def checks(self) -> tuple[Pass, ...]:
        return (NoteVariances(),)
