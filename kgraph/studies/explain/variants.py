"""Variants of a captured model that differ in one component: what an explanation holds against the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from kgraph.canonical import aten, operation_name
from kgraph.errors import InputError
from kgraph.methods import DKS, TAT
from kgraph.modules import ShapedActivation
from kgraph.nonlinear import Region
from kgraph.passes.affine import CONVOLUTIONS, TRANSPOSED
from kgraph.passes.base import Pass, Workspace, made_here, owner_path
from kgraph.passes.remove_norms import NORMS, RemoveNorms
from kgraph.passes.scale_residuals import ScaleResiduals
from kgraph.passes.shape_activations import kept_reason
from kgraph.recipe import Plan, rewrite

_MAX_TO_AVERAGE = {
    aten.max_pool1d.default: aten.avg_pool1d.default,
    aten.max_pool2d.default: aten.avg_pool2d.default,
    aten.max_pool3d.default: aten.avg_pool3d.default,
}
_POOL_ARGUMENTS = 4
"""Input, kernel size, stride, padding: what both kinds of pooling have in the same place."""

Initializer = Callable[..., object]


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        component: "skips and norms", "activation", "initializer", "pooling" or "kgraph".
        name: the change in a few words.
        apply: makes it on a copy of the graph; returns whether there was anything to change.
    """

    component: str
    name: str
    apply: Callable[[Workspace], bool]


@dataclass(frozen=True)
class SwapActivations(Pass):
    """Every activation that a transform would shape becomes another function."""

    function: Callable[[], nn.Module] = field(default=nn.Tanh)

    def rewrite(self, work: Workspace) -> None:
        for region in work.regions():
            if not kept_reason(region):
                work.record(region.end, "swap activation", "as asked", operation_name(region.end))
                _call_instead(work, region, ShapedActivation(self.function()))


def _call_instead(work: Workspace, region: Region, module: nn.Module) -> None:
    """Call a module of the region's source alone: a learnable slope is not read any more."""
    graph = work.graph.module.graph
    with graph.inserting_before(region.end):
        call = graph.call_module(work.add_module(f"{owner_path(work, region.end)}swapped", module), (region.source,))
    call.meta = made_here(region.end)
    region.end.replace_all_uses_with(call)


@dataclass(frozen=True)
class AveragePools(Pass):
    """Max pooling becomes average pooling over the same windows."""

    def rewrite(self, work: Workspace) -> None:
        for node in work.nodes:
            if node.target in _MAX_TO_AVERAGE and work.is_random(node):
                work.record(node, "average instead of max", "as asked")
                node.target = _MAX_TO_AVERAGE[node.target]  # pyright: ignore[reportArgumentType]
                node.args = node.args[:_POOL_ARGUMENTS]
                node.kwargs = {}


@dataclass(frozen=True)
class Initialize(Pass):
    """Weights of all layers by one of `torch.nn.init`, and biases 0."""

    draw: Initializer = field(default=nn.init.kaiming_normal_)

    def rewrite(self, work: Workspace) -> None:
        generator = torch.Generator().manual_seed(work.seed)
        for layer in filter(work.is_random, work.nodes):
            if operation_name(layer) not in ("linear", *CONVOLUTIONS, *TRANSPOSED):
                continue
            weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and work.tensor(weight).ndim > 1:
                work.record(layer, "initialize", "as asked")
                if work.tensor(weight).is_meta:
                    raise InputError(f"{weight.target} is on the meta device, and cannot be drawn")
                drawn = torch.empty(work.tensor(weight).shape)  # half precision has no QR decomposition
                with torch.no_grad():
                    self.draw(drawn, generator=generator)
                    work.tensor(weight).copy_(drawn)
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                with torch.no_grad():
                    work.tensor(bias).zero_()


def variants(work: Workspace) -> Iterator[Variant]:
    """What may be changed in a model; `Variant.apply` says of each whether there was such a component.

    Args:
        work: of the model as it is, which is only looked at.
    """
    kinds = sorted({NORMS[node.target] for node in work.nodes if node.target in NORMS})  # type: ignore[index]
    norms, skips = RemoveNorms(), ScaleResiduals(0.0, only_shortcuts=True)
    yield _variant("skips and norms", f"without {' and '.join(kinds)}", norms)
    yield _variant("skips and norms", "without skips", skips)
    if kinds:
        yield _variant("skips and norms", "without both", norms, skips)
    present = {operation_name(region.end) for region in work.regions()}
    for name, function in (("relu", nn.ReLU), ("tanh", nn.Tanh), ("gelu", nn.GELU), ("selu", nn.SELU)):
        if present - {name}:
            yield _variant("activation", f"{name} instead", SwapActivations(function))
    for name, draw in (
        ("He", nn.init.kaiming_normal_),
        ("Xavier", nn.init.xavier_normal_),
        ("orthogonal", nn.init.orthogonal_),
    ):
        yield _variant("initializer", f"{name} ({draw.__name__})", Initialize(draw))
    yield _variant("pooling", "average instead of max", AveragePools())
    for method in (DKS(), TAT()):
        yield Variant("kgraph", f"transform with {type(method).__name__}", _Transform(Plan(method)))


def _variant(component: str, name: str, *passes: Pass) -> Variant:
    return Variant(component, name, _Changes(passes))


@dataclass(frozen=True)
class _Changes:
    """Passes, one after the other, each of which must find something to change."""

    passes: tuple[Pass, ...]

    def __call__(self, work: Workspace) -> bool:
        for one in self.passes:
            before = len(work.changes)
            one.apply(work)
            if len(work.changes) == before:
                return False
        work.graph.module.recompile()
        return True


@dataclass(frozen=True)
class _Transform:
    """What `kgraph.transform` would make of it."""

    plan: Plan

    def __call__(self, work: Workspace) -> bool:
        work.adopt(rewrite(work.graph, self.plan, work.first).propagation)
        return True
