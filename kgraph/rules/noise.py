"""Noise that a forward draws for itself (a VAE's code, a random mask): another draw for every input.

E[n(a) n(a)] = E[n^2]      E[n(a) n(b)] = E[n]^2      slope = NTK = 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from kgraph import algebra
from kgraph.canonical import aten
from kgraph.channel_dims import channel_dim
from kgraph.how import assumed, sampled
from kgraph.kernel import SAME, Kernel, Pairs, Part
from kgraph.maps import Pointwise
from kgraph.roots import Root, Roots
from kgraph.rules.table import Context, rule

_ENTRIES = 100_000
_NORMAL = ("randn", "randn_like", "normal", "normal_functional")


def draws_noise(node: fx.Node) -> bool:
    """Whether a node makes random numbers for every input of the batch out of known arguments.

    A draw without the batch dimension is one number for all inputs of a batch: known, like any other constant. Where
    the forward holds the batch to a number, a draw of that many rows has that dimension.
    """
    tags, value = getattr(node.target, "tags", ()), node.meta.get("val")
    if torch.Tag.nondeterministic_seeded not in tags or not isinstance(value, Tensor):
        return False
    if not value.is_floating_point() or value.ndim < 2:
        return value.is_floating_point() and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
    return isinstance(value.shape[0], torch.SymInt) or value.shape[0] == _fixed_batch(node.graph)


def _fixed_batch(graph: fx.Graph) -> int | None:
    """Size of a batch that the forward holds to one number, above 1."""
    inputs = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    sizes = {v.shape[0] for v in inputs if isinstance(v, Tensor) and v.ndim > 0}
    return next((size for size in sizes if isinstance(size, int) and size > 1 and len(sizes) == 1), None)


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
    channel = channel_dim(context.node, len(x.shape))
    return noise_kernel(context.node, channel, (torch.zeros(x.shape), *args), kwargs, context.pairs)


def noise_kernel(node: fx.Node, channel: int, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Pairs) -> Kernel:
    """Moments of the noise by its law, or measured on draws of the operation itself where that is not known."""
    target: Any = node.target
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first: Tensor = target(*args, **kwargs)
        repeats = range(min(_ENTRIES // max(first.numel(), 1), _ENTRIES // 100))
        draws = torch.stack([first, *(target(*args, **kwargs) for _ in repeats)]).double().cpu()
    q, mean = float(draws.square().mean()), float(draws.mean())
    cov = torch.full((len(pairs.inputs), 2), mean**2, dtype=torch.float64)
    cov[Pairs.SELF, SAME] = q
    nothing, shape = torch.zeros_like(cov), tuple(first.shape)
    error = float(draws.square().std() / (max(q, 1e-300) * draws.numel() ** 0.5))
    how = sampled(error) if _name(node) in _NORMAL else assumed("its noise counts as Gaussian")
    axes = tuple(
        ((("b" if i == 0 else "c" if i == channel else "p"), size),) if size > 1 else () for i, size in enumerate(shape)
    )
    part = Part(shape[channel], cov, nothing, nothing, mean, Roots({Root(node.name)}), how=how)
    return Kernel((_of_its_law(node, args, kwargs, part) or part,), axes)


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _of_its_law(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], drawn: Part) -> Part | None:
    """The noise as a function of standard Gaussians, none shared by two inputs or positions; None of unknown law."""
    given = _arguments(cast(OpOverload, node.target), args, kwargs)
    if _name(node) == "bernoulli":
        chances = torch.as_tensor(given["self"] if given.get("p") is None else given["p"]).double().flatten()
        if not bool((chances == chances[0]).all()):
            return None
        itself = torch.zeros(drawn.cov.shape, dtype=torch.bool)
        itself[Pairs.SELF, SAME] = True
        return algebra.mask(drawn, float(chances[0]), 1.0, itself, node.name)
    make = LAWS.get(_name(node))
    if make is None:
        return None
    nothing = torch.zeros_like(drawn.cov)
    own = nothing.clone()
    own[Pairs.SELF, SAME] = 1.0
    normal = Part(drawn.size, own, nothing, nothing, 0.0, drawn.roots)
    return algebra.apply(Pointwise(make(given)), normal)


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


LAWS: dict[str, Law] = {
    "rand": lambda given: _uniform(0.0, 1.0),
    "rand_like": lambda given: _uniform(0.0, 1.0),
    "uniform": lambda given: _uniform(given["from"], given["to"]),
    "exponential": lambda given: lambda z: -torch.special.log_ndtr(-z) / given["lambd"],
    "log_normal": lambda given: lambda z: torch.exp(given["mean"] + given["std"] * z),
}
"""Quantile functions, at the probability that a standard Gaussian is below z, by the operation's name: the draw at z.

An exponential number is ``-log P(Gaussian > z)``.
"""
