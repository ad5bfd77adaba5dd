"""Results of any other operation: known by running it on joint draws alone."""

from __future__ import annotations

import torch

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Draws, names_of
from kgraph.gram.joint import JointDraws


@laws.draw(f.Drawn)
def drawn_draws(draws: JointDraws, u: f.Drawn) -> Draws:
    draws.spread(u)
    drawn = draws.together(*u.args)
    values = tuple(x.value.contiguous() for x in drawn)
    result, tangents = None, {}
    for name in names_of(drawn):
        along = tuple(x.along(name).contiguous() for x in drawn)
        try:
            result, tangents[name] = torch.func.jvp(u.run, values, along)[:2]
        except (NotImplementedError, RuntimeError):  # nobody knows its derivative
            result = u.run(*values)
            tangents[name] = torch.full_like(result, torch.nan)
    return Draws(u.run(*values) if result is None else result, tangents)
