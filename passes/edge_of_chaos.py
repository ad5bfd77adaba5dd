"""Critical initialization: the variances at which gradients neither grow nor fall, drawn as isometric weights.

A layer that reads ``phi(z)``, z of q value q*, gets sigma_w^2 = 1 / E[phi'^2] and sigma_b^2 = q* - sigma_w^2 E[phi^2]:
its own output has the q value q* again, and chi_1 = 1. The layer that reads the input brings it to q*. With
q* = 1 / depth the squared singular values of the Jacobian vary by O(1 / depth) under orthogonal weights.

Source: Xiao et al. 2018, arXiv 1806.05393; Pennington et al. 2017, arXiv 1711.04735.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, fx

from kgraph.canonical import operation_name
from kgraph.errors import InputError
from kgraph.initializers import reinitialize_weight_
from kgraph.meanfield import MeanField, critical_point
from kgraph.nonlinear import Region, find_regions
from kgraph.orthogonal_convolutions import orthogonal_convolution_
from kgraph.passes.base import Pass, Workspace
from kgraph.passes.critical_checks import affine_arguments, border_losses, depths_of, obstacles, strays
from kgraph.passes.reinitialize import (
    CONVOLUTIONS,
    TRANSPOSED,
    direct_weight,
    draw_each_tap,
    geometry_of,
    single_position,
)
from kgraph.rules.linear import mean_square

WeightLaw = Literal["delta-orthogonal", "orthogonal", "gaussian"]
_RATE = 0.1
"""Adam's rate times depth: 1e-4 at 1,000 layers, what trains the published tanh network."""
_MOST_RATE = 1e-3


@dataclass(frozen=True)
class _Layer:
    """What one affine layer is to become. ``at`` and ``bias_at`` are places among the node's arguments."""

    node: fx.Node
    at: int
    bias_at: int | None
    sigma_w2: float
    sigma_b2: float
    why: str


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
        generator, done = work.generator, set[str]()
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
        work.unmet += obstacles(work, depths)
        if self.distribution != "gaussian":
            work.unmet += border_losses(work, self.distribution == "orthogonal")

    def broken(self, work: Workspace) -> str:
        regions = find_regions(work.graph.module, work.is_random)
        depths = depths_of(work, regions)
        depth = max(depths.values(), default=0)
        layers = self._layers(work, regions, depth)
        off = [str(layer.node.args[layer.at]) for layer in layers if not self._is_critical(work, layer)]
        if off:
            return f"{', '.join(off[:5])} are off the critical line"
        if self.distribution == "gaussian" or obstacles(work, depths):
            return ""  # finite Gaussian matrices scatter: their q wanders, as the theory says
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

    def _draw_layer(self, work: Workspace, layer: _Layer, done: set[str], generator: Generator) -> None:
        node, why = layer.node, layer.why
        parameter = direct_weight(work, node, layer.at)
        if parameter is None:
            work.keep(node, "weight", "it is computed from something else than one parameter")
            return
        if str(parameter.target) in done:
            work.notes.append(f"{parameter.target} is used by several layers; it was drawn once")
            return
        done.add(str(parameter.target))
        weight = work.tensor(parameter)
        before = f"std {mean_square(weight) ** 0.5:.3g}"
        self._draw(node, weight.data, layer.sigma_w2**0.5, generator)
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
            orthogonal_convolution_(weight, form=form, gain=gain, **options)

    def _is_critical(self, work: Workspace, layer: _Layer) -> bool:
        """fan_in E[W^2] = sigma_w^2, to rounding; of Gaussian entries up to their sampling error."""
        weight = layer.node.args[layer.at]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or work.tensor(weight).is_meta:
            return True
        tensor = work.tensor(weight)
        readers = [user for user in weight.users if affine_arguments(work, user) is not None]
        if len(readers) > 1 or operation_name(layer.node) in TRANSPOSED:
            return True
        fan_in = tensor.shape[0] if operation_name(layer.node) in ("addmm", "matmul", "mm") else tensor[0].numel()
        scatter = 8 * (2 / tensor.numel()) ** 0.5 if self.distribution == "gaussian" else 0.0
        return abs(mean_square(tensor) * fan_in / layer.sigma_w2 - 1) < 1e-3 + scatter


def _variances(
    work: Workspace, source: object, ends: dict[fx.Node, Region], q: float, known: dict[int, MeanField]
) -> tuple[float, float, str]:
    """(sigma_w^2, sigma_b^2, reason) of a layer that reads ``source``."""
    node = source
    while isinstance(node, fx.Node) and node not in ends and work.is_random(node):
        random = [n for n in node.all_input_nodes if work.is_random(n)]
        if affine_arguments(work, node) is not None:
            return 1.0, 0.0, "it reads a layer without activation"
        if len(random) > 1:  # of what is about to be redrawn: its q is not known yet
            return 1.0, 0.0, f"it keeps the q of {node.name}, which joins several tensors"
        if not random:
            break
        node = random[0]
    if not isinstance(node, fx.Node) or node not in ends:
        value = work.before().values.get(source) if isinstance(source, fx.Node) else None
        given = float(value.merged.q) if value is not None else 1.0
        return q / given if given > 0 else 1.0, 0.0, f"it brings q = {given:.3g} to q*"
    fn = ends[node].fn
    if id(fn) not in known:
        known[id(fn)] = _critical(fn, q, node)
    return known[id(fn)].sigma_w2, known[id(fn)].sigma_b2, "chi_1 = 1"


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
