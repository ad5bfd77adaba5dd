"""Targets on the real propagation: the local value for which the kernel, as it is propagated, has the planned shape.

`kgraph.targets` solves for a composition of ideal local maps: Gaussian inputs of mean 0, pooling counted as keeping c.
The plan is what that composition says at the inputs of the activations and at the outputs. What is propagated differs:
sums of a post-activation residual network are no Gaussians, pooling has maps of its own. Constants that keep means and
slopes (`Rescale`) take most of that back; the local value is then solved once more, for

    DKS              max over judged nodes of C'(1)  =  that of the plan, times what linear activations would leave
    TAT, leaky relu  max over judged nodes of C(0)   =  that of the plan

with at most `WALKS` propagations. TAT of smooth activations has no scalar left: its slopes are kept at 1 one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import brentq
from torch import fx

from kgraph.canonical import operation_name
from kgraph.errors import TargetError
from kgraph.kernel import SAME, Kernel, Pairs
from kgraph.methods import DKS, Method
from kgraph.output_q import SOFTMAX, returned
from kgraph.passes.affine_image import Keep, tangent
from kgraph.passes.base import Workspace
from kgraph.passes.rescale import Rescale
from kgraph.passes.shape_activations import ShapeActivations
from kgraph.propagate import TOKEN_VIEWS
from kgraph.subnetworks import find_subnetworks
from kgraph.targets import ShapingTargets

WALKS = 10
_NEAR = 0.01
"""Relative distance from the plan that is left alone."""
_LINEAR = 1e-3
"""Share of a target's excess over 1 at which activations count as linear."""
_AVERAGES = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_SOLVED = 2e-3
"""Relative distance from the plan at which the local value is found."""


GRID = tuple(i / 20 for i in range(21))
"""Input cosines at which the planned C map is kept; between them it is taken for linear (it is off by < 1e-3)."""
Curve = tuple[float, ...]


@dataclass(frozen=True)
class Planned:
    """The plan, from the inputs, all of them together: the composition of local maps at q = 1.

    Attributes:
        c: C map at `GRID` to every node; empty where the method does not plan it.
        slope: C'(1) to every node.
    """

    c: dict[fx.Node, Curve] = field(default_factory=dict)
    slope: dict[fx.Node, float] = field(default_factory=dict)


def keeps(method: Method) -> Keep:
    """What constants keep besides q: C(0) = 0 is a mean of 0; TAT's local maps have slope 1."""
    return "mean" if isinstance(method, DKS) else "slope"


def planned_maps(work: Workspace, method: Method) -> Planned:
    """The plan: the composition of the local maps as they are now, shaped and not corrected yet."""
    own = find_subnetworks(work.graph, work.propagation(), free=lambda region: False)
    curves = isinstance(method, DKS) or _is_leaky(work)
    c = own.c_maps(np.array(GRID)) if curves and work.shaped else {}
    return Planned({node: tuple(map(float, c[node])) for node in c}, own.slopes() if work.shaped else {})


def settle(work: Workspace, method: Method, targets: ShapingTargets, planned: Planned) -> ShapingTargets:
    """Targets whose local value meets the plan as propagated; those given where none does, or none is to be solved.

    The activations have the constants of what is returned.
    """
    if isinstance(method, DKS):
        assert targets.psi is not None
        loop = _Loop(work, method, targets, "psi", tangent, planned.slope)
        linear, sign = 1 + (targets.psi - 1) * _LINEAR, 1
    elif targets.negative_slope is not None and _is_leaky(work):
        loop = _Loop(
            work, method, targets, "negative_slope", correlation, {node: c[0] for node, c in planned.c.items()}
        )
        linear, sign = 1.0, -1
    else:
        return targets
    return loop.solved(linear, sign)


def attainable(work: Workspace, method: Method, targets: ShapingTargets, planned: Planned) -> Planned:
    """The plan, with C(0) no higher than plain relus have it: TAT has no activation that would raise it further."""
    if isinstance(method, DKS) or targets.negative_slope != 0 or not _is_leaky(work):
        return planned
    kernels = work.kernels()
    found = {node: correlation(kernels[node]) for node in planned.c if node in kernels}
    return replace(planned, c={node: _lowered(curve, found.get(node, 1.0)) for node, curve in planned.c.items()})


def _lowered(curve: Curve, start: float) -> Curve:
    """A C map that starts no higher than ``start``, and still ends at 1."""
    if not start < curve[0]:
        return curve
    share = (1 - start) / (1 - curve[0])
    return tuple(1 - share * (1 - c) for c in curve)


@dataclass
class _Loop:
    """One local value, what it is to reach, and the walks that were made."""

    work: Workspace
    method: Method
    targets: ShapingTargets
    name: str
    read: Callable[[Kernel], float]
    planned: dict[fx.Node, float]

    def __post_init__(self) -> None:
        self.found: dict[float, float] = {}
        self.restore = Rescale(keep=keeps(self.method))
        self.nodes = [node for node in judged(self.work) if node in self.planned]
        self.goal = max((self.planned[node] for node in self.nodes), default=math.nan)

    def solved(self, linear: float, sign: int) -> ShapingTargets:
        start = getattr(self.targets, self.name)
        reached = self.reached(start)
        if not 0 < reached < math.inf or not self.goal > 0 or abs(reached / self.goal - 1) <= _NEAR:
            return self.targets
        try:
            least = self.reached(linear)
        except TargetError:  # a function that is never so nearly linear: the plan's own value stays
            self._at(start)
            return self.targets
        own = sign > 0 and least > 1 + _NEAR
        if own:
            self.goal *= least  # what is no activation's doing: max pooling has a slope of its own
        beyond = own and reached < self.goal  # nothing is gained by more than the plan then
        value = start if beyond or least >= self.goal else self._root(linear, start)
        self._at(value)
        return replace(self.targets, **{self.name: value})

    def _root(self, linear: float, start: float) -> float:
        """Brent's root between linear activations and the planned ones, or beyond them."""
        near, far = linear, start
        while self._excess(far) < 0 and len(self.found) < WALKS // 2:
            beyond = max(linear + 2 * (far - linear), 0.0)
            try:
                self.reached(beyond)
            except TargetError:
                return far
            if beyond == far:  # a plain relu
                return far
            near, far = far, beyond
        if self._excess(far) <= 0:
            return far
        return float(brentq(self._excess, near, far, maxiter=WALKS // 2, disp=False))  # type: ignore[arg-type]

    def _excess(self, value: float) -> float:
        """Logarithm of what is reached over the goal; 0 as soon as that is near enough."""
        excess = math.log(max(self.reached(value), 1e-300) / self.goal)
        return 0.0 if abs(excess) < _SOLVED else excess

    def reached(self, value: float) -> float:
        """The largest number at a judged node when activations have this local value."""
        if value not in self.found:
            self._at(value)
            kernels = self.restore.walk(self.work).propagation.kernels()
            read = [self.read(kernels[node]) for node in self.nodes if node in kernels]
            self.found[value] = max((x for x in read if not math.isnan(x)), default=math.nan)
        return self.found[value]

    def _at(self, value: float) -> None:
        ShapeActivations(self.method, replace(self.targets, **{self.name: value})).reshape(self.work)
        self.work.touch()


def judged(work: Workspace) -> list[fx.Node]:
    """Where the plan must hold: the inputs of shaped activations and what layers return.

    What stands for all positions at once is left out where others stand for one: an average over positions keeps of
    two inputs only what their positions share, whatever the activations are. The average's own input is judged.
    """
    kernels = work.kernels()
    sources = [call.all_input_nodes[0] for call in work.shaped]
    found = [node for node in dict.fromkeys([*sources, *ends(work), *averaged(work)]) if node in kernels]
    most = max((kernels[node].positions for node in found), default=1)
    return [node for node in found if kernels[node].positions > 1] if most > 1 else found


def ends(work: Workspace) -> list[fx.Node]:
    """What is returned; of shares (softmax) or another last nonlinearity, moved or not, what that reads."""
    sources = {region.end: region.source for region in work.regions() if region.end not in work.shaped}
    found = []
    for _, node in returned(work):
        queue = [node]
        for at in queue:  # back to the last nonlinearity, through what moves entries
            answer = sources.get(at) if at in sources else at.args[0] if operation_name(at) in SOFTMAX else None
            if isinstance(answer, fx.Node):
                node = answer
            elif operation_name(at) in TOKEN_VIEWS:
                queue += at.all_input_nodes[:1]
        found.append(node)
    return found


def averaged(work: Workspace) -> list[fx.Node]:
    """What an average over all positions reads."""
    kernels = work.kernels()
    read = [n.all_input_nodes[0] for n in work.nodes if n in kernels and operation_name(n) in _AVERAGES]
    return [node for node in read if node in kernels and kernels[node].positions > 1]


def correlation(kernel: Kernel) -> float:
    """``C(0)``: the c value of inputs that have none; NaN where q is 0."""
    part = kernel.merged
    q = float(part.q)
    return float(part.cov[Pairs().cosines.index(0.0), SAME]) / q if q > 0 else math.nan


def _is_leaky(work: Workspace) -> bool:
    return any(site.leaky for site, _ in work.shaped.values())


__all__ = [
    "GRID",
    "Planned",
    "attainable",
    "averaged",
    "correlation",
    "ends",
    "judged",
    "keeps",
    "planned_maps",
    "settle",
]
