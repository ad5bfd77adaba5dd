"""Values of graph nodes: fields of one or several channel groups, and what the tensor's dimensions mean.

Each dimension is a list of factors (role, size), outermost first: "b" inputs, "c" channels, "p" positions. A
field's places are the position factors in order of appearance, so heads, windows and patches survive reshapes, and
positions flattened together with channels are averaged only by what reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kgraph.gram.build import moved, sliced
from kgraph.gram.field import Field
from kgraph.gram.places import Gather, Insert, Places, Relabel

Factor = tuple[str, int]
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


class CannotFollow(Exception):
    """The operation moves entries in a way that factors of dimensions cannot describe."""


@dataclass(frozen=True, eq=False)
class Value:
    """Fields of a node.

    Attributes:
        groups: (channels, field) of every channel group, in order along ``split``.
        axes: factors of every dimension.
        split: dimension along which the groups lie, None when there is one.
    """

    groups: tuple[tuple[int, Field], ...]
    axes: Axes
    split: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(axis) for axis in self.axes)

    @property
    def places(self) -> Places:
        return places_of(self.axes)

    @property
    def channels(self) -> int:
        return sum(size for size, _ in self.groups)

    def one(self) -> Field:
        """The only field.

        Raises:
            CannotFollow: there are several groups of channels.
        """
        fields = [field for _, field in self.groups]
        if len(fields) > 1:
            raise CannotFollow("several groups of channels")
        return fields[0]

    def each(self, change: Callable[[Field], Field], axes: Axes | None = None, split: int | None = None) -> Value:
        """The same groups changed one by one (under other axes, if given)."""
        groups = tuple((size, change(field)) for size, field in self.groups)
        if axes is None:
            return replace(self, groups=groups)
        return Value(groups, axes, split)


def size_of(axis: Axis) -> int:
    size = 1
    for _, factor in axis:
        size *= factor
    return size


def places_of(axes: Axes) -> Places:
    return tuple(size for axis in axes for role, size in axis if role == "p")


def roles(axis: Axis) -> set[str]:
    return {role for role, _ in axis}


def place_start(axes: Axes, dim: int) -> int:
    """Number of position factors before dimension ``dim``."""
    return len(places_of(axes[:dim]))


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """Factors of every dimension after a reshape; factors are split where the new sizes ask for it."""
    pending = [factor for axis in axes for factor in axis if factor[1] > 1][::-1]
    result: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        while size > 1:
            if not pending:
                raise CannotFollow("a reshape to another number of entries")
            role, available = pending.pop()
            if size % available == 0:
                taken.append((role, available))
                size //= available
            elif available % size == 0 and role != "b":
                taken.append((role, size))
                pending.append((role, available // size))
                size = 1
            else:
                raise CannotFollow("a reshape across the factors of a dimension")
        result.append(tuple(taken))
    if pending:
        raise CannotFollow("a reshape to another number of entries")
    return tuple(result)


def _channel_dim(axes: Axes) -> int | None:
    """The dimension that holds all channels, if one does."""
    dims = [i for i, axis in enumerate(axes) if "c" in roles(axis)]
    return dims[0] if len(dims) == 1 else None


def reshaped(x: Value, shape: Sequence[int]) -> Value:
    """The value viewed with other sizes."""
    axes = regroup(x.axes, shape)
    split = None
    if x.split is not None:
        split = _channel_dim(axes)
        outermost = split is not None and next((r for r, s in axes[split] if s > 1), "c") == "c"
        channels = 1 if split is None else size_of(tuple(t for t in axes[split] if t[0] == "c"))
        if not outermost or channels != x.channels:
            raise CannotFollow("a reshape through groups of channels")
    places = places_of(axes)
    if places == x.places:
        return Value(x.groups, axes, split)
    op = Relabel(places, tuple(range(len(places))))
    return x.each(lambda u: moved(u, op), axes, split)


def permuted(x: Value, dims: Sequence[int]) -> Value:
    """The value with its dimensions in another order; channels keep theirs.

    Raises:
        CannotFollow: a channel would meet others than before, which a law of channels alike does not show.
    """
    mixing = [d for d in dims if "c" in roles(x.axes[d]) and x.shape[d] > 1]
    if mixing != sorted(mixing):
        raise CannotFollow("channels in another order")
    axes = tuple(x.axes[d] for d in dims)
    starts = [place_start(x.axes, d) for d in range(len(x.axes))]
    order = tuple(starts[d] + i for d in dims for i in range(len(places_of((x.axes[d],)))))
    split = list(dims).index(x.split) if x.split is not None else None
    if order == tuple(range(len(order))):
        return Value(x.groups, axes, split)
    op = Relabel(x.places, order)
    return x.each(lambda u: moved(u, op), axes, split)


def single_place(x: Value, dim: int) -> Value:
    """The value with the position factors of one dimension seen as one factor."""
    axis = x.axes[dim]
    if len(axis) <= 1:
        return x
    if roles(axis) != {"p"}:
        raise CannotFollow("a dimension of positions and channels")
    axes = (*x.axes[:dim], (("p", size_of(axis)),), *x.axes[dim + 1 :])
    places = places_of(axes)
    op = Relabel(places, tuple(range(len(places))))
    return x.each(lambda u: moved(u, op), axes, x.split)


def gathered(x: Value, dim: int, index: Sequence[int]) -> Value:
    """Positions ``index`` along a dimension (-1: zeros)."""
    import torch

    x = single_place(x, dim)
    if not x.axes[dim]:  # a size of one
        if any(i != 0 for i in index) and len(index) > 1:
            x = inserted(x, dim, 1)
        else:
            return x if len(index) == 1 else expanded(x, dim, len(index))
    drop = len(index) == 1
    op = Gather(place_start(x.axes, dim), torch.tensor(list(index)), drop)
    axis: Axis = () if drop else (("p", len(index)),)
    return x.each(lambda u: moved(u, op), (*x.axes[:dim], axis, *x.axes[dim + 1 :]), x.split)


def inserted(x: Value, dim: int, size: int) -> Value:
    """A dimension of size one as a position factor of ``size`` copies."""
    op = Insert(place_start(x.axes, dim), size)
    axes = (*x.axes[:dim], (("p", size),), *x.axes[dim + 1 :])
    return x.each(lambda u: moved(u, op), axes, x.split)


def expanded(x: Value, dim: int, size: int) -> Value:
    """A dimension of size one broadcast to ``size`` positions."""
    return inserted(x, dim, size)


def channel_range(x: Value, dim: int, low: int, high: int) -> Value:
    """Channels ``low:high`` along a dimension whose outermost factor is channels."""
    axis = x.axes[dim]
    inner = size_of(axis[1:])
    total = axis[0][1]
    if axis[0][0] != "c" or low % inner or high % inner:
        raise CannotFollow("a cut through a dimension of positions and channels")
    low, high = low // inner, high // inner
    kept = high - low
    axes = (*x.axes[:dim], (("c", kept), *axis[1:]) if kept > 1 else axis[1:], *x.axes[dim + 1 :])
    if x.split is None:
        size = max(x.channels * kept // total, 1)
        return Value(((size, sliced(x.groups[0][1], low, high, total)),), axes)
    if x.split != dim:
        raise CannotFollow("a cut across groups of channels")
    groups, at = [], 0
    for size, field in x.groups:
        first, last = max(low, at), min(high, at + size)
        if first < last:
            groups.append((last - first, sliced(field, first - at, last - at, size)))
        at += size
    return Value(tuple(groups), axes, dim if len(groups) > 1 else None)


def squeezed(x: Value, dim: int) -> Value:
    """The value without a dimension of size one."""
    split = x.split
    if split is not None:
        split = None if split == dim else split - (split > dim)
    return replace(x, axes=(*x.axes[:dim], *x.axes[dim + 1 :]), split=split)
