"""The network in NTK form with standard parameters: activations balanced, weights and biases drawn.

    std W = sqrt((1 - beta^2) / fan_in),  std b = beta,     fan_in = (C_in / groups) c_max of a convolution

A layer without bias gets std W = 1 / sqrt(fan_in) instead, so that it keeps q = 1 too.
Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import aten, operation_name
from kgraph.errors import InputError, TargetError
from kgraph.meanfield.order_chaos import ActivationMoments, Form, activation_moments, regime_of, shift_of
from kgraph.modules import FunctionModule, ShapedActivation
from kgraph.nonlinear import Region, find_regions
from kgraph.passes.activation_modules import activation_of
from kgraph.passes.base import Pass, Workspace
from kgraph.passes.ntk_chaos_layers import SAME_CHANNELS, affine_layer, note_variances, undrawable
from kgraph.passes.reinitialize import divide_scale
from kgraph.passes.remove_norms import NORMS
from kgraph.passes.shape_activations import kept_reason, swap_activation

_CENTRING = (aten.layer_norm.default, aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default)
_NORM = "kgraph_norm_behind"


@dataclass(frozen=True)
class NoteNorms(Pass):
    """Note at every activation which centring norm reads it, before the norms go (`BalanceActivations` asks)."""

    def rewrite(self, work: Workspace) -> None:
        for region in find_regions(work.graph.module, work.is_random):
            region.end.meta[_NORM] = _norm_behind(region.end)


@dataclass(frozen=True)
class BalanceActivations(Pass):
    """sigma -> (sigma - c) / sqrt(E[(sigma - c)^2]) at N(0, 1).

    A norm behind the activation that subtracts the mean did in the limit what the normalized form, c = E[sigma],
    does; so an activation that had one (see `NoteNorms`) is normalized, unless ``r`` asks for something else.

    Args:
        beta: standard deviation of the biases.
        r: wanted characteristic value, or None.
        form: where ``r`` is None.
    """

    beta: float = 0.1
    r: float | None = None
    form: Form = "normalized"

    def rewrite(self, work: Workspace) -> None:
        found: list[tuple[Region, ShapedActivation]] = []
        # all before any node changes: one may be a function of another's nodes
        for region in find_regions(work.graph.module, work.is_random):
            reason = kept_reason(region)
            if reason:
                work.keep(region.end, operation_name(region.end), reason)
                continue
            try:
                found.append((region, self._balanced(work, region)))
            except InputError as error:  # a constant, or without second moment
                work.unmet.append(f"{region.end.name}: {error}")
        for region, shaped in found:
            swap_activation(work, region, shaped)

    def _balanced(self, work: Workspace, region: Region) -> ShapedActivation:
        moments = activation_moments(region.fn)
        norm = region.end.meta.get(_NORM)
        shift = self._shift(region, moments, norm is not None)
        r = moments.r(self.beta, shift)
        shaped = ShapedActivation(
            _original(work, region), output_shift=-shift, output_scale=moments.power(shift) ** -0.5
        )
        why = f"r = {r:.6g}, {regime_of(r)}" + (f"; {NORMS[norm]} behind it was the normalized form" if norm else "")
        before = f"mean {moments.mean:.4g}, second moment {moments.second:.4g}"
        after = f"mean {(moments.mean - shift) * moments.power(shift) ** -0.5:.4g}, second moment 1"
        work.record(region.end, "balance activation", why, before, after)
        return shaped

    def _shift(self, region: Region, moments: ActivationMoments, normed: bool) -> float:
        if self.r is None:
            return shift_of(moments, "normalized" if normed else self.form)
        try:
            return moments.shift_for(self.r, self.beta)
        except TargetError as error:
            raise TargetError(error.what, node=region.end.name, hint=error.hint) from error


@dataclass(frozen=True)
class DrawNTK(Pass):
    """Draw every affine layer from the Gaussian law of the NTK form; see the module.

    Args:
        beta: standard deviation of the biases, in [0, 1).
    """

    beta: float = 0.1

    def rewrite(self, work: Workspace) -> None:
        generator, done = work.generator, set[str]()
        for node in work.nodes:
            layer = affine_layer(work, node)
            if layer is None and undrawable(work, node):
                work.unmet.append(f"{node.name}: its weight is no parameter of its own, and was not drawn")
            if layer is None or layer.weight in done:
                continue
            done.add(layer.weight)
            weight = work.tensor(layer.weight_node)
            if weight.is_meta:
                work.notes.append(f"{layer.weight} is on the meta device: not drawn")
                continue
            std = layer.variance(self.beta) ** 0.5
            before = f"std {float(weight.detach().double().square().mean()) ** 0.5:.3g}"
            _draw(weight, std, generator)
            divide_scale(work, layer.weight_node, layer.factor)
            if layer.bias_node is not None:
                _draw(work.tensor(layer.bias_node), self.beta, generator)
            bias = f", bias std {self.beta:g}" if layer.bias_node is not None else ""
            work.record(node, f"draw {operation_name(node)}", "NTK form", before, f"std {std:.3g}{bias}")


@dataclass(frozen=True)
class NoteVariances(Pass):
    """Say where q is not 1 in the network as it is: r is another one there."""

    def rewrite(self, work: Workspace) -> None:
        note_variances(work)


def _draw(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    values = torch.randn(tensor.shape, generator=generator, device=generator.device, dtype=torch.float64)
    with torch.no_grad():
        tensor.copy_(values * std)


def _norm_behind(node: fx.Node) -> object | None:
    """The centring norm that alone reads a node, through operations that keep the channels; None without one."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in _CENTRING:
            return node.target
        if operation_name(node) not in SAME_CHANNELS:
            return None
    return None


def _original(work: Workspace, region: Region) -> nn.Module:
    """The activation as a module; a learnable slope is handed to it."""
    single = len(region.nodes) == 1 and region.end.target is aten.prelu.default
    return FunctionModule(aten.prelu.default) if single else activation_of(work, region)
