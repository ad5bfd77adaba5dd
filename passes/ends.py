"""What becomes of an activation: a layer reads it, it is added to a stream that is returned, or it is the output."""

from __future__ import annotations

from torch import fx

from kgraph.canonical import operation_name
from kgraph.site import shape_of

_AFFINE = ("linear", "addmm", "matmul", "mm", "bmm", "einsum", "scaled_dot_product_attention", "lstm", "gru")


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


def joins_a_stream(node: fx.Node) -> bool:
    """Whether the node is added to another tensor of its shape, of which features [N, C, ...] are returned.

    The last branch of a network without a head: a sum has no range that anybody wants. Losses are one number an
    input, or in all.
    """
    features, seen, queue = _features_returned(node.graph), {node}, [node]
    for at in queue:  # through what keeps entries, or scales them
        for user in at.users:
            if operation_name(user) in _SUMS and _adds_another(user, at) and not _behind(user).isdisjoint(features):
                return True
            if operation_name(user) in _KEEPS and user not in seen:
                seen.add(user)
                queue.append(user)
    return False


_SUMS = {"add", "sub", "WeightedSum"}
_KEEPS = {"mul", "div", "dropout", "view", "reshape", "flatten", "transpose", "permute", "contiguous", "clone"}
_KEEPS |= {"Dropout", "Identity"}


def _adds_another(user: fx.Node, term: fx.Node) -> bool:
    others = [n for n in user.all_input_nodes if n is not term and n.op != "get_attr"]
    return bool(others) and shape_of(user) == shape_of(term) and len(shape_of(user)) > 1


def _behind(node: fx.Node) -> set[fx.Node]:
    seen, queue = {node}, [node]
    for at in queue:
        new = set(at.users) - seen
        seen |= new
        queue += new
    return seen


def _features_returned(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in graph.nodes if node.op == "output")
    return [node for node in output.all_input_nodes if len(shape_of(node)) > 1]


__all__ = ["feeds_a_layer", "joins_a_stream"]
