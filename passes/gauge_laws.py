"""What every operation asks of the scales and shifts of its tensors, where all are replaced by v' = (v - t) / s.

A tensor v may be stored as v' with a scale s > 0 and a shift t of its own, if all that make and read it agree. Every
operation is an equation between logarithms of scales, and one between shifts, that s = 1 and t = 0 fulfil:

    reshape, pool, concat    s_out = s_in, t_out = t_in
    W x + b                  s_out = s_W s_x = s_b; t_out and t_x go into b (t_x = 0 where zeros are padded)
    a + b                    s_out = s_a = s_b, t_out = t_a + t_b
    a * b                    s_out = s_a s_b, no shifts
    anything else            s = 1, t = 0

Weights are tensors like others: one that several layers read is one unknown, so they agree or keep it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from kgraph.canonical import operation_name
from kgraph.emitted import EmittedModule
from kgraph.modules import Scale, ShapedActivation, ShapedAttention, WeightedSum
from kgraph.passes.gauge_layers import Layer, layer_of
from kgraph.passes.gauge_names import CARRY, CARRY_SCALE, pads, pads_a_number
from kgraph.passes.gauge_places import Constant, Place, Shaped, Sum, constant_of

_PRODUCTS = {"matmul", "bmm", "mm"}


@dataclass(frozen=True)
class Held:
    """A parameter or buffer, by its identity: however many names and readers it has."""

    identity: int


@dataclass(frozen=True)
class Law:
    """``sum terms[v] x_v = 0`` for x = log s or x = t."""

    terms: Mapping[Hashable, float]
    why: str = ""


@dataclass
class Laws:
    """What a graph asks.

    Attributes:
        scales, shifts: the equations that must hold.
        layers: affine layers, whose weights and biases take scales and shifts up.
        places: constants that are to vanish.
        held: every parameter and buffer that the graph reads.
    """

    scales: list[Law] = field(default_factory=list)
    shifts: list[Law] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    held: dict[Held, Tensor] = field(default_factory=dict)


def laws_of(module: EmittedModule) -> Laws:
    """Read the graph."""
    reader = _Reader(module)
    for node in module.graph.nodes:
        reader.read(node)
    reader.share_biases()
    return reader.laws


class _Reader:
    def __init__(self, module: EmittedModule) -> None:
        self.module, self.laws = module, Laws()
        self.values: set[Held] = set()  # what is read as a tensor, not as a weight or bias

    def key(self, node: fx.Node) -> Hashable:
        """The unknown of a node: itself, or what it holds."""
        if node.op == "get_attr":
            tensor = self.tensor(str(node.target))
            if tensor is not None:
                return self.hold(tensor)
        return node

    def tensor(self, name: str) -> Tensor | None:
        path, _, field_name = name.rpartition(".")
        value = getattr(self.module.get_submodule(path), field_name, None)
        return value if isinstance(value, Tensor) and value.is_floating_point() else None

    def hold(self, tensor: Tensor) -> Held:
        held = Held(id(tensor))
        self.laws.held[held] = tensor
        return held

    def law(self, terms: Mapping[Hashable, float], shifts: Mapping[Hashable, float] | None = None) -> None:
        self.laws.scales.append(Law(terms))
        self.laws.shifts.append(Law(terms if shifts is None else shifts))

    def same(self, out: Hashable, others: Iterable[Hashable]) -> None:
        for other in others:
            if other != out:
                self.law({out: 1.0, other: -1.0})

    def pin(self, keys: Iterable[Hashable], why: str) -> None:
        for key in keys:
            self.laws.scales.append(Law({key: 1.0}, why))
        self.unshifted(keys, why)

    def unshifted(self, keys: Iterable[Hashable], why: str) -> None:
        self.laws.shifts += [Law({key: 1.0}, why) for key in keys]

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.pin([node], "it is the model's input")
        elif node.op == "output":
            self.pin([self.key(n) for n in node.all_input_nodes], "it is the model's output")
            self.note_values(node)
        elif node.op == "get_attr":
            if self.key(node) is node:
                self.pin([node], "it holds no numbers")
        elif node.op == "call_module":
            self.read_module(node, self.module.get_submodule(str(node.target)))
        else:
            self.read_function(node, operation_name(node))

    def read_module(self, node: fx.Node, module: nn.Module) -> None:
        """Weights of a layer have unknowns; parameters of all else stay as they are."""
        inputs = list(node.args)
        tensors = [one for one in inputs if isinstance(one, fx.Node)]
        layer = layer_of(node, module)
        if module._forward_hooks or module._forward_pre_hooks or len(tensors) != len(inputs) or node.kwargs:
            self.opaque(node, module, "hooks or other arguments change what it does")
        elif layer is not None:
            self.affine(layer, self.hold(layer.weight), None if layer.bias is None else self.hold(layer.bias))
        elif isinstance(module, ShapedActivation):
            self.laws.places.append(Shaped(node, self.key(tensors[0]), module))
            self.note_values(node)
            self.pin(map(self.hold, module.parameters()), "it is an activation's own parameter")
            self.pin(map(self.key, tensors[1:]), "it is an activation's slope")
        elif isinstance(module, WeightedSum):
            self.note_values(node)
            place = Sum(node, tuple(map(self.key, tensors)), module.weights)
            self.laws.places.append(place)
            self.laws.shifts.append(_sum_law(node, place.terms, place.weights))
        elif isinstance(module, Scale) and module.factor:
            self.constant(Constant(node, tensors[0], module.factor, module.factor * module.shift))
        elif isinstance(module, ShapedAttention):
            self.pin(map(self.hold, module.parameters()), "it is a parameter of an attention")
            self.attention(node)
        elif not getattr(module, "return_indices", False) and not list(module.parameters()):
            self.carried(node, type(module).__name__, module)
        else:
            self.opaque(node, module)

    def opaque(self, node: fx.Node, module: nn.Module, why: str = "") -> None:
        """What is not known to be linear, or to keep a factor."""
        why = why or f"{node.name} ({type(module).__name__}) does not pass a factor on"
        tensors = [*module.parameters(), *module.buffers()]
        held = [self.hold(tensor) for tensor in tensors if tensor.is_floating_point()]
        self.note_values(node)
        self.pin([node, *map(self.key, node.all_input_nodes), *held], why)

    def note_values(self, node: fx.Node) -> None:
        self.values |= {key for n in node.all_input_nodes if isinstance(key := self.key(n), Held)}

    def read_function(self, node: fx.Node, name: str) -> None:
        layer = layer_of(node, None)
        if layer is not None and not any(isinstance(value, fx.Node) for value in node.kwargs.values()):
            self.function_layer(node, layer)
            return
        self.note_values(node)
        constant, first = constant_of(node), [n for n in node.args[:2] if isinstance(n, fx.Node)]
        if constant is not None:
            self.constant(constant)
        elif name in ("add", "sub") and len(first) == 2:
            self.sum(node, first, -1.0 if name == "sub" else 1.0)
        elif (name == "mul" and len(first) == 2) or name in _PRODUCTS:
            self.product(node, first)
        elif name == "scaled_dot_product_attention":
            self.attention(node)
        elif name == "embedding":
            self.table(node, self.key(first[0]), self.key(first[1]))
        elif name == "prelu":
            self.homogeneous(node, first[:1])
            self.pin([self.key(first[1])], "it is an activation's slope")
        else:
            self.carried(node, name, None)

    def carried(self, node: fx.Node, name: str, module: nn.Module | None) -> None:
        """Operations that pass scales, or both, from what they read first."""
        given = node.args[0] if node.args else None
        data = [n for n in given if isinstance(n, fx.Node)] if isinstance(given, (list, tuple)) else [given]
        if name in ("maximum", "minimum"):
            data = list(node.args[:2])
        nodes = [n for n in data if isinstance(n, fx.Node)]
        if name not in CARRY | CARRY_SCALE or len(nodes) != len(data) or pads_a_number(node, name):
            why = f"{node.name} ({name}) does not pass a factor on"
            self.pin([node, *map(self.key, node.all_input_nodes)], why)
            return
        others = [n for n in node.all_input_nodes if n not in nodes]
        self.pin(map(self.key, others), f"{node.name} reads it as a size or an index")
        if name in CARRY or (name.lower().startswith("avg") and not pads(node, module)):
            self.same(node, map(self.key, nodes))
        else:
            self.homogeneous(node, nodes)

    def homogeneous(self, node: fx.Node, nodes: list[fx.Node]) -> None:
        for other in map(self.key, nodes):
            self.laws.scales.append(Law({node: 1.0, other: -1.0}))
            self.unshifted([other], f"{node.name} changes it")
        self.unshifted([node], f"{node.name} makes it")

    def constant(self, place: Constant) -> None:
        self.note_values(place.node)
        self.laws.places.append(Constant(place.node, self.key(place.x), place.factor, place.shift))

    def sum(self, node: fx.Node, terms: list[fx.Node], sign: float) -> None:
        alpha = node.kwargs.get("alpha", 1.0)
        if not isinstance(alpha, (int, float)):
            self.pin([node, *map(self.key, node.all_input_nodes)], f"{node.name} has a factor that is not a number")
            return
        keys = [self.key(n) for n in terms]
        self.laws.scales += [Law({node: 1.0, key: -1.0}) for key in keys]
        self.laws.shifts.append(_sum_law(node, keys, (1.0, sign * alpha)))

    def product(self, node: fx.Node, factors: list[fx.Node]) -> None:
        keys = [self.key(n) for n in factors]
        self.laws.scales.append(_sum_law(node, keys, [1.0] * len(keys)))  # of logarithms
        self.unshifted([node, *keys], f"{node.name} is a product")

    def attention(self, node: fx.Node) -> None:
        """The logits stay as they are; the values' scale passes."""
        query, key, value, *others = (self.key(n) for n in node.args if isinstance(n, fx.Node))
        self.note_values(node)
        self.pin([*others, *(self.key(n) for n in node.kwargs.values() if isinstance(n, fx.Node))], "it is a mask")
        self.laws.scales += [Law({query: 1.0, key: 1.0}), Law({node: 1.0, value: -1.0})]
        self.unshifted([node, query, key, value], f"{node.name} is an attention")

    def function_layer(self, node: fx.Node, layer: Layer) -> None:
        """A layer whose weights are tensors of the graph, perhaps computed."""
        args = [n for n in node.args[1:3] if isinstance(n, fx.Node)]
        weight = self.key(args[0])
        bias = self.key(args[1]) if len(args) > 1 else None
        if isinstance(weight, Held) and (bias is None or isinstance(bias, Held)):
            tensors = (self.laws.held[weight], None if bias is None else self.laws.held[bias])
            self.affine(layer.of(*tensors), weight, bias)
            return
        x = self.key(layer.x)
        self.law({node: 1.0, x: -1.0, weight: -1.0}, {x: 1.0})
        self.unshifted([weight], "it is a weight")
        if bias is not None:
            self.law({node: 1.0, bias: -1.0})
        else:
            self.unshifted([node], f"{node.name} has no bias, and a weight that is computed")

    def affine(self, layer: Layer, weight: Held, bias: Held | None) -> None:
        x = self.key(layer.x)
        if layer.kind == "table":
            self.table(layer.node, weight, x)
            return
        self.values |= {x} if isinstance(x, Held) else set()
        self.laws.layers.append(layer)
        self.laws.scales.append(Law({layer.node: 1.0, x: -1.0, weight: -1.0}))
        self.unshifted([weight], "it is a weight")
        if bias is not None:
            self.laws.scales.append(Law({layer.node: 1.0, bias: -1.0}))
        if layer.border:
            self.unshifted([x], f"{layer.node.name} {layer.border}")

    def table(self, node: fx.Node, weight: Hashable, index: Hashable) -> None:
        """Rows of an embedding, which may be the weights of a layer as well."""
        self.law({node: 1.0, weight: -1.0}, {node: 1.0})
        self.unshifted([weight], "it is a weight")
        self.pin([index], "it is an index")

    def share_biases(self) -> None:
        """One bias of several calls can take one shift; one that is read as a tensor as well takes none."""
        spots: dict[Hashable, list[Layer]] = defaultdict(list)
        weights = {Held(id(layer.weight)) for layer in self.laws.layers}
        for layer in self.laws.layers:
            spots[layer.spot].append(layer)
        for first, *others in spots.values():
            bias = None if first.bias is None else Held(id(first.bias))
            if bias is not None and (bias in self.values or bias in weights):
                ends = [end for one in (first, *others) for end in (one.node, self.key(one.x))]
                self.unshifted(ends, f"the bias of {first.node.name} is read elsewhere as well")
            for other in others:  # a bias that is yet to be made has one scale as well
                self.law({first.node: 1.0, other.node: -1.0})
                if first.weight is other.weight:
                    self.laws.shifts.append(Law({self.key(first.x): 1.0, self.key(other.x): -1.0}))
                else:
                    self.unshifted([self.key(first.x), self.key(other.x)], "layers of other weights share its bias")


def _sum_law(node: fx.Node, terms: Sequence[Hashable], weights: Sequence[float]) -> Law:
    """``x_node = sum_i weights[i] x_terms[i]``."""
    total: defaultdict[Hashable, float] = defaultdict(float, {node: 1.0})
    for key, weight in zip(terms, weights, strict=True):
        total[key] -= weight
    return Law(dict(total))


__all__ = ["Held", "Law", "Laws", "laws_of"]
