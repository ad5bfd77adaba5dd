"""What a product of matrices is, by what it computes: attention, its logits, a mixing by constants, a plain product."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import fx, nn

from kgraph.canonical import aten, operation_name

Contraction = Literal["attention", "logits", "constant", "parameter", "product"]
PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "einsum")
"""Operations that sum products of entries of two tensors, neither of which need be a parameter."""
_SOFTMAX = ("softmax", "_softmax", "log_softmax")
_BARRIERS = (*PRODUCTS, "linear", "addmm", "bilinear", "embedding", "scaled_dot_product_attention", "lstm", "gru")
"""Where the ancestry of an operand ends: what lies beyond is another product."""

WORDS: dict[Contraction, str] = {
    "attention": "attention averages positions; how much depends on the data",
    "logits": "attention logits are sums over channels of products of queries and keys",
    "constant": "mixing by a constant matrix, whose rows say how much is added up",
    "parameter": "a product with a parameter, by the size of that parameter",
    "product": "a product of two activations: q is a product of theirs, and more where they depend on each other",
}


def contraction_of(node: fx.Node, is_random: Callable[[fx.Node], bool]) -> Contraction | None:
    """Which product of matrices a node is; None for any other operation.

    Attention has a softmax in the ancestry of an operand, its logits have one behind them, either within the same
    product: no other layer lies between.
    """
    name = operation_name(node)
    if name == "scaled_dot_product_attention":
        return "attention"
    if name not in PRODUCTS:
        return None
    operands = _factors(node)
    known = [operand for operand in operands if not is_random(operand)]
    if known:
        return "parameter" if any(_trained(operand) for operand in known) else "constant"
    if any(map(follows_softmax, operands)):
        return "attention"
    if any(_found(user, lambda n: n.users) for user in node.users):
        return "logits"
    return "product"


def follows_softmax(node: fx.Node) -> bool:
    """Whether a node holds the weights of an average, through whatever is no layer."""
    return _found(node, lambda n: n.all_input_nodes)


def _factors(node: fx.Node) -> list[fx.Node]:
    """The tensors that are multiplied: not what baddbmm adds."""
    return [n for n in node.all_input_nodes if node.target is not aten.baddbmm.default or n is not node.args[0]]


def _found(start: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether a softmax lies on a way from ``start`` that meets no other layer."""
    seen, queue = {start}, [start]
    for node in queue:
        name = operation_name(node).lower()
        if name in _SOFTMAX:
            return True
        if name not in _BARRIERS and not name.startswith("conv"):
            new = set(following(node)) - seen
            seen |= new
            queue += new
    return False


def _trained(node: fx.Node) -> bool:
    """Whether a parameter is among what a tensor is computed from."""
    owner = node.graph.owning_module
    parameters = dict(owner.named_parameters(remove_duplicate=False)) if isinstance(owner, nn.Module) else {}
    seen, queue = {node}, [node]
    for at in queue:
        if at.op == "get_attr" and str(at.target) in parameters:
            return True
        new = set(at.all_input_nodes) - seen
        seen |= new
        queue += new
    return False


__all__ = ["PRODUCTS", "WORDS", "Contraction", "contraction_of", "follows_softmax"]
