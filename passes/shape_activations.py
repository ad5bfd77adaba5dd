"""Give every activation its shaped form: module, functional, method and in-place forms, one copy for each call."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import fx, nn
from torch._ops import OpOverload

from kgraph.canonical import operation_name
from kgraph.errors import KGraphError
from kgraph.maps import Pointwise
from kgraph.methods import DKS, TAT, Method
from kgraph.modules import FunctionModule, ShapedActivation
from kgraph.nonlinear import Region, find_regions
from kgraph.passes.base import Pass, Workspace, find_module, owner_path
from kgraph.shaping import ShapedConstants, shape_activation
from kgraph.site import site_of
from kgraph.targets import ShapingTargets

_AFFINE = ("linear", "addmm", "matmul", "mm", "bmm", "einsum", "scaled_dot_product_attention", "lstm", "gru")
_LEARNABLE = ("prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise")


@dataclass(frozen=True)
class ShapeActivations(Pass):
    """Replace activations by `ShapedActivation` with the constants that meet the targets.

    Args:
        method: DKS or TAT.
        targets: what the network affords, from `kgraph.targets.solve_targets`.
    """

    method: Method = field(default_factory=TAT)
    targets: ShapingTargets | None = None

    def rewrite(self, work: Workspace) -> None:
        assert self.targets is not None
        keep_learnable(work)
        for region in find_regions(work.graph.module, work.is_random):
            reason = kept_reason(region)
            if reason:
                work.keep(region.end, operation_name(region.end), reason)
            else:
                self._shape(work, region)

    def broken(self, work: Workspace) -> str:
        said = {line.partition(":")[0] for line in work.unmet}
        left = [
            region.end.name
            for region in find_regions(work.graph.module, work.is_random)
            if not kept_reason(region) and region.end.name not in said
            if not any(isinstance(work.module(node), ShapedActivation) for node in region.nodes)
        ]
        return f"{', '.join(left)} still unshaped" if left else ""

    def _shape(self, work: Workspace, region: Region) -> None:
        assert self.targets is not None
        leaky = is_leaky(region)
        try:
            constants = self._constants(region, leaky)
        except KGraphError as error:
            work.unmet.append(f"{region.end.name}: {error}")
            return
        activation = _activation(work, region)
        if constants.negative_slope is not None:
            activation = nn.LeakyReLU(constants.negative_slope)
        shaped = ShapedActivation(
            activation,
            constants.input_scale,
            constants.input_shift,
            constants.output_shift,
            constants.output_scale,
        )
        before = " ".join(dict.fromkeys(operation_name(n) for n in region.nodes))
        work.record(region.end, "shape activation", self._why(), before, _describe(constants))
        _swap(work, region, shaped)

    def _why(self) -> str:
        assert self.targets is not None
        t = self.targets
        if t.psi is not None:
            return f"local slope {t.psi:.6g}"
        return (
            "TAT: "
            + (f"negative slope {t.negative_slope:.4g}" if t.negative_slope is not None else "")
            + (f" curvature {t.kappa:.4g}" if t.kappa is not None else "")
        )

    def _constants(self, region: Region, leaky: bool) -> ShapedConstants:
        assert self.targets is not None
        if isinstance(self.method, DKS):
            phi = "leaky_relu" if leaky and not self.method.keep_relu else region.fn
            return _solved(phi, psi=self.targets.psi)
        if leaky:
            return _solved("leaky_relu", negative_slope=self.targets.negative_slope)
        return _solved(region.fn, kappa=self.targets.kappa)


def keep_learnable(work: Workspace) -> None:
    """Activations with a parameter of their own are no fixed function: say that they stay as they are."""
    for node in work.nodes:
        if operation_name(node) in _LEARNABLE and work.is_random(node):
            work.keep(node, operation_name(node), "it learns its own shape; only q is restored behind it")
            work.unmet.append(f"{node.name}: {operation_name(node)} is not shaped, and its slope is not counted")


@lru_cache(maxsize=256)
def _solved(
    phi: str | Pointwise, psi: float | None = None, kappa: float | None = None, negative_slope: float | None = None
) -> ShapedConstants:
    """`shape_activation`, once for each function and target: a network has many sites of few functions."""
    return shape_activation(phi, psi, kappa, negative_slope)


def is_leaky(region: Region) -> bool:
    """Whether the activation is relu or leaky relu up to a factor: positively homogeneous with a kink at 0."""
    z = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    a, b, c, d = (float(v) for v in region.fn(z))
    lines = abs(a - 2 * b) <= 1e-12 * abs(a) and abs(d - 2 * c) <= 1e-12 * abs(d)
    small = region.fn(z * 1e-3)
    return lines and torch.allclose(small, region.fn(z) * 1e-3, rtol=1e-9, atol=0) and abs(b + c) > 1e-12


def is_kinked(region: Region) -> bool:
    """Whether the activation has a kink or jump (its curvature C'' at 1 is infinite)."""
    return bool(len(region.fn.kinks()))


def kept_reason(region: Region) -> str:
    """Why an activation is not shaped, or ""."""
    if region.gate:
        return "it is a gate: it scales another tensor, its strength is normalized instead"
    if not feeds_a_layer(region.end):
        return "it is the output nonlinearity: no layer follows, its range is what the user wants"
    return ""


def feeds_a_layer(node: fx.Node) -> bool:
    """Whether an affine layer or attention reads the node, directly or not."""
    seen, queue = {node}, [node]
    while queue:
        for user in queue.pop().users:
            name = operation_name(user)
            if name in _AFFINE or name.startswith("conv"):
                return True
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return False


def _describe(constants: ShapedConstants) -> str:
    named = {k: v for k, v in constants.as_dict().items() if v is not None and k != "residual"}
    return ", ".join(f"{k} {v:.4g}" for k, v in named.items())


def _activation(work: Workspace, region: Region) -> nn.Module:
    """The region as a module: the user's own where it is one, an operation, or a small graph."""
    node = region.end
    own = find_module(work.graph.root, site_of(node).path)
    if own is not None and _is_whole_call(region, own):
        return copy.deepcopy(own)
    if len(region.nodes) == 1 and isinstance(node.target, OpOverload) and node.args[0] is region.source:
        return FunctionModule(node.target, *node.args[1:], **node.kwargs)
    return _as_graph(region)


def _is_whole_call(region: Region, own: nn.Module) -> bool:
    plain = next(own.children(), None) is None and next(own.parameters(recurse=False), None) is None
    keys = {site_of(n).key for n in region.nodes}
    untouched = all(n.meta.get("group_size") == len(region.nodes) for n in region.nodes)
    inplace = getattr(own, "inplace", False)
    return plain and len(keys) == 1 and untouched and not inplace


def _as_graph(region: Region) -> nn.Module:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {region.source: graph.placeholder("u")}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    graph.output(copies[region.end])
    return fx.GraphModule(region.module, graph)


def _swap(work: Workspace, region: Region, shaped: ShapedActivation) -> None:
    node = region.end
    site = site_of(node)
    leaf = bool(site.path) and f"{site.path}." != owner_path(work, node)
    path = work.add_module(site.path if leaf else f"{owner_path(work, node)}shaped", shaped, instead=leaf)
    graph = work.graph.module.graph
    with graph.inserting_before(node):
        call = graph.call_module(path, (region.source,))
    call.meta = {k: v for k, v in node.meta.items() if k != "group_size"}
    node.replace_all_uses_with(call)
