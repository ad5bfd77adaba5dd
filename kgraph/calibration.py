"""Constants behind averages, measured on the user's own inputs where these are plainly no white noise.

How much an average over positions leaves depends on how alike the positions are: of white noise 1 / n of q, of a
photograph, most of which is sky, a large part. A constant that restores q = 1 for white noise then makes q 10 or 100.
What is measured is one number an average, mean(v^2) over inputs and channels; everything else stays as it was planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.analysis import Change
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError
from kgraph.input_moments import InputMoments, plainly_not_white, plainly_smooth
from kgraph.inputs import Inputs
from kgraph.modules import Scale
from kgraph.untouched import untouched

FEWEST = 8
"""Inputs from which on a batch says what inputs are like."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, as changes of the ledger, and what follows for whoever reads the report."""

    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()


def calibrate(module: EmittedModule, inputs: Inputs, channels: tuple[int, ...]) -> Calibration:
    """Measure, in eval mode, the constants behind averages of an emitted module on a batch; nothing for white noise.

    Args:
        channels: dimension of the channels of every input.
    """
    if not averages(module) or not _speaks(inputs, channels):
        return Calibration()
    with untouched(module), torch.no_grad():
        found = _Fitter(module.eval())
        found.run(*pytree.tree_leaves(tuple(inputs)), enable_io_processing=False)
    for path, _, q in found.measured:  # `untouched` has put the constants back
        module.get_submodule(path).fit_to(q)  # type: ignore[operator]
    changes = tuple(
        Change(
            node,
            "measure q",
            f"behind an average, q depends on how alike positions are: measured on {len(_first(inputs))} inputs",
            f"q 1 for white noise, {q / planned:.3g} for the inputs given",
            "q 1 for the inputs given",
        )
        for node, planned, q in found.measured
    )
    if not changes:
        return Calibration()
    names = ", ".join(change.node for change in changes)
    line = (
        f"the constants at {names} are measured on the inputs given, for which the reports count q = 1 there; load a "
        "state dict into a model transformed with the same inputs, or save the whole module"
    )
    return Calibration(changes, (line,))


def averages(module: fx.GraphModule) -> list[Scale]:
    """The constants that stand behind averages over positions."""
    called = (node for node in module.graph.nodes if node.op == "call_module")
    found = (module.get_submodule(str(node.target)) for node in called)
    return [one for one in found if isinstance(one, Scale) and one.average]


def _first(inputs: Inputs) -> Tensor:
    return next(x for x in pytree.tree_leaves(tuple(inputs)) if isinstance(x, Tensor))


def _speaks(inputs: Inputs, channels: tuple[int, ...]) -> bool:
    """Whether the inputs are a batch of numbers that is plainly no white noise."""
    for x, channel in zip(pytree.tree_leaves(tuple(inputs)), channels, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 3 or len(x) < FEWEST or x.is_meta:
            continue
        try:
            if plainly_not_white(InputMoments.of(x, channel), x.numel()) or plainly_smooth(x, channel):
                return True
        except InputError:  # zeros, or all the same: examples that give the shapes alone
            continue
    return False


class _Fitter(fx.Interpreter):
    """Runs a module and fits its constants behind averages on the way, the first one first."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.measured: list[tuple[str, float, float]] = []

    def run_node(self, n: fx.Node) -> Any:
        one = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(one, Scale) and one.average:
            planned = one.factor**-2
            q = one.fit(self.fetch_args_kwargs_from_env(n)[0][0])
            if one.factor**-2 != planned:
                self.measured.append((str(n.target), planned, q))
        return super().run_node(n)


__all__ = ["Calibration", "averages", "calibrate"]
