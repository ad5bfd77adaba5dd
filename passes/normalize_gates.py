"""Gates (squeeze-excite, gated linear units with a sigmoid) lower q to E[gate^2] q: undo it by a constant."""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.passes.rescale import Rescale


@dataclass(frozen=True)
class NormalizeGates(Rescale):
    """Multiply every gated tensor by 1 / sqrt(E[gate^2]); `Rescale` restricted to gates."""

    only_gates: bool = True
