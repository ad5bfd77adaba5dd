"""The walk: every node of a captured graph gets its kernel, in order, from the rules."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph import algebra, draws, laws
from kgraph.canonical import aten, operation_name
from kgraph.capture import Graph
from kgraph.channel_dims import channel_dim
from kgraph.checks import choice
from kgraph.input_moments import WHITE, InputMoments, check_possible, covariances
from kgraph.kernel import SAME, Apply, Gaussian, Kernel, Pairs, Part, Product, Samples, Sum, Unknown
from kgraph.roots import Root, Roots
from kgraph.rules import Context, Sampler, find_rule, speeds
from kgraph.rules.borders import Borders
from kgraph.rules.crossings import of_an_angle
from kgraph.rules.noise import draws_noise, noise_kernel
from kgraph.rules.pointwise import is_pointwise, unary
from kgraph.rules.sampled import for_mode
from kgraph.rules.unallocated import Unallocated
from kgraph.scatter import of_white
from kgraph.site import located
from kgraph.written_buffers import written

TOKEN_VIEWS = frozenset(
    """chunk clone contiguous expand flatten flip gather getitem index index_select movedim narrow permute repeat
    reshape roll select slice split split_with_sizes squeeze stack swapaxes t tile to _to_copy transpose unbind
    unflatten unsqueeze view""".split()  # noqa: SIM905
)
"""Names of the operations through which token ids stay token ids: they only move entries."""


Adjust = Callable[[fx.Node, Kernel, dict[fx.Node, Any]], Kernel]


@dataclass(frozen=True)
class Propagation:
    """Values of all nodes after a walk: kernels where random, plain values where known.

    Attributes:
        values: value of every node.
        pairs: the input pairs.
        mode: "train" or "eval".
        seconds: time the walk took.
        parametrization: of the NTK.
        notes: what was assumed of tensors without values.
    """

    values: dict[fx.Node, Any]
    pairs: Pairs
    mode: str
    seconds: float
    parametrization: str = "standard"
    notes: tuple[str, ...] = ()

    def kernels(self) -> dict[fx.Node, Kernel]:
        """Nodes whose value is one kernel."""
        return self._kernels

    @cached_property
    def _kernels(self) -> dict[fx.Node, Kernel]:
        return {node: value for node, value in self.values.items() if isinstance(value, Kernel)}


def propagate(
    graph: Graph,
    *,
    mode: str = "train",
    pairs: Pairs | None = None,
    positions: str = "exchangeable",
    parametrization: str = "standard",
    count_frozen: bool = False,
    adjust: Adjust | None = None,
) -> Propagation:
    """Propagate probe pairs through ``graph``.

    Args:
        graph: a captured model.
        mode: "train" (batch statistics, dropout) or "eval".
        pairs: input cosines and the batch's background cosine.
        positions: position model; "exchangeable".
        parametrization: of the NTK, "standard" or "ntk".
        count_frozen: whether parameters with ``requires_grad=False`` have their part in the NTK too.
        adjust: called with every node's kernel and all values before it; what it returns flows on instead.

    Raises:
        InputError: unknown mode, position model or parametrization.
    """
    choice("mode", mode, ("train", "eval"))
    choice("positions", positions, ("exchangeable",))
    choice("parametrization", parametrization, ("standard", "ntk"))
    start = time.perf_counter()
    draws.restart()
    laws.restart()
    speeds.restart()
    walk = _Walk(graph, pairs or Pairs(), mode, parametrization, adjust, count_frozen)
    with torch.no_grad():
        values = walk.run()
    values |= walk.unallocated.values
    seconds, notes = time.perf_counter() - start, (*walk.unallocated.notes(), *_frozen(graph, count_frozen))
    return Propagation(values, walk.pairs, mode, seconds, parametrization, notes)


def reread(graph: Graph, known: Propagation, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """Values of some of a graph's calls by their rules as they are now, where those of all before are ``known``."""
    walk = _Walk(graph, known.pairs, known.mode, known.parametrization)
    walk.values |= known.values
    with torch.no_grad():
        return {node: walk.value(node) for node in nodes}


def _frozen(graph: Graph, count_frozen: bool) -> tuple[str, ...]:
    frozen = [name for name, p in graph.root.named_parameters() if not p.requires_grad]
    if count_frozen or not frozen:
        return ()
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return (f"frozen, and so without a part in the NTK (count_frozen=True counts it): {', '.join(frozen[:3])}{more}",)


class _Walk:
    def __init__(
        self,
        graph: Graph,
        pairs: Pairs,
        mode: str,
        parametrization: str,
        adjust: Adjust | None = None,
        count_frozen: bool = False,
    ) -> None:
        self.adjust, self.count_frozen = adjust, count_frozen
        self.graph, self.pairs, self.mode, self.parametrization = graph, pairs, mode, parametrization
        self.values: dict[fx.Node, Any] = {}
        self.tokens: set[fx.Node] = set()
        self.unallocated = Unallocated()
        seen = cast(dict[fx.Node, Any], ChainMap(self.unallocated.values, self.values))
        self.sampler = Sampler(seen, graph.module, pairs, mode)
        self.borders = Borders(self.sampler.sampled)
        leaves, _ = pytree.tree_flatten(graph.inputs)
        self.inputs = iter(leaves)

    def run(self) -> dict[fx.Node, Any]:
        for node in self.graph.module.graph.nodes:
            if node.op == "output":
                continue
            value = self.value(node)
            value = self.borders.judged(node, value, self.values)
            if isinstance(value, Kernel):
                value = still_infinite(_without_pairs(value), [self.values[n] for n in node.all_input_nodes])
            if self.adjust is not None and isinstance(value, Kernel):
                value = self._adjusted(node, value, self.adjust)
            self.values[node] = value
        return self.values

    def value(self, node: fx.Node) -> Any:
        """By the node's rule, from the values before it."""
        with located(node):
            return getattr(self, f"_{node.op}")(node)

    def _adjusted(self, node: fx.Node, value: Kernel, adjust: Adjust) -> Kernel:
        """A kernel moved and scaled after its rule: draws that run the operation itself do so with their results."""
        adjusted = adjust(node, value, self.values)
        if adjusted is not value and float(value.merged.q) > 0:
            self.sampler.images[node] = _image(value.merged, adjusted.merged)
        return adjusted

    def _placeholder(self, node: fx.Node) -> Any:
        value = next(self.inputs)
        if isinstance(value, Tensor) and value.is_floating_point():
            moments = self.pairs.moments.get(node.name, WHITE)
            if not moments.white:
                self.borders.related(node)
            if moments.uneven:
                self.borders.uneven.add(node)
            return input_kernel(node, tuple(value.shape), self.pairs)
        if isinstance(value, Tensor):
            self.tokens.add(node)
        return value

    def _get_attr(self, node: fx.Node) -> Any:
        value: Any = self.graph.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, Tensor) else value

    def _call_module(self, node: fx.Node) -> Any:
        module = self.graph.module.get_submodule(str(node.target))
        args, kwargs = self._arguments(node)
        if not _random(args, kwargs):
            return module(*args, **kwargs)
        args, kwargs = self.unallocated.filled(node, self.values)
        context = self._context(node)
        rule = find_rule(type(module))
        return rule(context, module, *args, **kwargs) if rule else context.sample()

    def _call_function(self, node: fx.Node) -> Any:
        args, kwargs = self._arguments(node)
        target: Any = node.target
        if target is aten.sym_size.int and isinstance(args[0], Kernel):
            return args[0].shape[args[1]]
        if target in (aten.embedding.default, aten.embedding_bag.padding_idx) and self._reads_tokens(node):
            args, kwargs = self.unallocated.filled(node, self.values)
            return find_rule(target)(self._context(node), *args, **kwargs)  # type: ignore[misc]
        if not _random(args, kwargs):
            if draws_noise(node):
                return noise_kernel(node, args, kwargs, self.pairs)
            return known_result(node, for_mode(node, args, self.mode), kwargs, self.tokens, self.values)
        args, kwargs = self.unallocated.filled(node, self.values)
        context = self._context(node)
        rule = None if is_pointwise(target) and _with_complex(args) else find_rule(target)
        if rule is not None:
            return rule(context, *args, **kwargs)
        if is_pointwise(target) and _one_random(args, kwargs) and not _reads_complex(node, args):
            return context.sample() if of_an_angle(node) else unary(context, target, args, kwargs)
        return context.sample()

    def _reads_tokens(self, node: fx.Node) -> bool:
        return any(n in self.tokens for n in node.all_input_nodes)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])  # type: ignore[return-value]

    def _context(self, node: fx.Node) -> Context:
        sample = partial(self.sampler.sample, node)
        return Context(node, self.mode, self.pairs, self.parametrization, sample, self.count_frozen, self.values)


def _image(before: Part, after: Part) -> tuple[float, float]:
    """Factor and offset of the affine map that made one part of the other, from their moments."""
    factor = (float(after.q) / float(before.q)) ** 0.5
    if abs(after.mean - factor * before.mean) <= 1e-12 * (abs(after.mean) + factor * abs(before.mean)):
        return factor, 0.0
    variance = float(before.q) - before.mean**2
    factor = ((float(after.q) - after.mean**2) / variance) ** 0.5 if variance > 0 else 1.0
    return factor, after.mean - factor * before.mean


def known_result(
    node: fx.Node, args: Any, kwargs: Any, tokens: set[fx.Node], values: MutableMapping[fx.Node, Any]
) -> Any:
    """Value of a function of known values; the user's buffers are never advanced, and views of tokens are tokens."""
    if any(n in tokens for n in node.all_input_nodes) and operation_name(node) in TOKEN_VIEWS:
        tokens.add(node)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return written(node, args, kwargs, values)


def _without_pairs(value: Kernel) -> Kernel:
    """One position has no pairs whose cosines scatter, and what is copied from it has none either."""
    if value.positions > 1 or all(part.scatter is None for part in value.parts):
        return value
    return value.told(*(replace(part, scatter=None) for part in value.parts))


def still_infinite(value: Kernel, inputs: list[Any]) -> Kernel:
    """An infinite slope stays infinite behind rules that average, as long as inputs can be told apart.

    What is written as a function shows by itself whether it jumps: x * (x > 0) does not. What is drawn may have run
    the jump with what follows.
    """
    shown = (Apply, Sum, Product, Samples)
    cov = value.merged.cov[: Pairs.SELF, SAME]
    if not any(isinstance(k, Kernel) and algebra.endless(k.merged) for k in inputs) or bool((cov == cov[0]).all()):
        return value
    return value.told(*(p if isinstance(p.expr, shown) else algebra.infinite(p) for p in value.parts))


def _random(args: Any, kwargs: Any) -> bool:
    values = (*args, *kwargs.values())
    if any(isinstance(value, Kernel) for value in values):
        return True
    nested = [value for value in values if isinstance(value, (list, tuple, dict))]
    return any(isinstance(leaf, Kernel) for leaf in pytree.tree_leaves(nested)) if nested else False


def _with_complex(args: tuple[Any, ...]) -> bool:
    """Whether a known operand is complex."""
    return any(isinstance(v, complex) or (isinstance(v, Tensor) and v.is_complex()) for v in args)


def _reads_complex(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether complex numbers go in, of which the second moments of a part are too little to know a function."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return _with_complex(args) or any(isinstance(v, Tensor) and v.is_complex() for v in values)


def _one_random(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (Kernel, Tensor))]
    return len(tensors) == 1 and any(isinstance(value, Kernel) for value in args)


def input_kernel(node: fx.Node, shape: tuple[int, ...], pairs: Pairs) -> Kernel:
    """Inputs with the set cosines: of q = 1 and unrelated positions, unless their moments are given."""
    moments = pairs.moments.get(node.name, WHITE)
    cov, slope = covariances(moments, pairs.inputs, pairs.data_cosine)
    channel = channel_dim(node, len(shape))
    axes = tuple(
        ((("b" if i == 0 else "c" if i == channel else "p"), size),) if size > 1 else () for i, size in enumerate(shape)
    )
    roots = Roots({Root(node.name)})  # what is made of an input is not independent of it
    expr = Unknown("Gaussian of the inputs' second moments") if node.name in pairs.moments else Gaussian()
    part = Part(shape[channel], cov, slope, torch.zeros_like(cov), roots=roots, expr=expr)
    kernel = Kernel((part,), axes)
    check_possible(moments, kernel.positions)
    if kernel.positions < 2 or not moments.white:
        return kernel
    return kernel.with_parts(replace(part, scatter=of_white(shape[channel], moments.q)))


def real_inputs(graph: Graph) -> dict[fx.Node, Tensor]:
    """Inputs of floating-point numbers, with the values that the graph was captured with."""
    places = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    given = zip(places, pytree.tree_leaves(tuple(graph.inputs)), strict=True)
    return {n: v for n, v in given if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1 and not v.is_meta}


def probes_of(graph: Graph, inputs: str | InputMoments) -> Pairs:
    """Pairs of white inputs, or of inputs with given moments, or ("data") with those of the graph's own.

    Raises:
        InputError: the graph's inputs have no moments (one input, or all the same).
    """
    real = real_inputs(graph)
    if isinstance(inputs, InputMoments):
        moments = dict.fromkeys((node.name for node in real), inputs)
    elif inputs == "data":
        moments = {node.name: InputMoments.of(value, channel_dim(node, value.ndim)) for node, value in real.items()}
    else:
        return Pairs()
    base = next(iter(moments.values()), WHITE).c
    cosines = tuple(base + share * (1 - base) for share in Pairs().cosines)
    return Pairs(cosines, base, moments)
