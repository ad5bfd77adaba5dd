"""Maximum over windows of positions: of Gaussian parts by its law, of others on drawn windows.

Border windows are smaller (padding never wins a maximum), so that a window holds m positions with the share w_m,
counted exactly. Windows are drawn with the largest m; the first m of their positions give the maximum over m:

    K'_same = sum_m w_m E[max_m(a) max_m(b)]        K'_diff = sum_mn w_m w_n E[max_m(a) max_n(b')]

with b' another window of the same image. Two windows that overlap lie between: K'_diff moves towards K'_same by the
mean share |A and B| / |A or B| of their positions that they have in common.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kgraph import laws
from kgraph.algebra import IDENTITY, apply, as_function, empirical, endless, infinite
from kgraph.canonical import aten
from kgraph.draws import COUNT, unknown_law
from kgraph.fields import FieldDraws, Gradients
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Kernel, Part
from kgraph.maps import Pointwise
from kgraph.rules.measured import matched
from kgraph.rules.table import Context, rule

_WINDOWS = 16384
_BLOCKS = 16


@dataclass(frozen=True)
class Windows:
    """How many positions windows hold, with the share of windows that do; and the mean overlap of two of them."""

    shares: tuple[tuple[int, float], ...]
    overlap: float

    @property
    def largest(self) -> int:
        return max(count for count, _ in self.shares)

    def outside(self, draw: int) -> Tensor:
        """Which of the ``largest`` places each drawn window lacks, [windows, places]; two draws are independent."""
        at = torch.arange(_WINDOWS, dtype=torch.float64) * (2 ** (1 + draw) + 1) ** 0.5 % 1  # equidistributed
        edges = torch.tensor([share for _, share in self.shares], dtype=torch.float64).cumsum(0)[:-1]
        held = torch.tensor([count for count, _ in self.shares])[torch.bucketize(at, edges)]
        return torch.arange(self.largest) >= held[:, None]

    def overlapping(self, field: Tensor) -> Tensor:
        """K_diff of disjoint windows moved towards K_same by the mean overlap."""
        field = field.clone()
        field[:, DIFF] += self.overlap * (field[:, SAME] - field[:, DIFF])
        return field


def windows(sizes: Sequence[int], outputs: Sequence[int], spans: Sequence[Sequence[tuple[int, int, int]]]) -> Windows:
    """Windows whose positions along every dimension are ``range(*span)``, one span for each output."""
    places = [[{p for p in range(*span) if 0 <= p < n} for span in own] for n, own in zip(sizes, spans, strict=True)]
    held = [Counter(len(window) for window in own) for own in places]
    total = math.prod(outputs)
    shares: Counter[int] = Counter()
    for combination in itertools.product(*(own.items() for own in held)):
        shares[math.prod(count for count, _ in combination)] += math.prod(times for _, times in combination)
    return Windows(tuple((count, times / total) for count, times in sorted(shares.items())), _overlap(places, total))


def _overlap(places: list[list[set[int]]], total: int) -> float:
    """Mean over pairs of different windows of |A and B| / |A or B|."""
    if total == 1:
        return 0.0
    tables = [Counter((len(a & b), len(a), len(b)) for a in own for b in own) for own in places]
    mean = 0.0
    for combination in itertools.product(*(table.items() for table in tables)):
        both, one, two = (math.prod(key[i] for key, _ in combination) for i in range(3))
        mean += math.prod(times for _, times in combination) * both / max(one + two - both, 1)
    return (mean - total) / (total * (total - 1))


def _each(value: object, dims: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return [int(v) for v in (values * dims if len(values) == 1 else values)]  # type: ignore[call-overload]


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    context: Context,
    x: Kernel,
    kernel_size: object,
    stride: object = None,
    padding: object = 0,
    dilation: object = 1,
    ceil_mode: bool = False,
) -> Kernel:
    dims = int(str(context.node.target).split("max_pool")[1][0])
    if any(role == "c" for axis in x.axes[-dims:] for role, _ in axis):
        return context.sample()
    taps, pads, steps = _each(kernel_size, dims), _each(padding, dims), _each(dilation, dims)
    strides = _each(stride, dims) if stride not in (None, []) else taps
    outputs = context.shape[-dims:]
    spans = [
        [(i * s - p, i * s - p + d * k, d) for i in range(n)]
        for n, k, s, p, d in zip(outputs, taps, strides, pads, steps, strict=True)
    ]
    found = windows(x.shape[-dims:], outputs, spans)
    parts = tuple(max_of_window(part, found) for part in x.parts)
    spatial = tuple((("p", size),) if size > 1 else () for size in outputs)
    return Kernel(parts, (*x.axes[:-dims], *spatial), x.split if len(parts) > 1 else None)


def max_of_window(part: Part, held: Windows) -> Part:
    """Maximum of a part over windows: by its law where the part is Gaussian, else measured on drawn windows.

    An increasing function of a Gaussian part goes behind the maximum.
    """
    fn, base = as_function(part)
    if fn is not IDENTITY and base.gaussian and part.factor is None and _increases(fn, base):
        return apply(fn, max_of_window(base, held))
    drawn = _drawn_maximum(part, held)
    law = laws.of_maximum(part, held.shares, held.overlap)
    known = law and laws.read(law)
    if law is None or known is None:
        return drawn
    result = replace(drawn, **known.tensors, mean=known.mean, how=part.how | known.how)
    result = infinite(result) if endless(part) else result
    laws.remember(result, law)
    return result


def _increases(fn: Pointwise, base: Part) -> bool:
    """Whether the function never falls where the part has any weight."""
    reach = 9 * float(base.q) ** 0.5
    return not bool((fn(torch.linspace(-reach, reach, 2001, dtype=torch.float64)).diff() < 0).any())


def _drawn_maximum(part: Part, held: Windows) -> Part:
    """Draw windows; keep their maxima and the derivatives at the places that attain them."""
    draws = FieldDraws(seed=11, elsewhere=True)
    shape, positions = (_WINDOWS, held.largest), (False, True)
    first, second = draws.values(part, shape, positions)
    rows = len(part.cov)
    top_a, at_a = first.masked_fill(held.outside(0), -math.inf).max(-1)
    outside = torch.stack([held.outside(0)] * rows + [held.outside(1)] * rows)
    top_b, at_b = second.masked_fill(outside, -math.inf).max(-1)
    gradients = draws.gradients(part, shape, positions)
    slope, ntk = (_derivative(gradients, at_a, at_b, name) for name in ("slope", "ntk"))
    mean = float(torch.cat([top_a[None], top_b]).mean())
    cov = _by_place(_products(top_a, top_b, mean).mean(-1))
    law = matched(top_a[:COUNT], top_b[:, :COUNT].reshape(2, -1, COUNT).transpose(0, 1), cov, mean)
    drawn = empirical(part, *law, held.overlapping(slope), held.overlapping(ntk), part.roots)
    how = part.how.drawn(_relative_error(top_a, top_b, mean))
    reason = unknown_law(part)
    how = how | assumed(reason) if reason else how
    result = replace(drawn, cov=held.overlapping(cov), mean=mean, how=how)
    return infinite(result) if endless(part) else result


def _products(top_a: Tensor, top_b: Tensor, mean: float) -> Tensor:
    """Products of maxima about their own means, moved to the mean over all draws: less noise than plain products."""
    return (top_a - top_a.mean()) * (top_b - top_b.mean(-1, keepdim=True)) + mean**2


def _relative_error(top_a: Tensor, top_b: Tensor, mean: float) -> float:
    """Relative standard error of q, from the estimates of blocks of windows."""
    everything = torch.cat([top_a[None], top_b]).reshape(1 + len(top_b), _BLOCKS, -1)
    spread = top_a.reshape(_BLOCKS, -1)
    q = spread.var(1, unbiased=False) + everything.mean((0, 2)).square()
    return 1.07 * float(q.std() / (_BLOCKS**0.5 * max(mean**2, float(q.mean()))))  # Student's law of 16 blocks


def _derivative(gradients: Gradients, at_a: Tensor, at_b: Tensor, name: str) -> Tensor:
    """sum over draws of d_a d_b times the kernel at the same position, or at two different ones; [P, 2]."""
    rows = len(at_b) // 2
    meets = (at_a == at_b).double()
    meets[rows:] = 0.0  # another window: never the same position
    total = torch.zeros(rows, 2, dtype=torch.float64)
    for leaf, (d_a, d_b) in gradients.items():
        both = d_a.gather(-1, at_a[..., None])[..., 0] * d_b.gather(-1, at_b[..., None])[..., 0]
        kernel = getattr(leaf, name)
        same, apart = _by_place((both * meets).mean(-1)), _by_place((both * (1 - meets)).mean(-1))
        total += same * kernel[:, SAME:DIFF] + apart * kernel[:, DIFF:]
    return total


def _by_place(rows: Tensor) -> Tensor:
    """[2P] rows, the same window and then another, as [P, 2]."""
    return rows.reshape(2, -1).T
