"""Gates (squeeze-excite, gated linear units with a sigmoid) lower q to E[gate^2] q: undo it by a constant."""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.canonical import aten
from kgraph.nonlinear import find_regions
from kgraph.passes.base import Pass, Workspace


@dataclass(frozen=True)
class NormalizeGates(Pass):
    """Multiply every gated tensor by 1 / sqrt(E[gate^2])."""

    def rewrite(self, work: Workspace) -> None:
        kernels = work.kernels()
        for region in find_regions(work.graph.module, kernels.__contains__):
            if not region.gate:
                continue
            second = float(kernels[region.end].merged.q)
            for user in [u for u in region.end.users if u.target is aten.mul.Tensor]:
                factor = second**-0.5
                work.scale_after(user, factor, f"1/sqrt(E[gate^2]) of {region.end.name}")
                work.record(user, "normalize gate", f"E[gate^2] = {second:.4g}", f"q x {second:.3g}", f"times {factor:.4g}")
