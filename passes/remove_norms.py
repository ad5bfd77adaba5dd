"""Remove normalization layers; a layer that fed one and had no bias gets a zero bias.

Without the added bias the model class would shrink: the norm's own shift made the bias redundant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from kgraph.canonical import aten, is_effect, operation_name
from kgraph.gradient_stops import read_instead, stopped_between
from kgraph.kernel import Kernel
from kgraph.modules import NORM_FACTOR, Scale
from kgraph.nonlinear import known_value
from kgraph.norm_chain import WRITTEN, chain_of
from kgraph.passes.base import Pass, Workspace, made_here, owner_path
from kgraph.site import site_of

NORMS = {
    aten.batch_norm.default: "BatchNorm",
    aten.layer_norm.default: "LayerNorm",
    aten.group_norm.default: "GroupNorm",
    aten.instance_norm.default: "InstanceNorm",
    aten.rms_norm.default: "RMSNorm",
}
_AFFINE = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_CONTRACTIONS = ("matmul", "mm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_NEAR_ONE = 0.1
_THROUGH = (
    "dropout",
    "reshape",
    "view",
    "flatten",
    "permute",
    "transpose",
    "contiguous",
    "clone",
    "squeeze",
    "unsqueeze",
)


@dataclass(frozen=True)
class RemoveNorms(Pass):
    """Remove BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm and LocalResponseNorm."""

    def rewrite(self, work: Workspace) -> None:
        _remove_response_norms(work)
        activations = {node for region in work.regions() for node in region.nodes}
        for node in work.nodes:
            source = node.args[0] if node.target in NORMS else None
            if isinstance(source, fx.Node) and work.is_random(source):
                _remove(work, node, source, activations)

    def broken(self, work: Workspace) -> str:
        left = [n.name for n in work.nodes if n.target in NORMS and work.is_random(n.args[0])]
        return f"{', '.join(left)} still normalize" if left else ""


def _remove(work: Workspace, node: fx.Node, source: fx.Node, activations: set[fx.Node]) -> None:
    value = work.before().values.get(source)  # None: an earlier pass made it
    before = f"q {float(value.merged.q):.3g} in" if isinstance(value, Kernel) else ""
    chain = chain_of(node)
    first, end = chain[0].args[0], chain[-1]
    assert isinstance(first, fx.Node)
    note = _give_bias(work, first)
    line = stopped_between(first, end, chain)
    factor = _factor(work, chain)
    stays = factor > 0 and abs(factor - 1) > _NEAR_ONE and _sets_a_size(work, end, activations)
    kept = f"; its factor {factor:.4g} stays: it is the size of what leaves the model or meets another tensor"
    why = f"normalization-free by design{note}{kept if stays else ''}"
    work.record(node, f"remove {NORMS[node.target]}", why, before, "gone")  # type: ignore[index]
    graph = work.graph.module.graph
    if stays:
        path = work.add_module(f"{owner_path(work, end)}scale", Scale(factor, reason=NORM_FACTOR))
        with graph.inserting_before(end):
            call = graph.call_module(path, (first,))
        call.meta = made_here(end)
        first = call
    read_instead(end, first, line)
    for gone in [*_updates(work, end), *reversed(chain)]:
        graph.erase_node(gone)


def _updates(work: Workspace, end: fx.Node) -> list[fx.Node]:
    """Writes to running statistics within the call of a norm's own module, the last one first."""
    site = site_of(end)
    if not (WRITTEN in end.meta and site.path):
        return []
    return [n for n in reversed(work.nodes) if is_effect(n) and n.op == "call_function" and site_of(n).key == site.key]


def _factor(work: Workspace, chain: list[fx.Node]) -> float:
    """What a written norm multiplies by besides a gain of the norm's own shape: 1 / sqrt(n) for unit vectors."""
    factor = 1.0
    for node in chain:
        other = node.args[1] if node.target is aten.mul.Tensor else 1.0
        if isinstance(other, fx.Node):
            size = known_value(other, work.graph.module).double().square().mean().sqrt()
            factor *= float(size) if not size.is_meta else 1.0
        elif isinstance(other, (int, float)):
            factor *= other
    return factor


def _sets_a_size(work: Workspace, end: fx.Node, activations: set[fx.Node]) -> bool:
    """Whether a norm's factor is what logits or an output are made of, not just the q value of a layer's input.

    Vectors of unit length that meet each other (cosine attention, contrastive heads), or leave the model without an
    activation or a layer behind them, keep their length, and so do those that meet unit rows of a weight (cosine
    classifiers): the logits are cosines. In front of a layer whose weight is drawn anew, q = 1 is wanted.
    """
    followed, seen, queue = False, {end}, [(end, False)]
    while queue:
        node, mixed = queue.pop()
        for user in node.users:
            name = operation_name(user)
            if user in activations or user.target in NORMS or (name in _AFFINE and _is_drawn(user)):
                followed = True
            elif name in _CONTRACTIONS and sum(map(work.carries_random, set(user.all_input_nodes))) > 1:
                if not mixed:
                    return True
                followed = True
            elif user not in seen:
                seen.add(user)
                queue.append((user, mixed or name in _AFFINE))
    return not followed


def _is_drawn(layer: fx.Node) -> bool:
    """Whether an affine layer's weight is a tensor of its own, and not computed from one."""
    return len(layer.args) > 1 and isinstance(layer.args[1], fx.Node) and layer.args[1].op == "get_attr"


def _producer(node: fx.Node) -> fx.Node | None:
    """The affine layer whose output a norm reads, through operations that keep the channels."""
    while operation_name(node) in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if operation_name(node) in _AFFINE else None


def _give_bias(work: Workspace, source: fx.Node) -> str:
    layer = _producer(source)
    if layer is None or len(layer.args) < 2 or (len(layer.args) > 2 and layer.args[2] is not None):
        return ""
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return ""
    holder = str(weight.target).rpartition(".")[0]
    name = f"{holder}.bias" if holder else "bias"
    tensor = work.tensor(weight)
    size = tensor.shape[1] * _groups(layer) if "transpose" in operation_name(layer) else tensor.shape[0]
    work.add_parameter(name, nn.Parameter(torch.zeros(size, dtype=tensor.dtype, device=tensor.device)))
    graph = work.graph.module.graph
    with graph.inserting_before(layer):
        bias = graph.get_attr(name)
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
    return "; its layer gained a zero bias"


def _groups(layer: fx.Node) -> int:
    return int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[call-overload]


def _remove_response_norms(work: Workspace) -> None:
    """LocalResponseNorm is several operations: drop the whole module call."""
    calls: dict[tuple[str, int], list[fx.Node]] = {}
    modules = dict(work.graph.root.named_modules())
    for node in work.nodes:
        site = site_of(node)
        if node.op == "call_function" and isinstance(modules.get(site.path), nn.LocalResponseNorm):
            calls.setdefault(site.key, []).append(node)
    for nodes in calls.values():
        inside = set(nodes)
        source = next(n for node in nodes for n in node.all_input_nodes if n not in inside)
        end = next(node for node in reversed(nodes) if any(user not in inside for user in node.users))
        work.record(end, "remove LocalResponseNorm", "normalization-free by design")
        read_instead(end, source, stopped_between(source, end, inside))
