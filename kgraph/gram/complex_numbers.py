"""Complex numbers on real inputs: fields are real, so only what becomes real again at once has a kernel.

Re((A + iB) u) = A u for real u: the real part of a layer's output is that of a layer with the weight's real part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.canonical import aten, operation_name
from kgraph.errors import RuleError
from kgraph.gram.value import Value
from kgraph.rules.pointwise import COPIES
from kgraph.site import site_of

_LAYERS = ("linear", "matmul", "mm", "addmm", "einsum", "conv1d", "conv2d", "conv3d")
HINT = "kgraph.analyze measures it on draws; or write real and imaginary parts as real tensors"


def refuse_complex(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    """Raise a RuleError where a node's random result is complex, but for a real tensor's cast and `_becomes_real`."""
    if any(isinstance(leaf, complex) for leaf in pytree.tree_leaves((node.args, node.kwargs))):
        raise _error(node)
    if is_complex(node) and not _cast(node) and not _becomes_real(node, values):
        raise _error(node)


def _error(node: fx.Node) -> RuleError:
    what = f"the result of {operation_name(node)} is complex, and there is no kernel rule for complex numbers"
    return RuleError(what, node=node.name, source=site_of(node).source or None, hint=HINT)


def _becomes_real(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a layer reads real numbers, and of its output nothing but the real part is read."""
    random = [n for n in node.all_input_nodes if isinstance(values[n], Value)]
    reads_real = all(_cast(n) or not is_complex(n) for n in random)
    read = {user.target for user in node.users} == {aten.real.default}
    return reads_real and read and operation_name(node) in _LAYERS


def _cast(node: fx.Node) -> bool:
    """Whether the node is complex by its type alone: a cast of a real tensor, or of such a cast."""
    while is_complex(node) and node.target in COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if not is_complex(node):
            return True
    return False


def is_complex(node: fx.Node) -> bool:
    """Whether the node's result is a tensor of complex numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


__all__ = ["HINT", "is_complex", "refuse_complex"]
