"""Per-location normalization (PLN) in front of the model: every location's vector gets q = 1.

Source: Martens et al. 2021, arXiv 2110.01765, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.kernel import Kernel
from kgraph.modules import PerLocationNorm
from kgraph.passes.base import Pass, Workspace


@dataclass(frozen=True)
class InsertPerLocationNorm(Pass):
    """Normalize every floating-point input location by location.

    The constant homogeneous coordinate of the paper changes the number of channels and so the first layer; use
    `kgraph.modules.PerLocationNorm(append_constant=True)` as a dataset transform and build the model for it.
    """

    def rewrite(self, work: Workspace) -> None:
        values = work.propagation().values
        for node in work.nodes:
            if node.op == "placeholder" and isinstance(values.get(node), Kernel):
                work.call_after(node, PerLocationNorm(), "per_location_norm")
                work.record(node, "per-location norm", "inputs of q = 1 at every location", "raw input", "q = 1")
