"""The edge of chaos: critical variances for every activation, orthogonal weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from kgraph.checks import choice, flag, numbers
from kgraph.errors import InputError
from kgraph.passes.base import Pass
from kgraph.passes.edge_of_chaos import CriticalWeights, WeightLaw
from kgraph.passes.remove_norms import RemoveNorms
from kgraph.systems.system import Aspect, System


@dataclass(frozen=True)
class EdgeOfChaos(System):
    """Dynamical isometry: weights on the critical line of the activations, orthogonal, q* = 1 / depth.

    For plain chains of any depth (10,000 tanh layers). Activations stay as they are. Normalization layers stay too,
    with a note in ``ledger.unmet``: with them no weights are critical; ``remove_norms`` takes them out first.

    Args:
        q: q value that all layers keep; 1 / depth when None.
        sigma_b: standard deviation of the biases, instead of q.
        distribution: "delta-orthogonal" (one tap: every mode of the input survives), "orthogonal" (general
            convolutions: all taps, modes decay) or "gaussian" (no isometry; for comparison).
        remove_norms: remove normalization layers first.

    Source: Xiao et al. 2018, arXiv 1806.05393.
    """

    label: ClassVar[str] = "edge-of-chaos"
    q: float | None = None
    sigma_b: float | None = None
    distribution: WeightLaw = "delta-orthogonal"
    remove_norms: bool = False

    def __post_init__(self) -> None:
        numbers(self, "q", "sigma_b")
        flag("remove_norms", self.remove_norms)
        choice("distribution", self.distribution, get_args(WeightLaw))
        if self.q is not None and self.sigma_b is not None:
            raise InputError("q and sigma_b are both given", hint="One follows from the other on the critical line")
        if self.q is not None and not 0 < self.q < math.inf:
            raise InputError(f"q is {self.q}", hint="A q value is positive; None means 1 / depth")
        if self.sigma_b is not None and not 0 <= self.sigma_b < math.inf:
            raise InputError(f"sigma_b is {self.sigma_b}", hint="A standard deviation is >= 0")

    @property
    def sets(self) -> frozenset[Aspect]:
        return frozenset({"weights", "norms"}) if self.remove_norms else frozenset({"weights"})

    def passes(self) -> tuple[Pass, ...]:
        drawing = CriticalWeights(self.q, self.sigma_b, self.distribution)
        return (RemoveNorms(), drawing) if self.remove_norms else (drawing,)
