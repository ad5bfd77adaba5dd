"""Critical initialization: the variances at which gradients neither grow nor fall, drawn as isometric weights.

A layer that reads ``phi(z)``, z of q value q*, gets sigma_w^2 = 1 / E[phi'^2] and sigma_b^2 = q* - sigma_w^2 E[phi^2]:
its own output has the q value q* again, and chi_1 = 1. The layer that reads the input brings it to q*. With
q* = 1 / depth the squared singular values of the Jacobian vary by O(1 / depth) under orthogonal weights.

Source: Xiao et al. 2018, arXiv 1806.05393; Pennington et al. 2017, arXiv 1711.04735.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, fx, nn

from kgraph.canonical import operation_name
from kgraph.errors import InputError
from kgraph.initializers import reinitialize_weight_
from kgraph.meanfield import MeanField, critical_point
from kgraph.nonlinear import Region, find_regions
from kgraph.orthogonal_convolutions import orthogonal_convolution_
from kgraph.passes.affine import CONVOLUTIONS, TRANSPOSED
from kgraph.passes.base import Pass, Workspace
from kgraph.passes.convolutions import geometry_of, single_position
from kgraph.passes.critical_checks import PADS, affine_arguments, border_losses, depths_of, obstacles, strays
from kgraph.passes.reinitialize import divide_scale, drawn_weight, keep_weight, runtime_scale
from kgraph.rules.weights import mean_square
from kgraph.weight_laws import draw_each_tap

WeightLaw = Literal["delta-orthogonal", "orthogonal", "gaussian"]
_RATE = 0.1
"""Adam's rate times depth: 1e-4 at 1,000 layers, what trains the published tanh network."""
_MOST_RATE = 1e-3
_MOST_GROWTH = 5.0
"""Up to which an error of q may grow over the depth unmentioned: GELU at q = 1 / depth has exp(4 / pi) = 3.6."""


@dataclass(frozen=True)
class _Layer:
    """What one affine layer is to become. ``at`` and ``bias_at`` are places among the node's arguments."""

    node: fx.Node
    at: int
    bias_at: int | None
    sigma_w2: float
    sigma_b2: float
    why: str
    chi_q: float


@dataclass(frozen=True)
class CriticalWeights(Pass):
    """Draw all affine layers on the critical line of the activation they read.

    Args:
        q: q value to keep; 1 / depth when None, depth counted in nonlinear layers on the longest path.
        sigma_b: standard deviation of the biases instead: q is then what the critical line of the most frequent
            activation has there.
        distribution: "delta-orthogonal", "orthogonal" (general convolutions) or "gaussian" (all taps).
    """

    q: float | None = None
    sigma_b: float | None = None
    distribution: WeightLaw = "delta-orthogonal"

    def rewrite(self, work: Workspace) -> None:
        generator, done = work.generator, dict[str, float]()
        regions = find_regions(work.graph.module, work.is_random)
        depths = depths_of(work, regions)
        depth = max(depths.values(), default=0)
        layers, q = self._layers(work, regions, depth), self._q(regions, depth)
        for layer in layers:
            self._draw_layer(work, layer, done, generator)
        for node in work.nodes:
            if operation_name(node) in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
                work.keep(node, "recurrent weights", "recurrent cells keep their own initialization")
        work.notes += [f"q* = {q:.4g} over {depth} nonlinear layers; inputs are taken to have q = 1", _rate_note(depth)]
        work.unmet += _unstable(layers, depth)
        work.unmet += obstacles(work, regions, depths)
        work.unmet += border_losses(work, self.distribution != "delta-orthogonal")

    def broken(self, work: Workspace) -> str:
        regions = find_regions(work.graph.module, work.is_random)
        depths = depths_of(work, regions)
        depth = max(depths.values(), default=0)
        layers = self._layers(work, regions, depth)
        off = [str(layer.node.args[layer.at]) for layer in layers if not self._is_critical(work, layer)]
        if off:
            return f"{', '.join(off[:5])} are off the critical line"
        if self.distribution == "gaussian" or obstacles(work, regions, depths) or _unstable(layers, depth):
            return ""  # finite Gaussian matrices scatter: their q wanders, as the theory says, and where q* repels
        return strays(work, regions, self._q(regions, depth), self.distribution == "orthogonal")

    def _q(self, regions: list[Region], depth: int) -> float:
        if self.sigma_b is None:
            return self.q if self.q is not None else 1 / max(depth, 1)
        if not regions:
            return 1.0
        usual = Counter(id(region.fn) for region in regions).most_common(1)[0][0]
        phi = next(region.fn for region in regions if id(region.fn) == usual)
        found = critical_point(phi, sigma_b2=self.sigma_b**2)
        # A homogeneous activation is critical at every q when there is no bias.
        return found.q or 1 / max(depth, 1)

    def _layers(self, work: Workspace, regions: list[Region], depth: int) -> list[_Layer]:
        q, known = self._q(regions, depth), dict[int, MeanField]()
        ends = {region.end: region for region in regions}
        found = []
        for node in work.nodes:
            place = affine_arguments(work, node)
            if place is not None:
                reads, at, bias_at = place
                found.append(_Layer(node, at, bias_at, *_variances(work, node.args[reads], ends, q, known)))
        return found

    def _draw_layer(self, work: Workspace, layer: _Layer, done: dict[str, float], generator: Generator) -> None:
        node, why = layer.node, layer.why
        parameter, factor = drawn_weight(work, node, layer.at)
        if parameter is None:
            keep_weight(work, node)
            return
        if str(parameter.target) in done:
            work.notes.append(f"{parameter.target} is used by several layers; it was drawn once")
            drawn_for = done[str(parameter.target)]
            if abs(drawn_for / layer.sigma_w2 - 1) > 1e-6:
                work.unmet.append(
                    f"{node.name} shares its weight with a layer of another sigma_w^2: it wants {layer.sigma_w2:.3g}, "
                    f"{parameter.target} was drawn for {drawn_for:.3g}"
                )
            return
        done[str(parameter.target)] = layer.sigma_w2
        weight = work.tensor(parameter)
        if weight.ndim < 2:
            keep_weight(work, node, "a vector, which no law of matrices is for")
            return
        before = f"std {mean_square(weight) ** 0.5:.3g}"
        self._draw(node, weight.data, layer.sigma_w2**0.5, generator)
        divide_scale(work, parameter, factor)
        drawn = _draw_bias(work, layer, generator)
        if not drawn and layer.sigma_b2 > 0:
            work.unmet.append(f"{node.name} has no bias: sigma_b^2 = {layer.sigma_b2:.3g} is missing there")
        after = f"sigma_w^2 {layer.sigma_w2:.6g}, sigma_b^2 {layer.sigma_b2 if drawn else 0:.4g}"
        work.record(node, f"re-draw {operation_name(node)}", f"{self.distribution}, {why}", before, after)

    def _draw(self, node: fx.Node, weight: Tensor, gain: float, generator: Generator) -> None:
        name = operation_name(node)
        if name in ("addmm", "matmul", "mm"):
            weight = weight.T
        convolution = name in (*CONVOLUTIONS, *TRANSPOSED)
        options: dict[str, Any] = geometry_of(node, transposed=name in TRANSPOSED) if convolution else {}
        options["generator"] = generator
        if options.get("transposed") and single_position(node):
            law = "gaussian" if self.distribution == "gaussian" else "suo"
            draw_each_tap(weight, law, options["groups"], generator)
            weight *= gain
        elif self.distribution == "gaussian":
            reinitialize_weight_(weight, distribution="gaussian", delta=False, gain=gain, **options)
        else:
            form = "delta" if self.distribution == "delta-orthogonal" else "general"
            try:
                orthogonal_convolution_(weight, form=form, gain=gain, **options)
            except InputError as error:
                hint = f"{(error.hint or '').rstrip('.')}: EdgeOfChaos(distribution='gaussian') draws it"
                raise InputError(error.what, node=node.name, hint=hint) from error

    def _is_critical(self, work: Workspace, layer: _Layer) -> bool:
        """fan_in E[W^2] = sigma_w^2, to rounding; of Gaussian entries up to their sampling error."""
        given = layer.node.args[layer.at]
        weight, factor = runtime_scale(work, given) or (given, 1.0)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return True
        tensor = work.tensor(weight)
        if not isinstance(tensor, nn.Parameter) or tensor.is_meta or tensor.ndim < 2:
            return True
        assert isinstance(given, fx.Node)
        readers = [user for user in given.users if affine_arguments(work, user) is not None]
        if len(readers) > 1 or operation_name(layer.node) in TRANSPOSED:
            return True
        fan_in = tensor.shape[0] if operation_name(layer.node) in ("addmm", "matmul", "mm") else tensor[0].numel()
        scatter = 8 * (2 / tensor.numel()) ** 0.5 if self.distribution == "gaussian" else 0.0
        return abs(mean_square(tensor) * factor**2 * fan_in / layer.sigma_w2 - 1) < 1e-3 + scatter


def _variances(
    work: Workspace, source: object, ends: dict[fx.Node, Region], q: float, known: dict[int, MeanField]
) -> tuple[float, float, str, float]:
    """(sigma_w^2, sigma_b^2, reason, chi_q or 0 where none applies) of a layer that reads ``source``."""
    node = source
    while isinstance(node, fx.Node) and node not in ends and work.is_random(node):
        random = [n for n in node.all_input_nodes if work.is_random(n)]
        if affine_arguments(work, node) is not None:
            return 1.0, 0.0, "it reads a layer without activation", 0.0
        if len(random) > 1:  # of what is about to be redrawn: its q is not known yet
            return 1.0, 0.0, f"it keeps the q of {node.name}, which joins several tensors", 0.0
        if not random:
            break
        node = random[0]
    if not isinstance(node, fx.Node) or node not in ends or not _behind_layer(work, ends[node].source):
        while isinstance(source, fx.Node) and operation_name(source) in PADS:
            source = source.args[0]  # with its zeros the mean over positions is lower than what the taps read
        value = work.before().values.get(source) if isinstance(source, fx.Node) else None
        given = float(value.merged.q) if value is not None else 1.0
        return q / given if given > 0 else 1.0, 0.0, f"it brings q = {given:.3g} to q*", 0.0
    fn = ends[node].fn
    if id(fn) not in known:
        known[id(fn)] = _critical(fn, q, node)
    point = known[id(fn)]
    return point.sigma_w2, point.sigma_b2, "chi_1 = 1", point.chi_q


def _behind_layer(work: Workspace, node: fx.Node) -> bool:
    """Whether a value depends on an affine layer; an activation of the input itself has the input's q, not q*."""
    queue = [node]
    for before in queue:
        if affine_arguments(work, before) is not None:
            return True
        queue += [n for n in before.all_input_nodes if work.is_random(n) and n not in queue]
    return False


def _unstable(layers: list[_Layer], depth: int) -> list[str]:
    """A warning where q* repels: behind chi_q > 1 a relative error of q grows by chi_q a layer."""
    worst = max((layer.chi_q for layer in layers), default=0.0)
    grown = depth * math.log(max(worst, 1.0))
    if grown < math.log(_MOST_GROWTH):
        return []
    times = f"{math.exp(grown):.2g}" if grown < 100 else f"e^{grown:.0f}"
    what = f"q* repels: chi_q = {worst:.4g}, so an error of q grows {times}-fold over {depth} layers"
    return [f"{what}; a smaller q (1 / depth) or another activation keeps it"]


def _critical(fn: Any, q: float, node: fx.Node) -> MeanField:
    try:
        point = critical_point(fn, q=q)
    except InputError as error:
        hint = f"{(error.hint or '').rstrip('.')}: see EdgeOfChaos(q=...)"
        raise InputError(error.what, node=node.name, hint=hint) from error
    # Rounding of a flat critical line is no bias: hardtanh, relu.
    return replace(point, sigma_b2=0.0) if point.sigma_b2 < 1e-15 * q else point


@torch.no_grad()
def _draw_bias(work: Workspace, layer: _Layer, generator: Generator) -> bool:
    at = layer.bias_at
    bias = layer.node.args[at] if at is not None and len(layer.node.args) > at else None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return False
    tensor = work.tensor(bias)
    if not tensor.is_meta:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(noise * layer.sigma_b2**0.5)
    return True


def _rate_note(depth: int) -> str:
    rate = min(_MOST_RATE, _RATE / max(depth, 1))
    return (
        f"suggested learning rate: Adam {rate:.1g} (0.1 / depth, at most 1e-3): Adam moves every weight by about its "
        "rate whatever the gradient, and at criticality all layers move the output alike: a step's effect grows with "
        "depth"
    )
