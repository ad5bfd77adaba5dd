"""Exponentials, and what they are made from: scales and rates rather than activations."""

from __future__ import annotations

import torch
from torch import fx

from kgraph.canonical import operation_name
from kgraph.nonlinear import Region

_EXPONENTIALS = ("exp", "exp2", "expm1")
_LINEAR = ("add", "sub", "rsub", "neg", "mul", "div", "clamp", "clamp_min", "clamp_max", "cumsum", "sum")
_MOVES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous")
_MOVES += ("clone", "expand", "select", "slice", "chunk", "split", "getitem", "unbind", "to", "t", "stack", "cat")


def is_exponential(region: Region) -> bool:
    """Whether it is exp of a multiple or of what bounds it: exp(log s), exp(2 tanh u); not a bump such as exp(-u^2)."""
    if operation_name(region.end) not in _EXPONENTIALS:
        return False
    return all(node is region.end or _is_multiple(node) for node in region.nodes) or _is_monotone(region)


def exponential_of(region: Region) -> str:
    """The node that takes exp of a multiple of the region's value, as exp(a softplus(dt)) or exp(tanh(s)) do; or "".

    Such a function bounds an exponent: shifted and scaled, a rate of decay may become one of growth.
    """
    seen, queue = {region.end}, [region.end]
    while queue:
        for user in queue.pop().users:
            if operation_name(user) in _EXPONENTIALS:
                return user.name
            if user not in seen and operation_name(user) in (*_LINEAR, *_MOVES):
                seen.add(user)
                queue.append(user)
    return ""


def is_rate(region: Region) -> bool:
    """Whether it is an exponential, or bounds the exponent of one: it has its own range, and so has what it reads."""
    return is_exponential(region) or bool(exponential_of(region))


def _is_multiple(node: fx.Node) -> bool:
    """By numbers, or a sum with itself; a product of two tensors is not."""
    return operation_name(node) in _LINEAR and sum(isinstance(a, fx.Node) for a in node.args) == 1


def _is_monotone(region: Region) -> bool:
    steps = region.fn(torch.linspace(-4, 4, 65, dtype=torch.float64)).diff()
    return bool((steps >= 0).all() or (steps <= 0).all())


__all__ = ["exponential_of", "is_exponential", "is_rate"]
