"""The sampled rule: draw fields with the incoming kernels, run the operation itself, measure what comes out.

It serves every operation without a rule of its own, and every meeting of tensors that share random weights in a
way their expressions do not show (x minus its own average pool): then the operations between are run as well.
Slopes and the NTK come from Price's theorem, with the operation's own forward derivative, for the pairs that are
reported (c = 1, and an input with itself); for the others they are not a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph import algebra
from kgraph.canonical import aten, operation_name
from kgraph.draws import COUNT
from kgraph.fields import FieldDraws
from kgraph.how import assumed, sampled
from kgraph.kernel import DIFF, SAME, Axes, Kernel, Pairs, Part
from kgraph.site import site_of

Values = dict[fx.Node, Any]
_LARGEST_REGION = 40
_FEWEST_ENTRIES = 50_000
_MOST_REPEATS = 16


class Sampler:
    """Computes nodes by the sampled rule, given the values of all nodes before them."""

    def __init__(self, values: Values, module: fx.GraphModule, pairs: Pairs, mode: str) -> None:
        self.values, self.module, self.pairs, self.mode = values, module, pairs, mode

    def sample(self, node: fx.Node) -> Any:
        """Kernel (or nested list of kernels) of ``node``'s result."""
        region, frontier, entangled = self._region(node)
        entries = max((_entries(self.values[n]) for n in frontier), default=1)
        repeats = max(1, min(_MOST_REPEATS, _FEWEST_ENTRIES // max(entries, 1)))
        measured = [self._run(region, frontier, seed) for seed in range(max(repeats, 2))]
        flat, tree = pytree.tree_flatten(measured[0])
        others = [pytree.tree_leaves(m) for m in measured[1:]]
        kernels = [
            self._kernel(node, frontier, [first, *(o[i] for o in others)], entangled) for i, first in enumerate(flat)
        ]
        return pytree.tree_unflatten(kernels, tree)

    def _region(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node], bool]:
        """Nodes to run, nodes to draw, and whether drawn ones still share weights."""
        region = [node]
        frontier = self._kernel_inputs(node)
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        while len(region) < _LARGEST_REGION:
            late = self._entangled_node(frontier, order)
            if late is None:
                return sorted(region, key=order.__getitem__), frontier, False
            inputs = self._kernel_inputs(late)
            if not inputs:
                break
            region.append(late)
            frontier = list(dict.fromkeys([n for n in frontier if n is not late] + inputs))
        return sorted(region, key=order.__getitem__), frontier, True

    def _kernel_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if _has_kernel(self.values[n])]

    def _entangled_node(self, frontier: list[fx.Node], order: dict[fx.Node, int]) -> fx.Node | None:
        """The later node of a pair that shares weights out of sight."""
        for i, one in enumerate(frontier):
            for two in frontier[i + 1 :]:
                parts = [(a, b) for a in _parts(self.values[one]) for b in _parts(self.values[two])]
                if any(algebra.entangled(a, b) for a, b in parts):
                    return max(one, two, key=order.__getitem__)
        return None

    def _run(self, region: list[fx.Node], frontier: list[fx.Node], seed: int) -> Any:
        """One joint draw: moments of every output tensor, as a tree of `_Measured`."""
        draws = FieldDraws(seed)
        fields = {n: _field(draws, self.values[n], None) for n in frontier}
        slopes = {n: _field(draws, self.values[n], "slope") for n in frontier}
        ntks = {n: _field(draws, self.values[n], "ntk") for n in frontier}
        count = len(self.pairs.inputs)

        def forward(*inputs: Any) -> Any:
            return self._execute(region, dict(zip(frontier, inputs, strict=True)), seed)

        def with_tangent(side: int, p: int, tangents: dict[fx.Node, Any]) -> tuple[Any, Any]:
            primal = tuple(
                pytree.tree_map(lambda pair: _side(pair, side, p), fields[n], is_leaf=_is_pair) for n in frontier
            )
            tangent = tuple(
                pytree.tree_map(lambda pair: pair[side][p], tangents[n], is_leaf=_is_pair) for n in frontier
            )
            return _jvp(forward, primal, tangent)

        def with_none(p: int) -> Any:
            return forward(*(pytree.tree_map(lambda pair: pair[1][p], fields[n], is_leaf=_is_pair) for n in frontier))

        plain = [with_none(p) for p in range(count)]
        first, a_slope = with_tangent(0, Pairs.UNIT, slopes)
        _, b_slope = with_tangent(1, Pairs.UNIT, slopes)
        _, a_ntk = with_tangent(0, Pairs.SELF, ntks)
        _, b_ntk = with_tangent(1, Pairs.SELF, ntks)
        flat, tree = pytree.tree_flatten(first)
        second = [torch.stack(column) for column in zip(*map(pytree.tree_leaves, plain), strict=True)]
        directions = [pytree.tree_leaves(t) for t in (a_slope, b_slope, a_ntk, b_ntk)]
        results = [
            _Measured(one, second[i], (directions[0][i], directions[1][i]), (directions[2][i], directions[3][i]))
            for i, one in enumerate(flat)
        ]
        return pytree.tree_unflatten(results, tree)

    def _execute(self, region: list[fx.Node], known: Values, seed: int) -> Any:
        result: Any = None
        for node in region:

            def value(n: fx.Node) -> Any:
                return known[n] if n in known else _double(self.values[n])

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)  # type: ignore[misc]
            args = for_mode(node, args, self.mode)
            if node.op == "call_module":
                result = self.module.get_submodule(str(node.target))(*args, **kwargs)
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            known[node] = result
        return result

    def _kernel(self, node: fx.Node, frontier: list[fx.Node], measured: list[Any], entangled: bool) -> Any:
        inputs = [k for n in frontier for k in _kernels(self.values[n])]
        axes = _result_axes(tuple(measured[0].first.shape), inputs, site_of(node).shape)
        fields = [m.moments(axes) for m in measured]
        roots = frozenset().union(*(part.roots for kernel in inputs for part in kernel.parts))
        channels = next((size for axis in axes for role, size in axis if role == "c"), 1)
        mean = {name: torch.stack([f[name] for f in fields]).mean(0) for name in fields[0]}
        q = torch.stack([f["cov"][Pairs.SELF, SAME] for f in fields])
        error = float(q.std() / (len(q) ** 0.5 * q.mean().abs().clamp_min(1e-300)))
        how = max((k.how for k in inputs), key=lambda h: h.level) | sampled(error)
        if entangled:
            how = how | assumed(f"{operation_name(node)}: its operands share random weights")
        first, second = measured[0].law(axes)
        like = Part(channels, mean["cov"], mean["slope"], mean["ntk"], float(mean["mean"]), roots)
        drawn = algebra.empirical(like, first, second, mean["slope"], mean["ntk"], roots)
        fields_ = {"cov": mean["cov"], "mean": float(mean["mean"]), "how": how}
        return Kernel((_replace(drawn, **fields_),), axes)


def _replace(part: Part, **fields: Any) -> Part:
    from dataclasses import replace

    return replace(part, **fields)


def _has_kernel(value: Any) -> bool:
    return bool(_kernels(value))


def _kernels(value: Any) -> list[Kernel]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Kernel)]


def _parts(value: Any) -> list[Part]:
    return [part for kernel in _kernels(value) for part in kernel.parts]


def _entries(value: Any) -> int:
    return sum(_count(kernel.shape) for kernel in _kernels(value))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)


def _side(pair: tuple[Tensor, Tensor], side: int, p: int) -> Tensor:
    return pair[0] if side == 0 else pair[1][p]


def _field(draws: FieldDraws, value: Any, tangent: str | None) -> Any:
    """Fields of a kernel (or of each of a list): a pair (at a, at b of every pair)."""

    def one(kernel: Kernel) -> tuple[Tensor, Tensor]:
        pieces = [_part_field(draws, kernel, part, tangent) for part in kernel.parts]
        if kernel.split is None:
            return pieces[0]
        dim = kernel.split - len(kernel.shape)
        return torch.cat([p[0] for p in pieces], dim), torch.cat([p[1] for p in pieces], dim)

    return pytree.tree_map(one, value, is_leaf=lambda v: isinstance(v, Kernel))


def _part_field(draws: FieldDraws, kernel: Kernel, part: Part, tangent: str | None) -> tuple[Tensor, Tensor]:
    sizes, places = [], []
    for dim, axis in enumerate(kernel.axes):
        factors = (("c", part.size),) if dim == kernel.split else axis
        for role, size in factors:
            sizes.append(size)
            places.append(role == "p")
    shape = tuple(part.size if i == kernel.split else size for i, size in enumerate(kernel.shape))
    if tangent is None:
        first, second = draws.values(part, tuple(sizes), tuple(places))
    else:
        first, second = draws.tangents(part, tuple(sizes), tuple(places), tangent)
        return first.reshape(-1, *shape), second.reshape(-1, *shape)
    return first.reshape(shape), second.reshape(-1, *shape)


def _jvp(forward: Callable[..., Any], primal: tuple[Any, ...], tangent: tuple[Any, ...]) -> tuple[Any, Any]:
    try:
        out, derivative = torch.func.jvp(forward, primal, tangent)[:2]
        return out, derivative
    except (NotImplementedError, RuntimeError):
        # no forward derivative (recurrent kernels, integer outputs): the slope is unknown, and says so
        out = forward(*primal)
        return out, pytree.tree_map(lambda t: torch.full_like(t, float("nan"), dtype=torch.float64), out)


def _in_row(values: Tensor, row: int, rows: int) -> Tensor:
    """[1, 2] -> [rows, 2] with the values in the one row that is reported; the others are not computed."""
    table = torch.full((rows, 2), float("nan"), dtype=torch.float64)
    table[row] = values[0]
    return table


def for_mode(node: fx.Node, args: tuple[Any, ...], mode: str) -> tuple[Any, ...]:
    """Captured in train mode; in eval mode dropout does nothing."""
    if mode == "train":
        return args
    if node.target is aten.dropout.default:
        return (*args[:2], False)
    if node.target is aten.scaled_dot_product_attention.default and len(args) > 4:
        return (*args[:4], 0.0, *args[5:])
    return args


class _Measured:
    """Outputs of one joint draw: at a, at b of every pair, and their derivatives along slope and NTK directions."""

    def __init__(self, first: Tensor, second: Tensor, slope: tuple[Tensor, Tensor], ntk: tuple[Tensor, Tensor]):
        self.first, self.second, self.slope, self.ntk = first.double(), second.double(), slope, ntk

    def moments(self, axes: Axes) -> dict[str, Tensor]:
        """cov, slope, ntk as [P, 2], and the mean."""
        places = [i for i, axis in enumerate(axes) if any(role == "p" for role, _ in axis)]
        first = self.first.expand(self.second.shape)
        return {
            "cov": _pair_moments(first, self.second, places),
            "slope": _in_row(_pair_moments(self.slope[0][None], self.slope[1][None], places), Pairs.UNIT, len(first)),
            "ntk": _in_row(_pair_moments(self.ntk[0][None], self.ntk[1][None], places), Pairs.SELF, len(first)),
            "mean": self.first.mean(),
        }

    def law(self, axes: Axes) -> tuple[Tensor, Tensor]:
        """Draws of single entries: at a [S]; at b in the same and in another position [P, 2, S]."""
        places = [i + 1 for i, axis in enumerate(axes) if any(role == "p" for role, _ in axis)]
        shifts = [1 if self.second.shape[i] > 1 else 0 for i in places]
        other = self.second.roll(shifts, places) if places else self.second
        pick = torch.arange(COUNT) * 7919 % self.first.numel()
        flat = [t.reshape(len(t), -1)[:, pick] for t in (self.second, other)]
        return self.first.reshape(-1)[pick], torch.stack(flat, 1)


def _pair_moments(first: Tensor, second: Tensor, places: list[int]) -> Tensor:
    """Mean of first * second at the same position, and at two different ones; shape [P, 2]."""
    dims = [i + 1 for i in places]
    result = torch.empty(len(second), 2, dtype=torch.float64)
    product = first * second
    result[:, SAME] = product.flatten(1).mean(1)
    count = _count(tuple(second.shape[d] for d in dims))
    if count == 1:
        result[:, DIFF] = result[:, SAME]
        return result
    crossed = (first.sum(dims) * second.sum(dims) - product.sum(dims)) / (count * (count - 1))
    result[:, DIFF] = crossed.flatten(1).mean(1) if crossed.ndim > 1 else crossed
    return result


def _result_axes(shape: tuple[int, ...], inputs: list[Kernel], declared: tuple[int, ...]) -> Axes:
    """Meaning of the result's dimensions: an input's where the layout is kept, else batch, positions, channels last."""
    for kernel in inputs:
        if len(kernel.axes) == len(shape):
            return tuple(_resized(axis, size) for axis, size in zip(kernel.axes, shape, strict=True))
    roles = ["b", *("p" for _ in shape[1:-1]), "c"]
    return tuple(((role, size),) if size > 1 else () for role, size in zip(roles[: len(shape)], shape, strict=False))


def _resized(axis: tuple[tuple[str, int], ...], size: int) -> tuple[tuple[str, int], ...]:
    if _count(tuple(s for _, s in axis)) == size:
        return axis
    return ((axis[0][0] if axis else "p", size),) if size > 1 else ()
