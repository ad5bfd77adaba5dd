"""Re-draw affine layers: bias 0, weights from the scaled-corrected uniform orthogonal (SUO) or Gaussian law.

Convolutions use the Delta form: only the tap that meets the output position is nonzero. A convolution whose
windows do not overlap (a patch embedding) spreads the same orthogonal matrix over its window instead, so that no
pixel is lost. One that mixes few channels (colours) reads its whole window too, of the size that zeros at the borders
leave it: cosines of single pixels scatter, and averages over positions would keep what functions make of that.
Entrywise gains of branches (LayerScale, SkipInit) are set to 1: they would break q = 1.

Source: Martens et al. 2021, arXiv 2110.01765; Xiao et al. 2018, arXiv 1806.05393.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import aten, operation_name
from kgraph.checks import choice, flag
from kgraph.passes.affine import CONVOLUTIONS, TRANSPOSED
from kgraph.passes.base import Pass, Workspace
from kgraph.passes.computed_weights import is_moved, is_normalization
from kgraph.passes.convolutions import geometry_of, is_stem, read_share, single_position
from kgraph.rules.weights import mean_square
from kgraph.site import shape_of
from kgraph.weight_laws import Filled, WeightLaw


@dataclass(frozen=True)
class Reinitialize(Pass):
    """Re-draw all affine layers.

    Args:
        distribution: "suo" or "gaussian" (of the mean square of its law exactly: constants that follow do not depend
            on the draw, and another model's state dict fits).
        delta: Delta form for convolutions.
    """

    distribution: str = "suo"
    delta: bool = True

    def __post_init__(self) -> None:
        choice("distribution", self.distribution, ("suo", "gaussian"))
        flag("delta", self.delta)

    def rewrite(self, work: Workspace) -> None:
        generator = work.generator
        done: set[str] = set()
        for node in work.nodes:
            name = operation_name(node)
            if name in ("linear", *CONVOLUTIONS, *TRANSPOSED) and work.is_random(node.args[0]):
                self._layer(work, node, 1, 2, done, generator)
            elif name == "addmm" and work.is_random(node.args[1]):
                self._layer(work, node, 2, 0, done, generator)
            elif name in ("matmul", "mm") and work.is_random(node.args[0]) and not work.is_random(node.args[1]):
                self._layer(work, node, 1, None, done, generator)
            elif node.target is aten.mul.Tensor:
                _neutralize_gain(work, node)
            elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
                work.keep(node, "recurrent weights", "recurrent cells keep their own initialization")

    def broken(self, work: Workspace) -> str:
        bad = {
            str(weight.target)
            for node in work.nodes
            if operation_name(node) in ("linear", *CONVOLUTIONS) and work.is_random(node.args[0])
            if isinstance(weight := node.args[1], fx.Node) and weight.op == "get_attr"
            if isinstance(work.tensor(weight), nn.Parameter)
            if not _keeps_q(work.tensor(weight), read_share(node, work.tensor(weight)))
        }
        return f"{', '.join(sorted(bad))} do not keep q" if bad else ""

    def _layer(
        self,
        work: Workspace,
        node: fx.Node,
        at: int,
        bias_at: int | None,
        done: set[str],
        generator: torch.Generator,
    ) -> None:
        parameter, factor = drawn_weight(work, node, at)
        if parameter is None:
            keep_weight(work, node)
            return
        target = str(parameter.target)
        if target in done:
            work.notes.append(f"{target} is used by several layers; it was drawn once")
            if bias_at is not None:
                _zero_bias(work, node, bias_at)  # which may be of its own
            return
        done.add(target)
        work.settled.add(target)
        weight = work.tensor(parameter)
        if not weight.numel():
            work.keep(node, f"{operation_name(node)} of size 0", "it has no weights to draw")
            return
        if weight.ndim < 2:
            keep_weight(work, node, "a vector, which no law of matrices is for")
            return
        before = f"std {mean_square(weight) ** 0.5:.3g}"
        law = work.laws[target] = self._law(node, weight, factor)
        law.draw_(weight, generator)
        note_scale(work, parameter, factor)
        if bias_at is not None:
            _zero_bias(work, node, bias_at)
        work.record(node, f"re-draw {operation_name(node)}", f"{self.distribution}, bias 0", before, _spread(weight))

    def _law(self, node: fx.Node, weight: Tensor, factor: float) -> WeightLaw:
        name = operation_name(node)
        geometry: dict[str, Any] = {"corrected": True}
        if name in ("addmm", "matmul", "mm"):
            return WeightLaw(self.distribution, geometry, flipped=True, divisor=factor)  # type: ignore[arg-type]
        if name != "linear":
            geometry |= geometry_of(node, transposed=name in TRANSPOSED)
            overlapping = any(s < k for s, k in zip(_wide(geometry["stride"], weight), weight.shape[2:], strict=True))
            geometry["delta"] = self.delta and (overlapping or name in TRANSPOSED) and not is_stem(node, weight)
            factor *= 1.0 if geometry["delta"] else read_share(node, weight) ** 0.5
        each_tap = bool(geometry.get("transposed")) and single_position(node)
        even = not geometry.get("delta", True) and is_stem(node, weight)
        return WeightLaw(self.distribution, geometry, each_tap=each_tap, divisor=factor, even=even)  # type: ignore[arg-type]


def _keeps_q(weight: Tensor, share: float = 1.0) -> bool:
    """fan_in E[W^2] = 1, up to rounding; of the taps that are met."""
    if weight.is_meta or not weight.numel():
        return True
    return abs(mean_square(weight) * weight[0].numel() * share - 1) < 1e-3 + torch.finfo(weight.dtype).eps


def _spread(weight: Tensor) -> str:
    share = float((weight != 0).double().mean()) if not weight.is_meta else 1.0
    return f"std {mean_square(weight) ** 0.5:.3g}" + (f", {share:.0%} nonzero" if share < 0.999 else "")


def _wide(value: Any, weight: Tensor) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * (weight.ndim - 2) if len(values) == 1 else values


def drawn_weight(work: Workspace, node: fx.Node, at: int) -> tuple[fx.Node | None, float]:
    """The parameter to draw for a layer, and the number that the forward multiplies it by."""
    return runtime_scale(work, node.args[at]) or (direct_weight(work, node, at), 1.0)


def divide_scale(work: Workspace, parameter: fx.Node, factor: float) -> None:
    """Make the product with the scale of the forward what was drawn."""
    if factor != 1:
        work.tensor(parameter).data /= factor
    note_scale(work, parameter, factor)


def note_scale(work: Workspace, parameter: fx.Node, factor: float) -> None:
    """Say that the forward multiplies a drawn parameter by a number."""
    if factor != 1:
        note = f"{parameter.target} is used times {factor:.4g}: the scale is kept, and the parameter drawn for it"
        work.notes.append(note)


def runtime_scale(work: Workspace, weight: object) -> tuple[fx.Node, float] | None:
    """(parameter, factor) of a weight that is a parameter times numbers, as under an equalized learning rate."""
    factor, node = 1.0, weight
    while isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.div.Tensor):
        first, second = node.args[:2]
        number = _number(work, second)
        if number is None and node.target is aten.mul.Tensor:
            first, number = second, _number(work, first)
        if number is None or number == 0:
            return None
        factor, node = (factor * number if node.target is aten.mul.Tensor else factor / number), first
    plain = isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(work.tensor(node), nn.Parameter)
    return (node, factor) if plain and node is not weight else None  # pyright: ignore[reportReturnType]


def _number(work: Workspace, value: object) -> float | None:
    """A number, or a buffer that holds one."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    tensor = work.tensor(value)
    fixed = tensor.numel() == 1 and not isinstance(tensor, nn.Parameter) and not tensor.is_meta
    return float(tensor) if fixed else None


def direct_weight(work: Workspace, node: fx.Node, at: int) -> fx.Node | None:
    """The parameter node of a layer; a weight normalized from one parameter of its shape is replaced by it.

    Weight standardization is such a computation: it would normalize the new weight away. A buffer (a fixed filter, a
    fixed projection) is part of the model and no weight, and so is what computes a weight otherwise (a mask).
    """
    weight = node.args[at]
    if not isinstance(weight, fx.Node):
        return None
    if weight.op == "get_attr":
        return weight if isinstance(work.tensor(weight), nn.Parameter) else None
    shape = shape_of(weight)
    origins = [n for n in _ancestors(weight) if n.op == "get_attr" and work.tensor(n).requires_grad]
    same = [n for n in origins if tuple(work.tensor(n).shape) == shape]
    if len(same) != 1:
        return None
    if is_moved(weight, same[0]):
        return same[0]
    if not is_normalization(work, weight, same[0]):
        return None
    node.args = tuple(same[0] if i == at else a for i, a in enumerate(node.args))
    node.meta.pop("group_size", None)  # no longer what the user's module computes: stays functional
    why = "it would normalize the new weight away"
    work.record(node, "remove weight normalization", why, "computed weight", str(same[0].target))
    return same[0]


def keep_weight(work: Workspace, node: fx.Node, what: str = "") -> None:
    """Say that a layer's weight was not drawn: it is a buffer, or computed, and not by a normalization."""
    what = what or _computation(work, node)
    work.keep(node, "weight", f"it is {what}")
    work.unmet.append(f"{node.name}: its weight is {what}, and was not drawn")


def _computation(work: Workspace, node: fx.Node) -> str:
    """How the weight of a layer comes about."""
    weight = next((a for a in node.args[1:] if isinstance(a, fx.Node) and not work.is_random(a)), None)
    origins = [] if weight is None else [n for n in _ancestors(weight) if n.op == "get_attr"]
    names = [str(n.target) for n in origins if isinstance(work.tensor(n), nn.Parameter)]
    if weight is None or weight.op == "get_attr" or not names:
        return "no parameter, nor computed from one alone"
    return f"computed from {', '.join(names[:3])} ({operation_name(weight)}), which is kept"


def _ancestors(node: fx.Node) -> list[fx.Node]:
    found, queue = [], [node]
    while queue:
        for before in queue.pop().all_input_nodes:
            if before not in found:
                found.append(before)
                queue.append(before)
    return found


def _zero_bias(work: Workspace, node: fx.Node, at: int) -> None:
    bias = node.args[at] if len(node.args) > at else None
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        with torch.no_grad():
            work.tensor(bias).zero_()
        work.settled.add(str(bias.target))
        work.laws[str(bias.target)] = Filled(0.0)


def _neutralize_gain(work: Workspace, node: fx.Node) -> None:
    """``branch * parameter``: LayerScale 1e-6, SkipInit 0 and their like become 1."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    gains = [a for a in operands if _parameter_behind(work, a) is not None]
    if len(operands) != 2 or len(gains) != 1 or not any(work.is_random(a) for a in operands):
        return
    parameter = _parameter_behind(work, gains[0])
    assert parameter is not None
    tensor = work.tensor(parameter)
    if not tensor.requires_grad:
        return
    before = f"rms {mean_square(tensor) ** 0.5:.3g}"
    with torch.no_grad():
        tensor.fill_(1.0)
    work.settled.add(str(parameter.target))
    work.laws[str(parameter.target)] = Filled(1.0)
    work.record(node, "neutralize gain", f"{parameter.target} would break q = 1", before, "1")


def _parameter_behind(work: Workspace, node: fx.Node) -> fx.Node | None:
    while node.op == "call_function" and operation_name(node) in ("reshape", "view", "unsqueeze", "expand"):
        before = node.args[0]
        if not isinstance(before, fx.Node):
            return None
        node = before
    return node if node.op == "get_attr" else None
