"""Where the results of a recurrent layer differ: time steps, layers and directions are drawn, and told apart.

    y [batch, time, directions H]      h, c [layers directions, batch, H]

The first time step has seen one input, the last one all of them: y[:, -1] has another q than the average over time.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from kgraph.canonical import aten
from kgraph.entries import said
from kgraph.how import assumed
from kgraph.kernel import Axes, Kernel
from kgraph.rules.measured import Measured

CELLS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_MOST_STEPS = 32
STEPS = "time steps or layers of a recurrent layer counted like one, though they differ"
_MIDDLE = assumed("time steps between the first and the last of a recurrent layer counted alike")


Make = Callable[[list[Measured], Axes], Kernel]
"""The kernel of draws, given what their dimensions mean."""


def told_apart(node: fx.Node, place: int, measured: list[Measured], make: Make) -> Kernel:
    """The kernel of a result (0: all time steps of the last layer; 1, 2: last states), and those of its pieces."""
    shape = measured[0].first.shape
    *_, bidirectional, batch_first = node.args
    time = int(len(shape) == 3 and bool(batch_first)) if place == 0 else 0
    halves = 2 if bidirectional and place == 0 else 1

    def piece(start: int, length: int) -> Kernel:
        sizes = [length if d == time else size for d, size in enumerate(shape)]
        roles = ["c" if d == len(shape) - 1 else "p" if d == time else "b" for d in range(len(shape))]
        drawn = [m.narrow(time, start, length) for m in measured]
        axes = tuple(((role, size),) if size > 1 else () for role, size in zip(roles, sizes, strict=True))
        return _side_by_side(drawn, axes, halves, make)

    steps = shape[time]
    whole = piece(0, steps)
    if steps == 1:
        return whole
    if place > 0 or steps <= _MOST_STEPS:
        return whole.of_joined(time, tuple(piece(i, 1) for i in range(steps)))
    return whole.of_joined(time, (piece(0, 1), said(piece(1, steps - 2), _MIDDLE), piece(steps - 1, 1)))


def _side_by_side(drawn: list[Measured], axes: Axes, halves: int, make: Make) -> Kernel:
    """Directions of a recurrent layer, each with channels of its own."""
    dim = len(axes) - 1
    width = drawn[0].first.shape[dim] // halves
    own = (*axes[:-1], (("c", width),) if width > 1 else ())
    kernels = [make([m.narrow(dim, i * width, width) for m in drawn], own) for i in range(halves)]
    parts = tuple(part for kernel in kernels for part in kernel.parts)
    return Kernel(parts, axes, dim if halves > 1 else None)


__all__ = ["CELLS", "STEPS", "told_apart"]
