"""Noise that a forward draws for itself (a VAE's code, a random mask).

For every input of the batch another draw, or (its shape has no batch) one for all of them, and another at every call:

    E[n(a) n(a)] = E[n^2]      E[n(a) n(b)] = E[n]^2, or E[n^2] of one for all      slope = NTK = 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from kgraph import algebra
from kgraph.canonical import aten, operation_name
from kgraph.channel_dims import channel_dim
from kgraph.how import EXACT, How, assumed, sampled
from kgraph.kernel import DIFF, SAME, Kernel, Pairs, Part
from kgraph.maps import Pointwise
from kgraph.roots import Root, Roots
from kgraph.rules.pointwise import COPIES, is_pointwise
from kgraph.rules.table import Context, rule

_ENTRIES = 100_000
_NORMAL = ("randn", "randn_like", "normal", "normal_functional")
_OTHERS = ("cauchy", "geometric", "bernoulli", "poisson")
_WEIGHED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv", "bilinear", "scaled_dot_product")
"""Operations whose operands are summed over, by how their names begin: of what meets the inputs there, a weight."""
_CHOOSES = ("argsort", "sort", "topk", "argmax", "argmin", "multinomial", "searchsorted", "bucketize")
"""Operations that make a draw a choice of entries."""


def draws_noise(node: fx.Node) -> bool:
    """Whether a node makes random numbers out of known arguments, for every input of the batch or one for all.

    Integers are where they count as numbers. Without a batch, what inputs are multiplied by as by a matrix is a random
    weight, and what entries are chosen by is an index: known, like any other. Nor is dropout of a known tensor noise.
    """
    tags, value = getattr(node.target, "tags", ()), node.meta.get("val")
    if torch.Tag.nondeterministic_seeded not in tags or not isinstance(value, Tensor):
        return False
    if not node.users or not (value.is_floating_point() or _counts(node)):
        return False
    return _batched(node) or (_name(node) in (*LAWS, *_NORMAL, *_OTHERS) and not _weighs_or_chooses(node))


def _counts(node: fx.Node) -> bool:
    """Whether a draw of integers is read as numbers, and never as indices."""
    queue = [node] if _name(node) in LAWS else []
    for made in queue:
        if not all(is_pointwise(user.target) or user.target in COPIES for user in made.users):
            return False
        values = {user: user.meta.get("val") for user in made.users}
        queue += [u for u, v in values.items() if isinstance(v, Tensor) and not v.is_floating_point()]
    return bool(queue)


def _batched(node: fx.Node) -> bool:
    """Whether the first dimension is the batch's; where the forward holds that to a number, one of as many rows."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    fixed = value.ndim > 1 and value.shape[0] == _fixed_batch(node.graph)
    return isinstance(value.shape[0], torch.SymInt) or fixed


def _fixed_batch(graph: fx.Graph) -> int | None:
    """Size of a batch that the forward holds to one number, above 1."""
    inputs = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    sizes = [v.shape[0] for v in inputs if isinstance(v, Tensor) and v.ndim > 0]
    return sizes[0] if sizes and all(isinstance(size, int) and size == sizes[0] > 1 for size in sizes) else None


def _weighs_or_chooses(node: fx.Node) -> bool:
    return any(
        name.startswith(_WEIGHED) if met else name in _CHOOSES
        for name, met in ((operation_name(user), met) for _, user, met in _readers(node))
    )


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """What is made of a draw alone, a reader of it, and whether that reads something of the batch besides."""
    queue = [node]
    for made in queue:
        for user in made.users:
            met = any(_batched(other) for other in user.all_input_nodes if other is not made)
            yield made, user, met
            if not met and user not in queue:
                queue.append(user)


def _channel_dim(node: fx.Node) -> int | None:
    """Dimension of the noise that holds channels; None where what it meets has no such dimension here."""
    shape: Any = node.meta["val"].shape
    if _batched(node):
        return channel_dim(node, len(shape))
    for made, user, met in _readers(node):
        own, whole = made.meta.get("val"), user.meta.get("val")
        if met and isinstance(own, Tensor) and isinstance(whole, Tensor) and own.shape == shape:
            found = channel_dim(user, whole.ndim) - (whole.ndim - len(shape))
            return found if found >= 0 else None
    return channel_dim(node, len(shape)) if len(shape) else None


@rule(
    aten.rand_like.default,
    aten.randn_like.default,
    aten.uniform.default,
    aten.exponential.default,
    aten.log_normal.default,
    aten.normal_functional.default,
    aten.cauchy.default,
    aten.geometric.default,
)
def shaped_noise(context: Context, x: Kernel, *args: Any, **kwargs: Any) -> Kernel:
    """Noise that takes no more of a random tensor than its shape."""
    if not draws_noise(context.node) or any(isinstance(value, Kernel) for value in (*args, *kwargs.values())):
        return context.sample()
    return noise_kernel(context.node, (torch.zeros(x.shape), *args), kwargs, context.pairs)


_ONE_OF_AN_INPUT = assumed("one random number for all channels of an input")
_ONE_FOR_ALL = assumed("one random number for all inputs and channels, averaged over")


def noise_kernel(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Pairs) -> Kernel:
    """Moments of the noise by its law, or measured on draws of the operation itself where that is not known.

    What all channels share leaves them dependent, which no later layer forgets: taken as Gaussian there.
    """
    target: Any = node.target
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first: Tensor = target(*args, **kwargs).clone()  # of an operation in place, all draws are one tensor
        repeats = range(min(_ENTRIES // max(first.numel(), 1), _ENTRIES // 100))
        draws = torch.stack([first, *(target(*args, **kwargs).clone() for _ in repeats)]).double().cpu()
    shape, channel, batched = tuple(first.shape), _channel_dim(node), _batched(node)
    roles = ["b" if i == 0 and batched else "c" if i == channel else "p" for i in range(len(shape))]
    shared = torch.zeros(len(pairs.inputs), 2, dtype=torch.bool)
    shared[Pairs.SELF if batched else slice(None), SAME] = True
    if not any(role == "p" and size > 1 for role, size in zip(roles, shape, strict=True)):
        shared[:, DIFF] = shared[:, SAME] & (not batched)
    size = 1 if channel is None else shape[channel]
    part = _of_its_law(node, args, kwargs, shared, size) or _measured(node, draws, shared, size)
    if size == 1:
        part = replace(part, how=part.how | (_ONE_OF_AN_INPUT if batched else _ONE_FOR_ALL))
    axes = tuple(((role, size),) if size > 1 else () for role, size in zip(roles, shape, strict=True))
    return Kernel((part,), axes)


def _measured(node: fx.Node, draws: Tensor, shared: Tensor, size: int) -> Part:
    """Noise of unknown law, by draws."""
    q, mean = float(draws.square().mean()), float(draws.mean())
    error = float(draws.square().std() / (max(q, 1e-300) * draws.numel() ** 0.5))
    how = sampled(error) if _name(node) in _NORMAL else assumed("its noise counts as Gaussian")
    return _part(node, shared, size, q, mean, how)


def _part(node: fx.Node, shared: Tensor, size: int, q: float, mean: float, how: How = EXACT) -> Part:
    cov = torch.where(shared, q, mean**2).double()
    nothing = torch.zeros_like(cov)
    return Part(size, cov, nothing, nothing, mean, Roots({Root(node.name)}), how=how)


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1].rstrip("_")


def _of_its_law(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Tensor, size: int) -> Part | None:
    """The noise as a function of standard Gaussians, one and the same where ``shared``; None of unknown law."""
    given, normal = _arguments(cast(OpOverload, node.target), args, kwargs), _part(node, shared, size, 1.0, 0.0)
    if _name(node) == "bernoulli":
        chances = torch.as_tensor(given["self"] if given.get("p") is None else given["p"]).double().flatten()
        if not bool((chances == chances[0]).all()):
            return None
        return algebra.mask(normal, float(chances[0]), 1.0, shared, node.name)
    if _name(node) in _NORMAL:
        mean, std = given.get("mean", 0.0), given.get("std", 1.0)
        if isinstance(mean, Tensor) or isinstance(std, Tensor):
            return None
        return _part(node, shared, size, std**2 + mean**2, mean)
    make = LAWS.get(_name(node))
    return None if make is None else algebra.apply(Pointwise(make(given)), normal)


def _arguments(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an operation by name."""
    schema = target._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs


Law = Callable[[dict[str, Any]], Callable[[Tensor], Tensor]]
_LEAST = 2.0**-54
"""Of a uniform number on either side: PyTorch's are never 1, and hardly ever 0."""


def _uniform(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda z: low + (high - low) * torch.special.ndtr(z).clamp(_LEAST, 1 - 2 * _LEAST)


def _whole(low: int, high: int) -> Callable[[Tensor], Tensor]:
    numbers = _uniform(low, high)
    return lambda z: numbers(z).floor()


LAWS: dict[str, Law] = {
    "rand": lambda given: _uniform(0.0, 1.0),
    "rand_like": lambda given: _uniform(0.0, 1.0),
    "uniform": lambda given: _uniform(given["from"], given["to"]),
    "randint": lambda given: _whole(given.get("low", 0), given["high"]),
    "randint_like": lambda given: _whole(given.get("low", 0), given["high"]),
    "exponential": lambda given: lambda z: -torch.special.log_ndtr(-z) / given["lambd"],
    "log_normal": lambda given: lambda z: torch.exp(given["mean"] + given["std"] * z),
}
"""Quantile functions, at the probability that a standard Gaussian is below z, by the operation's name: the draw at z.

An exponential number is ``-log P(Gaussian > z)``.
"""
