"""Affine layers of a residual chain that stand at the same place of equal blocks: they share a depth axis."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import operation_name
from kgraph.residual.branches import AFFINE
from kgraph.residual.chains import ResidualChain


def layers_by_role(module: fx.GraphModule, chain: ResidualChain) -> dict[str, list[fx.Node]]:
    """Affine nodes by role, in order of depth: V, then W1, W2, ... from V on inwards, with shape and block type."""
    roles: dict[str, list[fx.Node]] = {}
    for block in chain.blocks:
        for index, branch in enumerate(block.branches):
            for back, node in enumerate(reversed(branch.affine)):
                place = f"W{back}" if back else "V"
                numbered = f", branch {index + 1}" if index else ""
                role = f"{place} {_shape(module, weight_of(node))} of {branch.kind} blocks{numbered}"
                roles.setdefault(role, []).append(node)
    return roles


def tensor_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a ``get_attr`` node."""
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def weight_of(node: fx.Node) -> fx.Node:
    """The weight operand of an affine node."""
    weight = node.args[AFFINE[operation_name(node)]]
    assert isinstance(weight, fx.Node)
    return weight


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias operand of an affine node, if there is one."""
    at = 0 if operation_name(node) == "addmm" else 2
    bias = node.args[at] if operation_name(node) not in ("matmul", "mm") and len(node.args) > at else None
    return bias if isinstance(bias, fx.Node) else None


def fan_in(node: fx.Node, weight: Tensor) -> int:
    """Entries that one output reads: of [out, in, ...] layouts, and of addmm's and matmul's [in, out]."""
    name = operation_name(node)
    if name in ("addmm", "matmul", "mm"):
        return weight.shape[0]
    if name.startswith("conv_transpose"):  # [in, out / groups, ...]
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return weight.numel() // weight.shape[1] // int(groups)  # type: ignore[call-overload]
    return weight.numel() // weight.shape[0]


def parameter_uses(module: fx.GraphModule) -> dict[str, int]:
    """How many nodes read each parameter."""
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    return uses


def shared_layers(module: fx.GraphModule, chain: ResidualChain) -> set[fx.Node]:
    """Affine nodes of the roles that have one parameter for all blocks of the chain."""
    found = set[fx.Node]()
    for layers in layers_by_role(module, chain).values():
        weights = [weight_of(node) for node in layers]
        if len(layers) > 1 and all(w.op == "get_attr" and w.target == weights[0].target for w in weights):
            found.update(layers)
    return found


def copied_layers(module: fx.GraphModule, chain: ResidualChain) -> set[fx.Node]:
    """Affine nodes of the roles whose parameters are several, but all with the same random values."""
    found = set[fx.Node]()
    for layers in layers_by_role(module, chain).values():
        weights = [weight_of(node) for node in layers]
        if any(weight.op != "get_attr" for weight in weights) or len({str(w.target) for w in weights}) == 1:
            continue
        first, *others = (tensor_of(module, weight).detach() for weight in weights)
        if not first.is_meta and bool((first != first.flatten()[0]).any()):  # zeros are no draw
            found.update(layers if all(torch.equal(first, other) for other in others) else ())
    return found


def obstacle(module: fx.GraphModule, layers: list[fx.Node], uses: dict[str, int]) -> str:
    """Why these layers' weights cannot be drawn along depth, or ""."""
    weights = [weight_of(node) for node in layers]
    if any(weight.op != "get_attr" for weight in weights):
        return "a weight is computed from something else than one parameter"
    if any(not isinstance(tensor_of(module, weight), nn.Parameter) for weight in weights):
        return "it is a constant of the model, no parameter"
    if any(uses[str(weight.target)] > 1 for weight in weights):
        return "several layers share one weight"
    if len({tuple(tensor_of(module, weight).shape) for weight in weights}) > 1:
        return "the blocks' weights differ in shape"
    return ""


def stacked(module: fx.GraphModule, layers: list[fx.Node]) -> Tensor:
    """The layers' weights as paths, [L, entries], float64."""
    with torch.no_grad():
        return torch.stack([tensor_of(module, weight_of(node)).detach().double().flatten() for node in layers])


def _shape(module: fx.GraphModule, weight: fx.Node) -> str:
    return "x".join(map(str, tensor_of(module, weight).shape)) if weight.op == "get_attr" else "(computed)"
