"""Which argument of an operation follows train and eval mode: one table for emission, analysis and reports."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from kgraph.canonical import DROPOUTS, aten

_NORMS = (aten.batch_norm.default, aten.instance_norm.default)
_CELLS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_PACKED = (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)


class ModeArgument(NamedTuple):
    """Place of an argument, and what it is in train and in eval mode."""

    place: int
    train: Any
    evaluate: Any


def mode_argument(node: fx.Node) -> ModeArgument | None:
    """The argument of a node, captured in train mode, that ``train()`` and ``eval()`` change; None if nothing does.

    A dropout that drops in eval mode too ("always" among its metadata) follows nothing.

    Dropout of rate 0 and norms without running statistics do the same in both. A batch norm of a weight (weight
    standardization) belongs to no mode.
    """
    args: list[Any] = list(node.args)
    if node.op != "call_function" or node.meta.get("weight_only") or node.meta.get("always"):
        return None
    if node.target in DROPOUTS and args[2] and args[1]:
        return ModeArgument(2, args[2], False)
    if node.target is aten.rrelu.default and len(args) > 3 and args[3]:
        return ModeArgument(3, args[3], False)
    if node.target in _NORMS and args[5] and args[3] is not None:
        return ModeArgument(5, True, False)
    if node.target is aten.scaled_dot_product_attention.default and len(args) > 4 and args[4]:
        return ModeArgument(4, args[4], 0.0)
    rate = 5 if node.target in _CELLS else 6 if node.target in _PACKED else None
    if rate is not None and args[rate] and args[rate + 1]:  # the rate of its dropout, and whether it drops
        return ModeArgument(rate, args[rate], 0.0)
    return None


def depends_on_mode(graph: fx.Graph) -> bool:
    """Whether a captured graph, or a module it calls, computes something else in eval mode."""
    owner = graph.owning_module
    called = [owner.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"] if owner else []
    inner = [m.graph for one in called for m in one.modules() if isinstance(m, fx.GraphModule)]
    return any(mode_argument(node) is not None for one in (graph, *inner) for node in one.nodes)


__all__ = ["ModeArgument", "depends_on_mode", "mode_argument"]
