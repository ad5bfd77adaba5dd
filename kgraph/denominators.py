"""What scales a tensor by its own statistics: the clamp, root or power in a denominator is no activation.

Norms that have no name here (x / mean|x|, a clamped length) are made of such pieces, which no constants should shape.
"""

from __future__ import annotations

from torch import fx

from kgraph.written_norms import ALLOWED, REDUCTIONS, name_of


def is_denominator(node: fx.Node) -> bool:
    """Whether ``node`` is read only to divide a tensor, and something is averaged before, behind or in it."""
    return _only_divides(node) and (_averages(node) or _averaged_later(node))


def _only_divides(node: fx.Node, inverted: bool = False) -> bool:
    return bool(node.users) and all(_divides(user, node, inverted) for user in node.users)


def _divides(user: fx.Node, node: fx.Node, inverted: bool) -> bool:
    name = name_of(user)
    if name == "div" and user.args[1] is node and user.args[0] is not node:
        return not inverted
    if name == "mul" and inverted:
        return True
    turned = name in ("rsqrt", "reciprocal") or (name == "pow" and _negative(user))
    return name in ALLOWED and _only_divides(user, inverted != turned)


def _negative(power: fx.Node) -> bool:
    return isinstance(power.args[1], (int, float)) and power.args[1] < 0


def _averages(node: fx.Node) -> bool:
    """Whether arithmetic alone leads from a reduction to ``node``."""
    queue, seen = [node], {node}
    while queue:
        one = queue.pop()
        if name_of(one) in REDUCTIONS:
            return True
        found = [n for n in one.all_input_nodes if n not in seen] if name_of(one) in ALLOWED else []
        seen.update(found)
        queue += found
    return False


def _averaged_later(node: fx.Node) -> bool:
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if name_of(user) in REDUCTIONS:
                return True
            if name_of(user) in ALLOWED - {"div", "mul"} and user not in seen:
                seen.add(user)
                queue.append(user)
    return False


__all__ = ["is_denominator"]
