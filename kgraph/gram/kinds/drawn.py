"""Results of any other operation: known by running it on joint draws alone."""

from __future__ import annotations

import torch

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.joint import JointDraws
from kgraph.gram.laws import Draws


@laws.draw(f.Drawn)
def drawn_draws(draws: JointDraws, u: f.Drawn) -> Draws:
    draws.spread(u)
    drawn = [draws.of(arg) for arg in u.args]
    values = tuple(x.contiguous() for x, _ in drawn)
    tangents = tuple(d.contiguous() for _, d in drawn if d is not None)
    if not draws.engine.with_ntk or len(tangents) < len(drawn):
        return u.run(*values), None
    try:
        return torch.func.jvp(u.run, values, tangents)[:2]  # type: ignore[return-value]
    except (NotImplementedError, RuntimeError):
        return u.run(*values), None
