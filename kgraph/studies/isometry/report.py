"""How far a network is from dynamical isometry: chi and depth scales by layer, the Jacobian predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from kgraph.canonical import operation_name
from kgraph.capture import Graph, capture
from kgraph.checks import choice, flag, seeded, with_values
from kgraph.checks import count as count_of
from kgraph.errors import InputError
from kgraph.maps import Pointwise
from kgraph.meanfield import JacobianMoments, Moments, depth_scale, fourier_multipliers, mean_field, tap_shares
from kgraph.nonlinear import Region, find_regions
from kgraph.propagate import Propagation, propagate
from kgraph.report.numbers import count, elide, short
from kgraph.rules.weights import mean_square
from kgraph.site import shape_of, site_of
from kgraph.studies.isometry.chain import (
    CONVOLUTIONS,
    TRANSPOSED,
    bias_of,
    convolution_moments,
    convolution_options,
    next_affine,
    predict,
    reads_border,
    weight_of,
)
from kgraph.studies.isometry.measured import MeasuredJacobian, Segment, between, measure_jacobian
from kgraph.studies.tables import LayerReport, shown, table_of
from kgraph.suggestions import no_node

_NEAR = 1e-3
"""|chi_1 - 1| below which chi_c = 2 - chi_1 in the chaotic phase: the c map's bend, to first order."""
_MODES_KEPT = 256


@dataclass(frozen=True)
class LayerIsometry:
    """One nonlinear layer and the affine layer that reads it.

    Attributes:
        name, module: of the layer's node. depth: nonlinear layers up to it.
        q: q value of what enters it.
        sigma_w2, sigma_b2: measured on the affine layer behind it; nan where there is none.
        chi_1, chi_q: slopes of the c map at 1 and of the q map.
        xi_q, xi_c: depth scales of a network of layers like this one.
        multipliers: what the convolution behind it does to every Fourier mode of the per-position variances, flattened
            (circular; of more than 256 positions the largest and the smallest); () where there is no convolution.
    """

    name: str
    module: str
    depth: int
    q: float
    sigma_w2: float
    sigma_b2: float
    chi_1: float
    chi_q: float
    xi_q: float
    xi_c: float
    multipliers: tuple[float, ...] = ()

    @property
    def distance(self) -> float:
        """chi_1 - 1: order below 0, chaos above."""
        return self.chi_1 - 1


@dataclass(frozen=True)
class Isometry(LayerReport):
    """Report on a network's dynamical isometry.

    Attributes:
        model: class name.
        start, end: nodes between which the Jacobian is taken.
        layers: nonlinear layers, in order.
        predicted_mean, predicted_variance: of the squared singular values of the Jacobian, by the theory of wide
            chains from the weights' own moments; nan where that does not apply (see the notes).
        measured: the same on this network and the first example input; None where it was left out.
        notes: remarks in plain words.
    """

    model: str
    start: str
    end: str
    layers: tuple[LayerIsometry, ...]
    predicted_mean: float
    predicted_variance: float
    measured: MeasuredJacobian | None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerIsometry:
        """The layer farthest from criticality."""
        known = [layer for layer in self.layers if math.isfinite(layer.chi_1)]
        if not known:
            raise InputError(
                f"no layer of {self.model} is read by an affine layer", hint="There is no chi_1 to compare"
            )
        return max(known, key=lambda layer: abs(layer.distance))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON-ready data."""
        layers = [asdict(layer) | {"distance": layer.distance} for layer in self.layers]
        return asdict(self) | {"layers": layers, "notes": list(self.notes)}

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        rows = shown(len(self.layers), all_nodes)
        heads = ("layer", "depth", "q", "σw²", "σb²", "χ₁-1", "ξq", "ξc", "λ slowest", "λ fastest")
        table = table_of(heads, 1, (_cells(self.layers[i], max(12, width - 86)) for i in rows))
        parts: list[RenderableType] = [Text(line, style="bold") for line in self._summary()]
        parts += [Text(""), table]
        if len(rows) < len(self.layers):
            hidden = count(len(self.layers) - len(rows), "layer")
            parts.append(Text(f"{hidden} hidden (all_nodes=True shows all)", style="dim"))
        return parts + [Text(f"note: {note}", style="dim") for note in self.notes]

    def _summary(self) -> Iterator[str]:
        yield f"Isometry of {self.model}: {count(len(self.layers), 'nonlinear layer')}"
        yield f"Squared singular values of the Jacobian {self.start} -> {self.end}:"
        if math.isfinite(self.predicted_mean):
            yield f"  predicted  mean {short(self.predicted_mean)}, variance {short(self.predicted_variance)}"
        if self.measured is not None:
            m = self.measured
            errors = [f" +- {short(e)}" if e else "" for e in (m.mean_error, m.variance_error)]
            line = f"  measured   mean {short(m.mean)}{errors[0]}, variance {short(m.variance)}{errors[1]}"
            yield f"{line}, largest value {short(m.largest)} ({m.how}, {m.shape[0]} x {m.shape[1]})"


def _cells(layer: LayerIsometry, width: int) -> list[str]:
    distance = layer.distance
    near = "0" if abs(distance) < 1e-12 else short(distance)
    cells = [elide(layer.module or layer.name, width), str(layer.depth), short(layer.q)]
    cells += [short(layer.sigma_w2), short(layer.sigma_b2), near, short(layer.xi_q), short(layer.xi_c)]
    modes = sorted(layer.multipliers)[::-1][1:]  # without the constant one
    return cells + ([short(modes[0]), short(modes[-1])] if modes else ["", ""])


def isometry(
    model: nn.Module | Graph,
    example_inputs: object = None,
    *,
    start: str | None = None,
    end: str | None = None,
    mode: str = "eval",
    measure: bool = True,
    probes: int = 32,
    seed: int = 0,
) -> Isometry:
    """Whether signals and gradients keep their size: chi_1 by layer, and the Jacobian's squared singular values.

    At criticality with orthogonal weights their mean is 1 and their variance L (mu_2 / mu_1^2 - 1); with Gaussian
    weights it is larger by L.

    Args:
        model: any bare module or captured graph; its weights as they are.
        example_inputs: tensor, tuple or dict; inferred when None. The first one is where the Jacobian is taken; the
            kernel is that of inputs with q = 1.
        start, end: names of nodes (or "input", "output") between which the Jacobian is taken. By default what enters
            the first nonlinear layer and what enters the last, so that neither the encoder nor the classifier counts;
            input and output where there is one nonlinear layer at most.
        mode: "eval" or "train".
        measure: also measure the Jacobian: by SVD up to 1,024 inputs, else by ``probes`` random probes and Lanczos.
        seed: of the probes.

    Raises:
        InputError: an unknown node, or no path between the two; and what `kgraph.analyze` raises.

    Source: Pennington et al. 2017, arXiv 1711.04735; Xiao et al. 2018, arXiv 1806.05393.
    """
    count_of("probes", probes, 2, "A standard error needs a whole number of at least 2")
    choice("mode", mode, ("train", "eval"))
    flag("measure", measure)
    seed = seeded(seed)
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (isinstance(value, str) and value):
            raise InputError(f"{name} is {value!r}", hint="Pass the name of a node")
    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    with_values(graph.root)
    result = propagate(graph, mode=mode)
    regions = [r for r in find_regions(graph.module, lambda n: n in result.kernels()) if r.source in result.kernels()]
    first, last = _ends(graph, regions, start, end)
    nodes = between(graph, first, last)
    qs = {region.source: _q(result, region.source) for region in regions}
    moments, reason = predict(nodes, first, {region.end: region for region in regions}, qs)
    measured = measure_jacobian(Segment(graph, first, last, mode), probes=probes, seed=seed) if measure else None
    notes = [f"no prediction of the spectrum: {reason}"] if moments is None else _border_note(nodes)
    layers = tuple(_layers(graph, regions, qs))
    moments = moments or JacobianMoments(math.nan, math.nan)
    variance = moments.second - moments.mean**2
    return Isometry(
        graph.name, first.name, last.name, layers, moments.mean, variance, measured, (*notes, *_input_note(graph))
    )


def _q(result: Propagation, node: fx.Node) -> float:
    return float(result.kernels()[node].merged.q)


def _ends(graph: Graph, regions: list[Region], start: str | None, end: str | None) -> tuple[fx.Node, fx.Node]:
    nodes = {node.name: node for node in graph.module.graph.nodes}
    inputs = [node for node in nodes.values() if node.op == "placeholder"]
    outputs = [n for node in nodes.values() if node.op == "output" for n in node.all_input_nodes]
    chain = len(regions) > 1 and regions[0].source is not regions[-1].source
    whole = {"input": inputs[0], "output": outputs[0]}
    first = regions[0].source if chain and start is None else _named(start or "input", nodes | whole)
    last = regions[-1].source if chain and end is None else _named(end or "output", nodes | whole)
    return first, last


def _named(name: str, nodes: dict[str, fx.Node]) -> fx.Node:
    if name not in nodes:
        raise no_node(name, nodes)
    return nodes[name]


def _layers(graph: Graph, regions: list[Region], qs: dict[fx.Node, float]) -> Iterator[LayerIsometry]:
    depth: dict[fx.Node, int] = {}
    ends = {region.end: region for region in regions}
    known: dict[tuple[float, ...], float] = {}
    for node in graph.module.graph.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0) + (node in ends)
        if node in ends and not ends[node].gate:
            yield _layer(ends[node], depth[node], qs[ends[node].source], known)


def _layer(region: Region, depth: int, q: float, known: dict[tuple[float, ...], float]) -> LayerIsometry:
    behind, nan = next_affine(region.end), math.nan
    name, module = region.end.name, site_of(region.end).path
    weight = weight_of(behind) if behind is not None else None
    if behind is None or weight is None:
        return LayerIsometry(name, module, depth, q, nan, nan, nan, nan, nan, nan)
    bias = bias_of(behind)
    sw2, sb2 = _sigma_w2(behind, weight), mean_square(bias) if bias is not None else 0.0
    moments = Moments(region.fn, q)
    chi_1, chi_q = sw2 * moments.mu(1), sw2 * moments.q_slope()
    chi_c = _chi_c(region.fn, sw2, sb2, q, chi_1, known)
    modes: tuple[float, ...] = ()
    if operation_name(behind) in CONVOLUTIONS:
        modes = _modes(behind, weight, shape_of(region.end)[2:])
    return LayerIsometry(name, module, depth, q, sw2, sb2, chi_1, chi_q, depth_scale(chi_q), depth_scale(chi_c), modes)


def _chi_c(
    fn: Pointwise, sw2: float, sb2: float, q: float, chi_1: float, known: dict[tuple[float, ...], float]
) -> float:
    """Slope of the c map at the stable fixed point of layers like this one; found once for layers nearly alike."""
    if chi_1 <= 1 + _NEAR:
        return min(chi_1, 2 - chi_1)
    key = (id(fn), float(f"{sw2:.5e}"), float(f"{sb2:.1e}"))
    if key not in known:
        known[key] = mean_field(fn, sw2, sb2, q0=q).chi_c
    return known[key]


def _sigma_w2(node: fx.Node, weight: Tensor) -> float:
    """sw2 = fan_in E[W^2]; of a transposed convolution, the mean over output positions."""
    if operation_name(node) in TRANSPOSED:
        options = convolution_options(node)
        return convolution_moments(weight, True, options["groups"], options["stride"])[0]
    return mean_square(weight) * weight[0].numel()


def _modes(node: fx.Node, weight: Tensor, sizes: tuple[int, ...]) -> tuple[float, ...]:
    if len(sizes) != weight.ndim - 2:
        return ()
    dilation = convolution_options(node)["dilation"]
    values = fourier_multipliers(tap_shares(weight), sizes, dilation=dilation).flatten().tolist()
    return tuple(values) if len(values) <= _MODES_KEPT else (values[0], max(values[1:]), min(values))


def _border_note(nodes: list[fx.Node]) -> list[str]:
    names = [node.name for node in nodes if reads_border(node)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    told = "read zeros at the borders: the prediction is that of endless fields, the mean is smaller"
    return [f"{names[0]}{more} {told}"] if names else []


def _input_note(graph: Graph) -> list[str]:
    """The prediction is for q = 1; says so where the example differs."""
    tensors = [x for x in tree_leaves(graph.inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors or tensors[0].is_meta:
        return []
    q = mean_square(tensors[0][:1])
    return [] if 0.9 < q < 1.1 else [f"the example input has q = {short(q)}; q by layer is that of inputs with q = 1"]
