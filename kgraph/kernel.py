"""The value that flows through the graph: a kernel per group of channels.

Every tensor has, over pairs of inputs (a, b) and pairs of positions (i, j), averaged over channels and over
the random parameters, a second moment ``cov = E[v_a(i) v_b(j)]``. Under the *exchangeable* position model two
numbers stand for all position pairs: the same position (index SAME) and two different ones (index DIFF).

Pairs of inputs are rows. `Pairs` names the special ones: the pair (a, a), whose second moment is the q value,
and the background pair, two unrelated members of a batch (what BatchNorm subtracts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kgraph.how import EXACT, How
from kgraph.input_moments import InputMoments
from kgraph.maps import Pointwise
from kgraph.maps.tangent import TrainedFactor
from kgraph.roots import Roots
from kgraph.scatter import Scatter

SAME, DIFF = 0, 1


@dataclass(frozen=True)
class Pairs:
    """Probe pairs: inputs with a set cosine, white with q = 1 or of second moments by name of the input.

    Rows: one per cosine in ``cosines``, then c = 1, then (a, a), then the background pair.
    """

    cosines: tuple[float, ...] = (0.0, 0.5, 0.9)
    data_cosine: float = 0.0
    moments: Mapping[str, InputMoments] = field(default_factory=dict)

    UNIT, SELF, BACKGROUND = -3, -2, -1

    @property
    def inputs(self) -> Tensor:
        """Input cosine of every row, shape [P]."""
        return torch.tensor([*self.cosines, 1.0, 1.0, self.data_cosine], dtype=torch.float64)


@dataclass(frozen=True)
class Apply:
    """The part is ``fn`` of another part, entry by entry."""

    fn: Pointwise
    arg: Part


@dataclass(frozen=True)
class Sum:
    """The part is ``sum_i weight_i * term_i``."""

    terms: tuple[tuple[float, Part], ...]


@dataclass(frozen=True)
class Product:
    """The part is the entrywise product of two parts."""

    left: Part
    right: Part


@dataclass(frozen=True, eq=False)
class Samples:
    """The part's law is known by draws only: ``first[S]`` at input a, ``second[P, 2, S]`` at input b."""

    first: Tensor
    second: Tensor
    uneven: bool = False  # whether channels differ in what made them


@dataclass(frozen=True, eq=False)
class Mask:
    """The part is ``height`` with probability ``keep``, else 0; pairs where ``shared[P, 2]`` see one and the same draw.

    Dropout draws for every input and position anew; a zero-padded border is the same for all inputs.
    """

    keep: float
    height: float
    shared: Tensor


@dataclass(frozen=True, eq=False)
class Bias:
    """A bias whose law is no Gaussian's, about its mean: a rule of nodes and weights with its moments.

    Attributes:
        nodes, weights: [J].
        variance: sum of w b^2.
        excess: sum of w b^4 - 3 variance^2, the fourth cumulant.
    """

    nodes: Tensor
    weights: Tensor
    variance: float
    excess: float

    def times(self, factor: float) -> Bias:
        return Bias(self.nodes * factor, self.weights, self.variance * factor**2, self.excess * factor**4)


@dataclass(frozen=True)
class Gaussian:
    """The part is Gaussian with its own mean and covariance (the output of an affine layer).

    ``bias`` is what it holds that is not: of few inputs a uniform bias is a large share.
    """

    bias: Bias | None = None


@dataclass(frozen=True)
class Channel(Gaussian):
    """The part says which channel is read: what is looked up by it is known, and differs from channel to channel."""


@dataclass(frozen=True)
class Unknown:
    """Only the part's second moments are known (channels of several laws, averages of positions).

    What reads no more than those is exact; where a law is needed it is taken as Gaussian, for ``reason``. Entries that
    are made of few others are not independent of those: products with what shares ``reads`` are assumed to be.
    """

    reason: str
    reads: Roots = field(default_factory=Roots)


Expr = Gaussian | Apply | Sum | Product | Samples | Mask | Unknown


@dataclass(frozen=True, eq=False)
class Part:
    """Kernel of one group of channels.

    Attributes:
        size: number of channels it stands for.
        cov: E[v_a(i) v_b(j)], shape [P, 2] (input pairs x same / different position).
        slope: d cov / d (input cosine), same shape.
        ntk: NTK block, same shape.
        mean: E[v], a number (all probe inputs are alike).
        roots: random parameters whose output this is a pointwise function of.
        expr: how the entries are made from Gaussian ones.
        how: how the numbers were obtained.
        scatter: of the second moments of different positions about their mean, where it shows.
        factor: of what a trained factor made, how; whatever is made of this part by `replace` has none.
    """

    size: int
    cov: Tensor
    slope: Tensor
    ntk: Tensor
    mean: float = 0.0
    roots: Roots = field(default_factory=Roots)
    expr: Expr = field(default_factory=Gaussian)
    how: How = EXACT
    scatter: Scatter | None = None
    factor: TrainedFactor | None = field(default=None, init=False)

    def times(self, factor: TrainedFactor) -> Part:
        """This part, remembered to be made by a trained factor."""
        object.__setattr__(self, "factor", factor)
        return self

    @property
    def q(self) -> Tensor:
        """E[v_a(i)^2], a 0-d tensor."""
        return self.cov[Pairs.SELF, SAME]

    @cached_property
    def gaussian(self) -> bool:
        """Whether the entries are jointly Gaussian."""
        queue: list[Part] = [self]
        seen: set[Part] = set()
        while queue:  # not by recursion: a residual network's sums are nested as deeply as it is
            part = queue.pop()
            if isinstance(part.expr, Sum):
                new = [t for _, t in part.expr.terms if t not in seen and not t.__dict__.get("gaussian", False)]
                queue += new
                seen.update(new)
            elif not isinstance(part.expr, Gaussian):
                return False
        return True

    def independent(self, other: Part) -> bool:
        """Whether the two share no random parameter."""
        return self.roots.disjoint(other.roots)

    def position_mean(self, positions: int) -> Tensor:
        """Kernel averaged over all pairs of ``positions`` positions, shape [P]."""
        return self.cov[:, SAME] / positions + self.cov[:, DIFF] * (1 - 1 / positions)


Factor = tuple[str, int]
"""A factor of a tensor dimension: its role ("b" batch, "c" channel, "p" position) and size."""

Axes = tuple[tuple[Factor, ...], ...]
"""For every dimension of the tensor, the factors it is made of, outermost first."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """Kernel of a tensor: its channel groups, and what its dimensions mean.

    Attributes:
        parts: channel groups in order along ``split``.
        axes: factors of every dimension.
        split: index of the dimension along which the parts lie (None when there is one part).
        unpadded: of a kernel that zero padding made, the one before it and the zeros in front along the last
            dimensions: a convolution reads zeros less often than the mean over positions counts them. Whatever is
            made of this kernel by `replace` or `with_parts` has none.
        joined: of a kernel that stands for tensors side by side: the dimension, and the kernel of each. Forgotten
            like ``unpadded``.
    """

    parts: tuple[Part, ...]
    axes: Axes
    split: int | None = None
    unpadded: tuple[Kernel, tuple[int, ...]] | None = field(default=None, init=False)
    joined: tuple[int, tuple[Kernel, ...]] | None = field(default=None, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_product(size for _, size in axis) for axis in self.axes)

    @property
    def channels(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def positions(self) -> int:
        return _product(size for axis in self.axes for role, size in axis if role == "p")

    @cached_property
    def merged(self) -> Part:
        """All channel groups averaged into one (a mixture; its law is that of the parts)."""
        if len(self.parts) == 1:
            return self.parts[0]
        return merge(self.parts)

    @property
    def how(self) -> How:
        return max((part.how for part in self.parts), key=lambda how: (how.level, how.error))

    def padded(self, result: Kernel, front: tuple[int, ...]) -> Kernel:
        """``result``, remembered to be this kernel between zeros."""
        inner, before = self.unpadded or (self, ())
        dims = max(len(before), len(front))
        both = (((0,) * (dims - len(zeros)) + zeros) for zeros in (before, front))
        object.__setattr__(result, "unpadded", (inner, tuple(a + b for a, b in zip(*both, strict=True))))
        return result

    def of_joined(self, dim: int, pieces: tuple[Kernel, ...]) -> Kernel:
        """This kernel, remembered to stand for ``pieces`` side by side along ``dim``."""
        object.__setattr__(self, "joined", (dim, pieces))
        return self

    def with_parts(self, *parts: Part) -> Kernel:
        return replace(self, parts=parts, split=self.split if len(parts) > 1 else None)

    def told(self, *parts: Part) -> Kernel:
        """The same entries, of which more is known or said: all that this kernel remembers stays."""
        result = replace(self, parts=parts)
        if self.joined is not None:
            result.of_joined(*self.joined)
        return result if self.unpadded is None else self.unpadded[0].padded(result, self.unpadded[1])

    def one(self) -> Kernel:
        """The same kernel with its channel groups averaged."""
        return replace(self, parts=(self.merged,), split=None)


def alike(pieces: tuple[Kernel, ...]) -> bool:
    """Whether all have the same second moments, to rounding or four of their own errors where they were drawn."""
    first = pieces[0].merged
    for piece in pieces[1:]:
        own = piece.merged
        error = 4 * math.hypot(first.how.error, own.how.error) + 1e-9
        if bool(((own.cov - first.cov).abs() > error * torch.maximum(own.q, first.q)).any()):
            return False
    return True


def made_of(part: Part) -> tuple[Part, ...]:
    """The parts that a part's expression names."""
    match part.expr:
        case Apply(_, arg):
            return (arg,)
        case Sum(terms):
            return tuple(term for _, term in terms)
        case Product(left, right):
            return left, right
        case _:
            return ()


def merge(parts: tuple[Part, ...]) -> Part:
    """Channel-weighted average of several groups.

    The law of a mixture is not that of any one group, unless all are Gaussian with the same moments: it counts as
    unknown, which is exact for whatever only reads second moments (affine layers, norms).
    """
    total = sum(part.size for part in parts)
    shares = [part.size / total for part in parts]

    def average(name: str) -> Tensor:
        return torch.stack([share * getattr(part, name) for share, part in zip(shares, parts, strict=True)]).sum(0)

    return Part(
        size=total,
        cov=average("cov"),
        slope=average("slope"),
        ntk=average("ntk"),
        mean=sum(share * part.mean for share, part in zip(shares, parts, strict=True)),
        roots=Roots.union(part.roots for part in parts),
        expr=Gaussian() if _same_gaussian(parts) else Unknown("channels of several laws"),
        how=max((part.how for part in parts), key=lambda how: (how.level, how.error)),
    )


def _same_gaussian(parts: tuple[Part, ...]) -> bool:
    first = parts[0]
    return all(part.gaussian and part.mean == first.mean and torch.equal(part.cov, first.cov) for part in parts)


def _product(sizes: object) -> int:
    result = 1
    for size in sizes:  # type: ignore[attr-defined]
        result *= size
    return result
