"""Folding: the constants of a transformed model go into the neighbouring weights, for inference.

Every tensor v of the graph is replaced by v' = (v - t) / s with the scale and shift under which most constants vanish
(`kgraph.passes.gauge`); weights and biases take up both. The function of the model is the same up to rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from kgraph.analysis import Change
from kgraph.canonical import aten
from kgraph.copies import copied
from kgraph.emitted import FOLD, EmittedModule
from kgraph.errors import InputError
from kgraph.modules import FunctionModule, Scale, ShapedActivation, WeightedSum
from kgraph.passes.gauge import Gauge, near, solve
from kgraph.passes.gauge_laws import Held, Laws, laws_of
from kgraph.passes.gauge_layers import Layer
from kgraph.passes.gauge_places import Constant, Place, Shaped, Sum, is_relu


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did.

    Attributes:
        changes: places whose constants are gone.
        kept: places with constants that are left, and why.
    """

    changes: tuple[Change, ...]
    kept: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.changes and not self.kept:
            return "nothing to fold: the model has no constants"
        lines = [f"{len(self.changes)} places with constants folded into neighbouring weights, {len(self.kept)} kept"]
        return "\n".join([*lines, *(f"  {one.node}: {one.after}, because {one.why}" for one in self.kept)])


def fold(model: nn.Module) -> EmittedModule:
    """A copy of a transformed model, for inference, whose constants are in its weights.

    Scales, shifts and weights of sums that `kgraph.transform` put in go into the layers around them, where all
    readers of a tensor allow it; what a zero-padded convolution, a reader that is no layer, or the model's input or
    output forbids stays where it is. ``folded.fold_report`` lists both. The outputs are the same up to rounding.

    The copy is in eval mode and not for training: a weight that took up a factor learns at another rate.

    Args:
        model: what `kgraph.transform` returned; it is left as it is.

    Raises:
        InputError: for another module.
        ModelError: a model that cannot be copied.
    """
    if not isinstance(model, EmittedModule):
        raise InputError(
            f"fold takes a model that kgraph.transform returned, got {type(model).__name__}",
            hint="Pass kgraph.transform(model), before it is wrapped",
        )
    folded = copied(model)
    assert isinstance(folded, EmittedModule)
    _name_alike(model, folded)
    folded.eval()
    laws = laws_of(folded)
    gauge = solve(folded, laws)
    _Fold(folded, laws, gauge).apply()
    return folded


def _name_alike(model: EmittedModule, folded: EmittedModule) -> None:
    """A copy reads its code again and numbers its nodes anew; the report speaks of the model's."""
    for old, new in zip(model.graph.nodes, folded.graph.nodes, strict=True):
        if old.name != new.name:
            new._rename(old.name)


@dataclass
class _Fold:
    module: EmittedModule
    laws: Laws
    gauge: Gauge
    changes: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    paths: dict[tuple[str, Any], str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.calls.update(str(n.target) for n in self.module.graph.nodes if n.op == "call_module")
        self.taken.update(name for name, _ in (*self.module.named_modules(), *self.module.named_parameters()))

    def apply(self) -> None:
        self._weights()
        for place in self.laws.places:
            if isinstance(place, Shaped):
                self._activation(place)
            elif isinstance(place, Sum):
                self._sum(place)
            else:
                self._constant(place)
        self.module.graph.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.module.meta.pop("kgraph", None)  # what it says is about the model that was folded
        self.module.meta[FOLD] = FoldReport(tuple(self.changes), tuple(self.kept))

    def _weights(self) -> None:
        biases = {layer.spot: layer for layer in self.laws.layers}
        added = {spot: moved for spot, layer in biases.items() if (moved := self._moved(layer)) is not None}
        for held, tensor in self.laws.held.items():
            moved = added.pop(held.identity, None)
            self._store(held, tensor, moved)
        for spot, moved in added.items():
            self._make_bias(biases[spot], moved)

    def _moved(self, layer: Layer) -> Tensor | None:
        """What shifts add to a bias, in the model's own units; None where there are none."""
        before, after = self._shift(layer.x), self._shift(layer.node)
        return layer.response() * before - after if before or after else None

    def _key(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return node
        path, _, name = str(node.target).rpartition(".")
        held = Held(id(getattr(self.module.get_submodule(path), name)))
        return held if held in self.laws.held else node

    def _shift(self, node: fx.Node) -> float:
        return self.gauge.shift[self._key(node)]

    def _store(self, held: Held, tensor: Tensor, moved: Tensor | None) -> None:
        scale, shift = self.gauge.scale[held], self.gauge.shift[held]
        if scale == 1.0 and shift == 0.0 and moved is None:
            return
        value = tensor.detach().double() - shift
        tensor.data = ((value if moved is None else value + moved) / scale).to(tensor.dtype)

    def _make_bias(self, layer: Layer, moved: Tensor) -> None:
        weight = layer.weight
        value = (moved / self.gauge.scale[layer.node]).to(weight)
        bias = nn.Parameter(value, requires_grad=weight.requires_grad)
        if layer.owner:
            self.module.get_submodule(layer.owner).register_parameter("bias", bias)
            return
        name = self._free("folded_bias")
        self.module.register_parameter(name, bias)
        with self.module.graph.inserting_before(layer.node):
            layer.node.args = (*layer.node.args[:2], self.module.graph.get_attr(name), *layer.node.args[3:])

    def _activation(self, place: Shaped) -> None:
        own, (left, floor) = place.module.constants, self._activation_constants(place)
        plain = {**own, "input_scale": 1.0, "output_scale": 1.0, "input_shift": 0.0, "output_shift": 0.0}
        self._record(place, own, left if floor is None else plain, plain)
        if floor is not None:
            new: nn.Module = FunctionModule(aten.clamp.default, floor)
        elif left == plain:
            new = _alone(place.module.activation)
        elif left == own:
            return
        else:
            new = ShapedActivation(_out_of_place(place.module.activation), **left)
        place.node.target = self._put(str(place.node.target), new, (floor, *left.values()))

    def _activation_constants(self, place: Shaped) -> tuple[dict[str, float], float | None]:
        """The constants that are left, and the number of a maximum that they are instead."""
        s_in, t_in = self.gauge.scale[place.x], self.gauge.shift[place.x]
        s_out, t_out = self.gauge.scale[place.node], self.gauge.shift[place.node]
        module = place.module
        if place.homogeneous:
            inner, outer = (1.0, (t_in + place.inner) / s_in), place.slope * s_in / s_out
        else:
            inner = module.input_scale * s_in, module.input_scale * t_in + module.input_shift
            outer = module.output_scale / s_out
        shift = (place.outer - t_out) / s_out
        scale, outer, moved = _snap(inner[0], 1.0), _snap(outer, 1.0), _snap(inner[1], 0.0)
        if place.is_relu and outer == 1.0 and scale == 1.0 and moved and near(shift, -moved):
            return {}, shift
        left = (scale, moved, _snap(shift, 0.0) / outer, outer)
        return dict(zip(("input_scale", "input_shift", "output_shift", "output_scale"), left, strict=True)), None

    def _sum(self, place: Sum) -> None:
        scale = self.gauge.scale[place.node]
        left = [w * self.gauge.scale[t] / scale for t, w in zip(place.terms, place.weights, strict=True)]
        left = [_snap(_snap(weight, 1.0), -1.0) for weight in left]
        names = [f"weights[{i}]" for i in range(len(left))]
        own = dict(zip(names, place.weights, strict=True))
        self._record(place, own, dict(zip(names, left, strict=True)), dict.fromkeys(names, 1.0))
        if all(weight == 1.0 for weight in left):
            self._add(place.node)
        elif tuple(left) != place.weights:
            place.node.target = self._put(str(place.node.target), WeightedSum(left), tuple(left))

    def _add(self, node: fx.Node) -> None:
        """A plain sum in the place of a weighted one."""
        total, *terms = node.args
        with self.module.graph.inserting_before(node):
            for term in terms:
                total = self.module.graph.call_function(aten.add.Tensor, (total, term))
        node.replace_all_uses_with(total)  # type: ignore[arg-type]
        self.module.graph.erase_node(node)

    def _constant(self, place: Constant) -> None:
        s_in, t_in = self.gauge.scale[place.x], self.gauge.shift[place.x]
        s_out, t_out = self.gauge.scale[place.node], self.gauge.shift[place.node]
        factor = _snap(place.factor * s_in / s_out, 1.0)
        shift = _snap((place.factor * t_in + place.shift - t_out) / s_out, 0.0)
        own = {"factor": place.factor, "shift": place.shift}
        left = {"factor": factor, "shift": shift}
        self._record(place, own, left, {"factor": 1.0, "shift": 0.0})
        node, (x, *_) = place.node, place.node.all_input_nodes
        if (factor, shift) == (1.0, 0.0):
            node.replace_all_uses_with(x)
            self.module.graph.erase_node(node)
        elif left != own:
            old = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            reason = old.reason if isinstance(old, Scale) else ""
            name = str(node.target) if old is not None else self._free("folded_scale")
            node.op, node.args, node.kwargs = "call_module", (x,), {}
            node.target = self._put(name, Scale(factor, shift / factor, reason), (factor, shift))

    def _put(self, path: str, new: nn.Module, what: tuple[Any, ...]) -> str:
        """Store a module where the old one was, or beside it where other calls of that one need other constants."""
        known = self.paths.get((path, what))
        if known is None:
            known = path if self.calls[path] <= 1 else self._free(path)
            self.paths[path, what] = known
            self.module.add_submodule(known, new)
        self.calls[path] -= 1
        return known

    def _free(self, path: str) -> str:
        name = next(name for i in itertools.count() if (name := f"{path}_{i}") not in self.taken)
        self.taken.add(name)
        return name

    def _record(self, place: Place, own: dict[str, float], left: dict[str, float], plain: dict[str, float]) -> None:
        if own == plain:
            return
        before = _words(own, plain)
        if left == plain:
            self.changes.append(Change(_name(place.node), "fold", "neighbouring weights take it up", before, ""))
            return
        if isinstance(place, Constant) and place.node.op == "call_function" and left == own:
            return  # a number of the model's own
        names = [name for node, name in self.gauge.missed if node is place.node]
        reasons = [reason for name in names for reason in self.gauge.missed[place.node, name]]
        why = "; ".join(dict.fromkeys(reasons)) or "its readers ask for different scales"
        self.kept.append(Change(_name(place.node), "keep", why, before, _words(left, plain)))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _words(constants: dict[str, float], plain: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in constants.items() if value != plain[name])


def _snap(value: float, target: float) -> float:
    return target if near(value, target) else value


def _alone(activation: nn.Module) -> nn.Module:
    """The activation without its constants."""
    return nn.ReLU() if is_relu(activation) else _out_of_place(activation)


def _out_of_place(activation: nn.Module) -> nn.Module:
    """It wrote to a tensor of its own; now it reads what others read too."""
    activation = copy.copy(activation)
    if "inplace" in vars(activation):
        vars(activation)["inplace"] = False
    return activation


__all__ = ["FoldReport", "fold"]
