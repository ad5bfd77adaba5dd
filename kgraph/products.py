"""Products of branches double a relative error of q: how far that goes, and the shortcut weight that bounds it.

Q(q) = q_a q_b of a gated unit has derivative 2 at the fixed point q = 1, so that n blocks x + (a * b)(x) without
their norms spread the mean squares of inputs by (2 - w^2)^n in logarithm, w being the weight of the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable

from kgraph.nonlinear import Region
from kgraph.passes.base import Workspace
from kgraph.passes.scale_residuals import reweight
from kgraph.subnetworks import Extreme, Subnetworks, find_subnetworks

Q_BOUND = 4.0
"""Largest growth of a relative error of q that counts as bounded: two products, one behind the other."""
_WEIGHTS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


def bounding_weight(work: Workspace, weight: float, free: Callable[[Region], bool]) -> tuple[float, str]:
    """The smallest of a few shortcut weights, from ``weight`` on, that bounds what products do to q, and why.

    The graph is left with that weight; with ``weight`` itself, and no reason, where it is enough or none is.
    """
    found = find_subnetworks(work.graph, work.propagation(), free=free).max_q_slope(planned=True)
    if found.value <= Q_BOUND:
        return weight, ""
    for higher in (w for w in _WEIGHTS if w > weight):
        if not reweight(work, higher):
            break
        again = find_subnetworks(work.graph, work.propagation(), free=free)
        if again.max_q_slope(planned=True).value <= Q_BOUND:
            return higher, f"products of branches would let {_growth(found)}"
    reweight(work, weight)
    return weight, ""


def unbounded(subnetworks: Subnetworks) -> str:
    """What to say where relative errors of q grow beyond the bound; "" where they do not."""
    found = subnetworks.max_q_slope()
    if found.value <= Q_BOUND * (1 + 1e-6):
        return ""
    return (
        f"products of branches let {_growth(found)}, more than {Q_BOUND:g}: mean squares will differ widely between "
        "inputs. Weight the shortcuts more, or normalize the inputs of the model"
    )


def _growth(found: Extreme) -> str:
    return f"a relative error of q grow {found.value:.4g}-fold from {found.source} to {found.target}"
