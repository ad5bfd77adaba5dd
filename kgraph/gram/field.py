"""Fields: what a group of channels is made of, as an expression over Gaussian leaves.

A field stands for infinitely many channels alike, each a random function of input and position. Its law is
fixed by how it is made; the engine reads covariances of any two fields off these expressions, so terms that share
weights, averages of the very field they are subtracted from, and weights tied across time all come out right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kgraph.gram.block import Block
from kgraph.gram.layout import Run
from kgraph.gram.places import PlaceMap, Places
from kgraph.gram.tangents import Own
from kgraph.how import EXACT, How
from kgraph.kernel import Bias
from kgraph.maps import Pointwise
from kgraph.roots import Root

Roots = frozenset[Root]


@dataclass(frozen=True, eq=False)
class Field:
    """A group of channels.

    Attributes:
        places: sizes of its position axes.
        roots: random numbers that it depends on given the Gaussian leaves below it (an affine layer's output
            depends on its own weight alone: conditionally on its input it is Gaussian).
        how: how its kernel is obtained.
    """

    places: Places
    roots: Roots = frozenset()
    how: How = EXACT

    @property
    def level(self) -> float | None:
        """The mean, where the field is Gaussian and its mean is one number for all inputs and positions."""
        return None

    @property
    def gaussian(self) -> bool:
        """Whether the field is Gaussian (jointly over inputs and positions) with a constant mean."""
        return self.level is not None

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the roots."""
        return frozenset(root.name for root in self.roots)

    def independent(self, other: Field) -> bool:
        """Whether the two share no random number."""
        if self.names.isdisjoint(other.names):
            return True
        return all(mine.disjoint(theirs) for mine in self.roots for theirs in other.roots)


@dataclass(frozen=True, eq=False)
class Known(Field):
    """A known tensor [N or 1, C, *places]: an input, or a parameter used entry by entry.

    Attributes:
        own: own terms of its tangents; what has some moves.
        given: whether its channels are what they are, as an input's: no cut makes them independent.
    """

    data: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    own: Own = field(default_factory=dict)
    given: bool = False

    @cached_property
    def constant(self) -> float | None:
        """The one value all entries have, if so."""
        first = float(self.data.reshape(-1)[0])
        return first if bool((self.data == first).all()) else None

    @property
    def level(self) -> float | None:
        return self.constant


@dataclass(frozen=True)
class Geometry:
    """Taps of a convolution: for every tap its variance share and, per axis, where it reads and writes.

    Attributes:
        terms: (sum over inputs of E[W_o^2], runs) of every tap; own terms of a tap count channels instead.
        passes: the same as successive one-axis passes when all taps weigh alike (faster), else ().
        sizes: output sizes.
        channels: inputs of one output at one tap.
        key: what makes two geometries the same.
    """

    terms: tuple[tuple[float, tuple[Run, ...]], ...]
    sizes: Places
    channels: int
    key: tuple[Any, ...]
    passes: tuple[tuple[tuple[float, tuple[Run, ...]], ...], ...] = ()


@dataclass(frozen=True)
class ZeroSums:
    """What is known of a weight whose units sum to 0 over their inputs and taps.

    Attributes:
        fan_in: entries of a unit.
        stored: whether the weight is a parameter itself: its gradient then has the mean of what it reads.
    """

    fan_in: int
    stored: bool


@dataclass(frozen=True)
class Layer:
    """Second moments and shape of an affine layer.

    Attributes:
        root: name of its weight.
        weight: sw2 = fan_in E[W^2].
        bias, bias_mean: E[b^2], E[b].
        bias_law: that of the biases about their mean, where it is no Gaussian's.
        zero_sums: of a weight that does not see the mean of what it reads.
        few: whether its weights are no Gaussians', and so few numbers are read that it shows.
        own, own_bias: own terms of the tangents: factors of the input's kernel, and constants.
        geometry: taps of a convolution, None for a linear layer.
    """

    root: str
    weight: float
    bias: float
    bias_mean: float
    own: Own = field(default_factory=dict)
    own_bias: Own = field(default_factory=dict)
    geometry: Geometry | None = None
    bias_law: Bias | None = None
    zero_sums: ZeroSums | None = None
    few: bool = False


@dataclass(frozen=True, eq=False)
class Affine(Field):
    """``W u + b``: Gaussian; two outputs of one weight are correlated as their inputs are."""

    arg: Field = field(default_factory=lambda: Field(()))
    layer: Layer = field(default_factory=lambda: Layer("", 1.0, 0.0, 0.0))

    @property
    def level(self) -> float | None:
        return self.layer.bias_mean


@dataclass(frozen=True, eq=False)
class Leaf(Field):
    """A field whose own block is known (a lookup table, a layer whose weight is used once), and its gap if carried.

    Attributes:
        bias_law: that of a layer's biases, where it is no Gaussian's.
        few: as a layer's.
    """

    block: Block = field(default_factory=lambda: Block(torch.zeros(())))
    mean: float = 0.0
    gap: Tensor | None = None
    bias_law: Bias | None = None
    few: bool = False

    @property
    def level(self) -> float | None:
        return self.mean


@dataclass(frozen=True, eq=False)
class Sliced(Field):
    """A range of channels of a leaf: the same law, other random numbers than a disjoint range's."""

    arg: Field = field(default_factory=lambda: Field(()))

    @property
    def level(self) -> float | None:
        return self.arg.level


@dataclass(frozen=True, eq=False)
class Mapped(Field):
    """``fn(u)`` entry by entry."""

    fn: Pointwise = field(default_factory=lambda: Pointwise(lambda u: u))
    arg: Field = field(default_factory=lambda: Field(()))


@dataclass(frozen=True, eq=False)
class Sum(Field):
    """``sum_i weight_i term_i``."""

    terms: tuple[tuple[float, Field], ...] = ()

    @cached_property
    def level(self) -> float | None:  # type: ignore[override]
        levels = [(weight, term.level) for weight, term in self.terms]
        return sum(w * x for w, x in levels if x is not None) if all(x is not None for _, x in levels) else None


@dataclass(frozen=True, eq=False)
class Product(Field):
    """``left * right`` entry by entry."""

    left: Field = field(default_factory=lambda: Field(()))
    right: Field = field(default_factory=lambda: Field(()))

    @cached_property
    def level(self) -> float | None:  # type: ignore[override]
        one, two = self.left.level, self.right.level
        if one is None or two is None or all(constant_of(side) is None for side in (self.left, self.right)):
            return None
        return one * two


@dataclass(frozen=True, eq=False)
class Moved(Field):
    """A linear map of positions."""

    arg: Field = field(default_factory=lambda: Field(()))
    op: PlaceMap = None  # type: ignore[assignment]

    @cached_property
    def level(self) -> float | None:  # type: ignore[override]
        level = self.arg.level
        return level if not level or self.op.keeps_constants else None


def constant_of(u: Field) -> float | None:
    """The one number that a known tensor holds, perhaps repeated at other positions; None of any other field."""
    while isinstance(u, Moved) and u.op.keeps_constants:
        u = u.arg
    return u.constant if isinstance(u, Known) else None


@dataclass(frozen=True, eq=False)
class Located(Field):
    """``gain u + shift`` with known numbers for every input and position, [N or 1, *places]."""

    arg: Field = field(default_factory=lambda: Field(()))
    gain: Tensor = field(default_factory=lambda: torch.ones(1))
    shift: Tensor = field(default_factory=lambda: torch.zeros(1))

    @cached_property
    def level(self) -> float | None:  # type: ignore[override]
        level = self.arg.level
        if level is None:
            return None
        means = self.shift + level * self.gain if level else self.shift
        first = means.reshape(-1)[0]
        return float(first) if bool((means == first).all()) else None


@dataclass(frozen=True, eq=False)
class Folded(Field):
    """Some position axes read as channels: a layer that sums over them sees their average."""

    arg: Field = field(default_factory=lambda: Field(()))
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Joined(Field):
    """Fields side by side along a position axis."""

    args: tuple[Field, ...] = ()
    axis: int = 0

    @cached_property
    def level(self) -> float | None:  # type: ignore[override]
        levels = {arg.level for arg in self.args}
        return levels.pop() if len(levels) == 1 else None


@dataclass(frozen=True, eq=False)
class Grouped(Field):
    """Channel groups read together by a layer: (channels, field) of each."""

    args: tuple[tuple[int, Field], ...] = ()


@dataclass(frozen=True, eq=False)
class Crossed(Field):
    """``u_i v_j`` for all channels i, j: what a bilinear layer sums over. Its averages are products of averages."""

    left: Field = field(default_factory=lambda: Field(()))
    right: Field = field(default_factory=lambda: Field(()))


@dataclass(frozen=True, eq=False)
class Masked(Field):
    """Dropout: ``mask u / keep`` with a fresh mask for every input and channel, and position unless ``whole``."""

    arg: Field = field(default_factory=lambda: Field(()))
    keep: float = 1.0
    mask: Root = field(default_factory=lambda: Root("mask"))
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Scores(Field):
    """``scale <q_i, k_j>`` over the ``width`` channels of a head: Gaussian for many channels."""

    query: Field = field(default_factory=lambda: Field(()))
    key: Field = field(default_factory=lambda: Field(()))
    scale: float = 1.0
    width: int = 1
    shared: int = 0


@dataclass(frozen=True, eq=False)
class Attended(Field):
    """``sum_j A_ij v_j`` with weights A independent of the channel of v."""

    weights: Field = field(default_factory=lambda: Field(()))
    value: Field = field(default_factory=lambda: Field(()))
    shared: int = 0


@dataclass(frozen=True, eq=False)
class Drawn(Field):
    """The result of any operation on other fields, known by running it on joint draws of them.

    Attributes:
        args: the fields that go in.
        run: tensors [S, N, *places] of the args -> tensor [S, N, *places]; differentiable if tangents are carried.
    """

    args: tuple[Field, ...] = ()
    run: Callable[..., Tensor] = lambda *x: x[0]
