"""Give every activation its shaped form: module, functional, method and in-place forms, one copy for each call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import fx, nn

from kgraph.canonical import aten, operation_name
from kgraph.denominators import is_denominator
from kgraph.errors import InputError, KGraphError
from kgraph.gradient_stops import stop, stopped_between, without_stops
from kgraph.jumps import jumps
from kgraph.maps import Pointwise
from kgraph.methods import DKS, TAT, Method
from kgraph.modules import FunctionModule, ShapedActivation
from kgraph.nonlinear import Region, known_value
from kgraph.passes.activation_modules import activation_of, lost_stop
from kgraph.passes.base import Pass, Workspace, owner_path
from kgraph.passes.derivatives import derivative_beside
from kgraph.passes.ends import feeds_a_layer, joins_a_stream
from kgraph.passes.exponentials import exponential_of, is_exponential
from kgraph.shaping import ShapedConstants, shape_activation
from kgraph.shaping.leaky import leaky_centred
from kgraph.site import site_of
from kgraph.targets import ShapingTargets
from kgraph.weight_laws import Filled

_DRAWS = ("bernoulli", "multinomial", "poisson", "binomial", "normal")
_LEARNABLE = ("prelu", "rrelu", "rrelu_with_noise")


@dataclass(frozen=True)
class _Site:
    """An activation to shape: its region, what it was, and the function that it applies."""

    region: Region
    before: str
    leaky: bool
    constants: ShapedConstants
    activation: nn.Module

    def shaped(self, work: Workspace) -> tuple[ShapedActivation, ShapedConstants]:
        """What it becomes; a learnable slope is written into its parameter."""
        activation, constants = self.activation, self.constants
        if constants.negative_slope is not None and self.region.learnable:
            activation = FunctionModule(aten.prelu.default)
            constants = _set_slope(work, self.region, constants)
        elif constants.negative_slope is not None:
            activation = nn.LeakyReLU(constants.negative_slope)
        four = (constants.input_scale, constants.input_shift, constants.output_shift, constants.output_scale)
        return ShapedActivation(activation, *four), constants


@dataclass(frozen=True)
class ShapeActivations(Pass):
    """Replace activations by `ShapedActivation` with the constants that meet the targets.

    Args:
        method: DKS or TAT.
        targets: what the network affords, from `kgraph.targets.solve_targets`.
    """

    method: Method = field(default_factory=TAT)
    targets: ShapingTargets | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, DKS | TAT):
            raise InputError(f"method is {self.method!r}", hint="Pass an instance of DKS or TAT")
        if self.targets is not None and not isinstance(self.targets, ShapingTargets):
            raise InputError(f"targets is {self.targets!r}", hint="Pass what kgraph.shaping_targets returned")

    def rewrite(self, work: Workspace) -> None:
        assert self.targets is not None
        regions = work.regions()
        keep_unshaped(work, regions)
        free = [region for region in regions if not kept_reason(region)]
        # all before any slope or node changes: several may share a slope, and one may be a function of another's nodes
        for site in [self._site(work, region) for region in free]:
            if site is not None:
                self._shape(work, site)

    def broken(self, work: Workspace) -> str:
        said = {line.partition(":")[0] for line in work.unmet}
        left = [
            region.end.name
            for region in work.regions()
            if not kept_reason(region) and region.end.name not in said
            if not any(isinstance(work.module(node), ShapedActivation) for node in region.nodes)
        ]
        return f"{', '.join(left)} still unshaped" if left else ""

    def _site(self, work: Workspace, region: Region) -> _Site | None:
        """What to make of a region; None, and said so, where no constants meet the targets."""
        leaky = is_leaky(region)
        if not leaky and jumps(region.fn, 0.0, 1.0):
            what = f"{_name(region)} jumps, so that its slope is infinite whatever the constants"
            work.unmet.append(f"{region.end.name}: {what}")
            return None
        try:
            constants = self._constants(region, leaky)
        except KGraphError as error:
            work.unmet.append(f"{region.end.name}: {error}")
            return None
        return _Site(region, _name(region), leaky, constants, activation_of(work, region))

    def _shape(self, work: Workspace, site: _Site) -> None:
        region = site.region
        if site.constants.negative_slope is not None and _is_bounded(region):
            note = f"{operation_name(region.end)} becomes a leaky relu, and loses its bound"
            work.notes += [note] if note not in work.notes else []
        shaped, constants = site.shaped(work)
        at = len(work.changes)
        work.record(region.end, "shape activation", self._why(site.leaky), site.before, _describe(constants, region))
        call = swap_activation(work, region, shaped)
        work.shaped[call] = (site, at)

    def reshape(self, work: Workspace) -> None:
        """Give the activations that were shaped the constants of these targets.

        Raises:
            TargetError: an activation cannot have them; nothing is changed.
        """
        new = [
            (call, replace(site, constants=self._constants(site.region, site.leaky)), at)
            for call, (site, at) in work.shaped.items()
        ]
        for call, site, at in new:
            shaped, constants = site.shaped(work)
            work.replace_module(str(call.target), shaped)
            after = _describe(constants, site.region)
            work.changes[at] = replace(work.changes[at], why=self._why(site.leaky), after=after)

    def _why(self, leaky: bool) -> str:
        """The local value that was solved, and the target of the whole network it was solved for."""
        assert self.targets is not None
        t = self.targets
        if isinstance(self.method, DKS):
            return f"DKS: local slope C'(1) = {t.psi:.6g} for a largest slope zeta = {self.method.zeta:g}"
        if not leaky:
            return f"TAT: local curvature C''(1) = {t.kappa:.4g} for a largest curvature tau = {self.method.tau:g}"
        if t.negative_slope == 0:
            return f"TAT: negative slope 0, for relu's largest C(0) {t.attained:.4g} is below eta = {self.method.eta:g}"
        return f"TAT: negative slope {t.negative_slope:.4g} for a largest C(0) eta = {self.method.eta:g}"

    def _constants(self, region: Region, leaky: bool) -> ShapedConstants:
        assert self.targets is not None
        if isinstance(self.method, DKS):
            solved = leaky and (bool(region.learnable) or not self.method.keep_relu)
            return _solved("leaky_relu" if solved else region.fn, psi=self.targets.psi)
        if leaky:
            return _solved("leaky_relu", negative_slope=self.targets.negative_slope)
        return _solved(region.fn, kappa=self.targets.kappa)


def keep_unshaped(work: Workspace, regions: list[Region]) -> None:
    """Say which activations stay as they are, and why; a learnable one among them is a promise unmet."""
    known = {node for region in regions for node in region.nodes}
    for node in work.nodes:
        if operation_name(node) in _LEARNABLE and work.is_random(node) and node not in known:
            work.keep(node, operation_name(node), "its slope is no fixed number")
            work.unmet.append(f"{node.name}: {operation_name(node)} is not shaped, and its slope is not counted")
    for region in regions:
        reason = kept_reason(region)
        if not reason:
            continue
        work.keep(region.end, operation_name(region.end), reason)
        if _learnable_reason(region) == reason:
            work.unmet.append(f"{region.end.name}: {operation_name(region.end)} is not shaped: {reason}")


@lru_cache(maxsize=256)
def _solved(
    phi: str | Pointwise, psi: float | None = None, kappa: float | None = None, negative_slope: float | None = None
) -> ShapedConstants:
    """`shape_activation`, once for each function and target: a network has many sites of few functions."""
    return shape_activation(phi, psi, kappa, negative_slope)


def is_leaky(region: Region) -> bool:
    """Whether the activation is relu, leaky relu or prelu up to factor and constant: two lines that meet at 0."""
    if region.learnable and len(region.nodes) == 1 and region.end.target is aten.prelu.default:
        return True  # even where its slope happens to be 1
    if region.fn not in _lines:
        _lines[region.fn] = _two_lines(region.fn)
    return _lines[region.fn]


_lines: weakref.WeakKeyDictionary[Pointwise, bool] = weakref.WeakKeyDictionary()


def _two_lines(fn: Pointwise) -> bool:
    z = torch.tensor([-2.0, -1.0, 1.0, 2.0, -2e-3, -1e-3, 1e-3, 2e-3, 0.0], dtype=torch.float64)
    values = fn(z)
    rise = values[:8] - values[8]
    a, b, c, d = (float(v) for v in rise[:4])
    rounding = 1e-12 * (1 + abs(float(values[8])))
    lines = abs(a - 2 * b) <= rounding * (1 + abs(a)) and abs(d - 2 * c) <= rounding * (1 + abs(d))
    return lines and torch.allclose(rise[4:], rise[:4] * 1e-3, rtol=1e-9, atol=rounding) and abs(b + c) > 1e-12


def _is_bounded(region: Region) -> bool:
    """Whether two lines near 0 are none far out, as those of relu6."""
    far, near = region.fn(torch.tensor([[-100.0, 100.0], [-1.0, 1.0]], dtype=torch.float64))
    return not torch.allclose(far, 100 * near, rtol=1e-6)


def is_kinked(region: Region) -> bool:
    """Whether the activation has a kink or jump (its curvature C'' at 1 is infinite)."""
    return bool(len(region.fn.kinks()))


def kept_reason(region: Region) -> str:
    """Why an activation is not shaped, or ""."""
    if region.gate:
        return "it is a gate: it scales another tensor, its strength is normalized instead"
    if is_denominator(region.end):
        return "it is part of what a tensor is divided by, as in a norm: it scales, it does not shape"
    if not feeds_a_layer(region.end) and not joins_a_stream(region.end):
        return "it is the output nonlinearity: no layer follows, its range is what the user wants"
    if any(operation_name(user) in _DRAWS for user in region.end.users):
        return "numbers are drawn with it: it is a probability or a rate, and has its range"
    if is_exponential(region):
        return "it is an exponential: a scale or rate that is made from its logarithm, and no activation"
    if exponential := exponential_of(region):
        return f"it bounds the exponent of {exponential}: shifted, a rate of decay may become one of growth"
    if derivative := derivative_beside(region):
        return f"its derivative is computed beside it ({derivative}) for another output, which would be false"
    if not region.everywhere:
        return "it is not defined for every number: shifting and scaling what it gets would leave its domain"
    return _learnable_reason(region)


def _learnable_reason(region: Region) -> str:
    """Why an activation with learnable slopes cannot be given others, or ""."""
    if len(region.learnable) > 1:
        return "it has several learnable slopes"
    for weight, (_, deviation) in region.slopes.items():
        if weight.op != "get_attr":
            return "its slope is computed from other parameters"
        if not _only_slope(region, weight):
            return f"{weight.target} is more than its slope"
        if known_value(weight, region.module).is_meta:
            return f"{weight.target} is on the meta device, where no slope can be set"
        if deviation and not is_leaky(region):
            return "its slopes differ from channel to channel inside a larger function"
        if len(_users(region, weight)) > 1 and not is_leaky(region):
            return "its slope serves several activations, and this one is no leaky relu"
    return ""


def _only_slope(region: Region, weight: fx.Node) -> bool:
    return all(user.target is aten.prelu.default or user.op == "call_module" for user in _users(region, weight))


def _users(region: Region, weight: fx.Node) -> list[fx.Node]:
    """Everything that reads the parameter, through whichever of its nodes."""
    return [user for node in region.getters[str(weight.target)] for user in node.users]


def _describe(constants: ShapedConstants, region: Region) -> str:
    """The constants that do something; a leaky relu's slope first, and where it is a parameter, which."""
    named = {k: v for k, v in constants.as_dict().items() if v is not None and k != "residual"}
    idle = {"input_scale": 1.0, "input_shift": 0.0, "output_shift": 0.0}
    slope = named.pop("negative_slope", None)
    words = [f"{k} {v:.4g}" for k, v in named.items() if idle.get(k) != v]
    learned = "".join(f" ({weight.target}, still a parameter)" for weight in region.learnable)
    return ", ".join(([f"negative_slope {slope:.4g}{learned}"] if slope is not None else []) + words)


def _name(region: Region) -> str:
    """The region's operations, and the learnable slopes that it had."""
    slopes = [f"{mean:.4g}" + (f" +- {dev:.2g}" if dev else "") for mean, dev in region.slopes.values()]
    operations = " ".join(dict.fromkeys(operation_name(n) for n in region.nodes))
    return operations + (f" of slope {', '.join(slopes)}" if slopes else "")


def _set_slope(work: Workspace, region: Region, constants: ShapedConstants) -> ShapedConstants:
    """Write the solved slope into the parameter, and solve what follows from it for the number it can hold."""
    weight = work.tensor(region.learnable[0])
    assert constants.negative_slope is not None
    with torch.no_grad():
        weight.fill_(constants.negative_slope)
    work.settled.add(str(region.learnable[0].target))
    work.laws[str(region.learnable[0].target)] = Filled(constants.negative_slope)
    held = float(torch.tensor(constants.negative_slope, dtype=weight.dtype))
    return _solved("leaky_relu", negative_slope=held) if constants.output_shift == 0 else leaky_centred(held)


def swap_activation(work: Workspace, region: Region, shaped: ShapedActivation) -> fx.Node:
    """Call the shaped activation instead; a learnable slope is handed to it and keeps its name in the state dict."""
    node = region.end
    graph = work.graph.module.graph
    with graph.inserting_before(node):
        call = graph.call_module(_place(work, region, shaped), (region.source, *region.learnable))
    call.meta = {k: v for k, v in without_stops(node.meta).items() if k != "group_size"}
    if (line := stopped_between(region.source, node, region.nodes)) is not None:
        stop(call, region.source, line)
    elif lost := lost_stop(work, region):
        work.unmet.append(f"{node.name}: {lost}")
    node.replace_all_uses_with(call)
    return call


def _place(work: Workspace, region: Region, shaped: ShapedActivation) -> str:
    """In the place of the user's activation module; beside it where that holds the slope."""
    site, prefix = site_of(region.end), owner_path(work, region.end)
    leaf = bool(site.path) and f"{site.path}." != prefix
    if leaf and not region.learnable:
        return work.add_module(site.path, shaped, instead=True)
    return work.add_module(f"{site.path}_shaped" if leaf else f"{prefix}shaped", shaped)
