"""The sampled rule: draw fields with the incoming kernels, run the operation itself, measure what comes out.

It serves every operation without a rule of its own, and every meeting of tensors that share random weights in a
way their expressions do not show (x minus its own average pool): then the operations between are run as well.
Slopes and the NTK come from Price's theorem, with the operation's own forward derivative, for the pairs that are read
(slope at c = 1, NTK of an input with itself, and of the background pair where a BatchNorm subtracts it); for the
others they are not a number: each row costs two more runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph import algebra
from kgraph.canonical import aten, operation_name
from kgraph.draws import COUNT, uneven, unknown_law
from kgraph.fields import FieldDraws
from kgraph.how import assumed
from kgraph.kernel import SAME, Axes, Kernel, Pairs, Part
from kgraph.modes import mode_argument
from kgraph.roots import Root, Roots
from kgraph.rules.crossings import jumped, may_jump, shifted
from kgraph.rules.measured import Measured, matched, result_axes
from kgraph.rules.recurrent import CELLS, told_apart
from kgraph.rules.region import Region, find_region, kernels_of, of_draws, parts_of, ways_of
from kgraph.rules.runs import Outcome, Point, Runs
from kgraph.rules.speeds import is_parameter
from kgraph.site import site_of

Values = dict[fx.Node, Any]
Direction = tuple[str, int]
"""The kernel ("slope" or "ntk") and the row whose direction is meant."""
_FEWEST_ENTRIES = 50_000
_FEWEST_REPEATS, _MOST_REPEATS = 4, 16
_MOST_NEAR = 400
_TWO_SIGMAS = 0.97725


class Sampler:
    """Computes nodes by the sampled rule, given the values of all nodes before them."""

    def __init__(self, values: Values, module: fx.GraphModule, pairs: Pairs, mode: str) -> None:
        self.values, self.module, self.pairs, self.mode = values, module, pairs, mode
        self.images: dict[fx.Node, tuple[float, float]] = {}  # factor and offset that a kernel got behind its rule
        self.sampled: set[fx.Node] = set()
        self.order = {node: i for i, node in enumerate(module.graph.nodes)}
        norms = mode == "train" and any(n.target is aten.batch_norm.default for n in module.graph.nodes)
        # what BatchNorm subtracts from the NTK is that of the background pair
        self.ntk_rows = (Pairs.SELF, Pairs.BACKGROUND) if norms else (Pairs.SELF,)

    def sample(self, node: fx.Node) -> Any:
        """Kernel (or nested list of kernels) of ``node``'s result."""
        self.sampled.add(node)
        region = find_region(node, self.values, self.order)
        entries = max((_entries(self.values[n]) for n in region.frontier), default=1)
        repeats = max(_FEWEST_REPEATS, min(_MOST_REPEATS, _FEWEST_ENTRIES // max(entries, 1)))
        runs = Runs(self._forward(region), region.nodes)
        measured = self._measure(region, runs, repeats)
        flat, tree = pytree.tree_flatten(measured[0])
        others = [pytree.tree_leaves(m) for m in measured[1:]]
        kernels = [self._result(node, region, i, [first, *(o[i] for o in others)]) for i, first in enumerate(flat)]
        if not runs.derivable:
            why = f"no slope: PyTorch has no forward derivative of {operation_name(node)}"
            kernels = [_with_note(k, why) for k in kernels]
        if may_jump(region.nodes):
            found = self._jumps(region, runs, entries)
            kernels = [
                k.with_parts(*map(algebra.infinite, k.parts)) if jump or _stepwise(k) else k
                for k, jump in zip(kernels, found, strict=True)
            ]
        return pytree.tree_unflatten(kernels, tree)

    def _measure(self, region: Region, runs: Runs, repeats: int) -> list[Any]:
        """Moments of every output tensor of joint draws, as trees of `Measured`."""
        measured: list[Any] = []
        while len(measured) < repeats:  # of large tensors, one at a time is held
            several = range(len(measured), min(repeats, len(measured) + max(1, runs.together // 4)))
            measured += self._joint(region, runs, several)
        return measured

    def _joint(self, region: Region, runs: Runs, seeds: Sequence[int]) -> list[Any]:
        """One joint draw a seed: the region at a and at b of every pair, and along the directions that are read."""
        count = len(self.pairs.inputs)
        directions = [("slope", count + Pairs.UNIT), *(("ntk", count + row) for row in self.ntk_rows)]
        known = {row for _, row in directions}
        draws = FieldDraws(seeds)
        fields = [_field(draws, self.values[n], None) for n in region.frontier]
        tangents = {d: [_field(draws, self.values[n], d) for n in region.frontier] for d in directions}
        along, plain = [], []
        for place, seed in enumerate(seeds):
            plain += [self._point(fields, place, seed, 1, row) for row in range(count) if row not in known]
            for direction, side in itertools.product(directions, (0, 1)):
                tangent = tuple(_of_pairs(t, lambda pair, i=side, k=place: pair[i][k]) for t in tangents[direction])
                along.append(replace(self._point(fields, place, seed, side, direction[1]), tangent=tangent))
        values, derived = iter(runs.at(plain)), iter(runs.at(along))
        return [self._gather(values, [(d, next(derived), next(derived)) for d in directions], runs.tree) for _ in seeds]

    def _jumps(self, region: Region, runs: Runs, entries: int) -> list[bool]:
        """For every output tensor, whether it jumps; few pairs of near inputs have a jump between them."""
        most = _MOST_NEAR if runs.together > 1 else _MOST_REPEATS
        seeds = range(max(_FEWEST_REPEATS, min(most, 2 * _FEWEST_ENTRIES // max(entries, 1))))
        draws, direction = FieldDraws(seeds), ("slope", len(self.pairs.inputs) + Pairs.UNIT)
        fields = [_field(draws, self.values[n], None) for n in region.frontier]
        tangents = [_field(draws, self.values[n], direction) for n in region.frontier]
        points = []
        for place, seed in enumerate(seeds):
            tangent = tuple(_of_pairs(t, lambda pair, k=place: pair[0][k]) for t in tangents)
            points += shifted(replace(self._point(fields, place, seed, 0, 0), tangent=tangent))
        return jumped(runs.at(points))

    def _point(self, fields: list[Any], place: int, seed: int, side: int, row: int) -> Point:
        """Random masks: one input has one, any two runs of a pair have two."""
        count = len(self.pairs.inputs)
        own = 1 + row if side and row != count + Pairs.SELF else 0
        return Point(_at(fields, place, side, row), (seed, own))

    def _gather(
        self, plain: Iterator[Outcome], along: list[tuple[Direction, Outcome, Outcome]], tree: pytree.TreeSpec | None
    ) -> Any:
        """The moments that one joint draw gives, from its runs."""
        count = len(self.pairs.inputs)
        known = {row: at_b for (_, row), _, at_b in along}
        rows = [known[row] if row in known else next(plain) for row in range(count)]
        results = []
        for i, first in enumerate(along[0][1].values):
            pairs = {(name, row - count): (a.derivatives[i], b.derivatives[i]) for (name, row), a, b in along}
            slope, ntk = ({row: d for (n, row), d in pairs.items() if n == name} for name in ("slope", "ntk"))
            results.append(Measured(first, torch.stack([row.values[i] for row in rows]), slope, ntk))
        assert tree is not None
        return pytree.tree_unflatten(results, tree)

    def _forward(self, region: Region) -> Callable[..., Any]:
        """The region as a function of its frontier."""
        used = {n for node in region.nodes for n in node.all_input_nodes}
        inside = {*region.nodes, *region.frontier}
        constants = {n: _double(self.values[n]) for n in used - inside}
        return lambda *inputs: self._execute(region.nodes, constants | dict(zip(region.frontier, inputs, strict=True)))

    def _execute(self, region: Sequence[fx.Node], known: Values) -> Any:
        result: Any = None
        for node in region:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
            args = for_mode(node, args, self.mode)
            if node.op == "call_module":
                result = self.module.get_submodule(str(node.target))(*args, **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            if node in self.images and isinstance(result, Tensor):
                factor, offset = self.images[node]
                result = result * factor + offset
            known[node] = result = pytree.tree_map_only(Tensor, _widened, result)  # a cast to 32 bits is the node's own
        return result

    def _uneven(self, region: Region, axes: Axes) -> bool:
        """Whether a known tensor with a number for every channel went in since the last layer."""
        channel = next((i - len(axes) for i, axis in enumerate(axes) for role, _ in axis if role == "c"), None)
        for node in reversed(region.nodes):
            if channel is None or _is_layer(node):
                return False
            known = [t for n in node.all_input_nodes if isinstance(t := self.values[n], Tensor)]
            if any(t.ndim >= -channel and t.shape[channel] > 1 and varies(t, channel) for t in known):
                return True
        return any(uneven(part) for n in region.frontier for part in parts_of(self.values[n]))

    def _looks_up(self, node: fx.Node) -> bool:
        """Whether a node picks few rows of a known tensor by numbers computed from activations."""
        first = node.args[0] if node.args else None
        known = isinstance(first, fx.Node) and self._known(first)
        return known and operation_name(node) in ("embedding", "index", "index_select", "gather", "take")

    def _known(self, node: fx.Node) -> bool:
        return isinstance(self.values.get(node), Tensor)

    def _result(self, node: fx.Node, region: Region, place: int, measured: list[Measured]) -> Kernel:
        """The kernel of one output tensor; of a recurrent layer, that of each time step and layer is remembered."""

        def kernel(drawn: list[Measured], axes: Axes | None = None) -> Kernel:
            return self._kernel(node, region, drawn, axes)

        return told_apart(node, place, measured, kernel) if node.target in CELLS else kernel(measured)

    def _kernel(self, node: fx.Node, region: Region, measured: list[Measured], axes: Axes | None = None) -> Kernel:
        inputs = [k for n in region.frontier for k in kernels_of(self.values[n])]
        axes = axes or result_axes(tuple(measured[0].first.shape), inputs, site_of(node).shape)
        fields = [m.moments(axes) for m in measured]
        roots = Roots.union(part.roots for kernel in inputs for part in kernel.parts)
        roots |= Roots({Root(name) for n in region.nodes if _is_layer(n) for name in ways_of(n, self.values)})
        channels = next((size for axis in axes for role, size in axis if role == "c"), 1)
        mean = {name: torch.stack([f[name] for f in fields]).mean(0) for name in fields[0]}
        error = _relative_error(torch.stack([f["cov"][:, SAME] for f in fields]))
        how = max((k.how for k in inputs), key=lambda h: (h.level, h.error)).drawn(error)
        if region.entangled:
            how = how | assumed(f"{operation_name(node)}: its operands share random weights")
        if any(is_parameter(n) for one in region.nodes for n in one.all_input_nodes if self._known(n)):
            mean["ntk"] = torch.full_like(mean["ntk"], math.nan)  # directions of the parameters are not drawn
        laws = [m.law(axes, -(-COUNT // len(measured))) for m in measured]
        first, second = (torch.cat([law[i] for law in laws], -1)[..., :COUNT] for i in (0, 1))
        first, second = matched(first, second, mean["cov"], float(mean["mean"]))
        reason = next((why for k in inputs for part in k.parts if (why := unknown_law(part))), "")
        if any(of_draws(part) for k in inputs for part in k.parts):
            reason = reason or "Gaussian fields of the moments that were drawn"
        if self.mode == "train" and any(n.target is aten.batch_norm.default for n in region.nodes):
            reason = reason or _OF_A_BATCH
        if any(self._looks_up(n) for n in region.nodes):
            reason = reason or "the rows of a table that activations choose, as they are"
        if any(_without_batch(n) for n in region.nodes):
            reason = reason or _OF_A_BATCH
        variance = float(mean["cov"][Pairs.SELF, SAME]) - float(mean["mean"]) ** 2
        if not reason and 0 < variance < 2 * error * float(mean["cov"][Pairs.SELF, SAME]):
            reason = f"{operation_name(node)}: its mean is so large that the error of the draws hides its variance"
        how = how | assumed(reason) if reason else how
        like = Part(channels, mean["cov"], mean["slope"], mean["ntk"], float(mean["mean"]), roots)
        drawn = algebra.empirical(like, first, second, mean["slope"], mean["ntk"], roots)
        if axes and self._uneven(region, axes):
            drawn = replace(drawn, expr=replace(drawn.expr, uneven=True))
        part = replace(drawn, cov=mean["cov"], mean=float(mean["mean"]), how=how)
        jumps = any(algebra.endless(own) for kernel in inputs for own in kernel.parts)
        return Kernel((algebra.infinite(part) if jumps else part,), axes)


def varies(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor of numbers has others at one place along ``dim`` than at the next."""
    if tensor.is_meta:
        return False
    plain = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return bool((plain != plain.narrow(dim, 0, 1)).any())


def _with_note(kernel: Kernel, why: str) -> Kernel:
    """The kernel with ``why`` behind the note of every part whose slope is not known."""

    def noted(part: Part) -> Part:
        if not bool(part.slope[Pairs.UNIT].isnan().any()) or why in part.how.note:
            return part
        return replace(part, how=replace(part.how, note=f"{part.how.note}; {why}".removeprefix("; ")))

    return kernel.told(*map(noted, kernel.parts))


_OF_A_BATCH = "statistics over a batch of the few inputs that were drawn"


def _without_batch(node: fx.Node) -> bool:
    """Whether a node makes numbers of the whole batch: it reads one, and its result has none."""
    read, made = ([n.meta.get("val") for n in nodes] for nodes in (node.all_input_nodes, [node]))
    values = [[v for v in pytree.tree_leaves(side) if isinstance(v, Tensor)] for side in (read, made)]
    before, after = (any(isinstance(s, torch.SymInt) for v in side for s in v.shape) for side in values)
    return before and bool(values[1]) and not after


def _stepwise(kernel: Kernel) -> bool:
    """Whether a kernel moves with c although the derivative is 0 everywhere: between two steps there is a jump."""
    cov = kernel.merged.cov[: Pairs.SELF, SAME]
    return float(kernel.merged.slope[Pairs.UNIT, SAME]) == 0 and not bool((cov == cov[0]).all())


def _relative_error(estimates: Tensor) -> float:
    """Of means of independent estimates [repeats, P], the largest, relative to q.

    Two errors cover what two of a known deviation would (Student's law).
    """
    factor = _two_sigmas(len(estimates) - 1) / 2
    q = estimates[:, Pairs.SELF].mean().abs().clamp_min(1e-300)
    return factor * float(estimates.std(0).max() / (len(estimates) ** 0.5 * q))


@lru_cache
def _two_sigmas(freedom: int) -> float:
    return float(stdtrit(freedom, _TWO_SIGMAS))


def _is_layer(node: fx.Node) -> bool:
    return operation_name(node).startswith(("linear", "conv", "addmm", "matmul", "mm", "einsum"))


def _entries(value: Any) -> int:
    return sum(math.prod(kernel.shape) for kernel in kernels_of(value))


def _double(value: Any) -> Any:
    return _widened(value.detach()) if isinstance(value, Tensor) else value


def _widened(tensor: Tensor) -> Tensor:
    """In 64 bits, where it holds numbers and not indices or truth values."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)


def _of_pairs(value: Any, change: Callable[[tuple[Tensor, Tensor]], Tensor]) -> Any:
    return pytree.tree_map(change, value, is_leaf=_is_pair)


def _at(fields: list[Any], place: int, side: int, row: int) -> tuple[Any, ...]:
    """All fields of one draw at input a, or at input b of one pair."""
    return tuple(_of_pairs(f, lambda pair: pair[1][row, place] if side else pair[0][place]) for f in fields)


def _field(draws: FieldDraws, value: Any, direction: Direction | None) -> Any:
    """Fields of a kernel (or of each of a list), or directions to differentiate along: a pair (at a, at b)."""

    def one(kernel: Kernel) -> tuple[Tensor, Tensor]:
        pieces = [_part_field(draws, kernel, part, direction) for part in kernel.parts]
        if kernel.split is None:
            return pieces[0]
        dim = kernel.split - len(kernel.shape)
        return torch.cat([p[0] for p in pieces], dim), torch.cat([p[1] for p in pieces], dim)

    return pytree.tree_map(one, value, is_leaf=lambda v: isinstance(v, Kernel))


def _part_field(draws: FieldDraws, kernel: Kernel, part: Part, direction: Direction | None) -> tuple[Tensor, Tensor]:
    """``[draws, *shape]`` at a, and ``[P, draws, *shape]`` at b of every pair (of one along a direction)."""
    sizes, places = [len(draws.generators)], [False]
    for dim, axis in enumerate(kernel.axes):
        factors = (("c", part.size),) if dim == kernel.split else axis
        for role, size in factors:
            sizes.append(size)
            places.append(role == "p")
    shape = (sizes[0], *(part.size if i == kernel.split else size for i, size in enumerate(kernel.shape)))
    if direction is not None:
        first, second = draws.tangents(part, tuple(sizes), tuple(places), *direction)
        return first.reshape(shape), second.reshape(shape)
    first, second = draws.values(part, tuple(sizes), tuple(places))
    return first.reshape(shape), second.reshape(-1, *shape)


def for_mode(node: fx.Node, args: tuple[Any, ...], mode: str) -> tuple[Any, ...]:
    """Captured in train mode; in eval mode dropout does nothing."""
    found = mode_argument(node) if mode == "eval" else None
    return args if found is None else (*args[: found.place], found.evaluate, *args[found.place + 1 :])
