"""Graph-based parametrization: every output pixel of a convolution is divided by the root of its own fan-in.

    z_p = M_p sum_{q in P(p)} W a_q + b,      M_p = sqrt(c_max / |P(p)|),      0 where P(p) is empty

P(p) are the parents of p: the input pixels that it reads. A transposed convolution gives its border fewer parents
than its bulk, and where the stride does not divide the kernel an uneven number inside; M evens that out.

The product is one operator, ``kgraph::parent_scale``, so that a captured graph shows what it is. It is made of
plain ATen operations: compilers and the ONNX exporter see a product and a sum.

Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LIBRARY = torch.library.Library("kgraph", "FRAGMENT")
_LIBRARY.define("parent_scale(Tensor x, Tensor scale, Tensor? bias) -> Tensor")


def _parent_scale(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``scale * x + bias``: x [N, C, *sizes], scale [1, 1, *sizes], bias [C]."""
    scale = scale.to(x.dtype)
    if bias is None:
        return x * scale
    return torch.addcmul(bias.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 2)), x, scale)


_LIBRARY.impl("parent_scale", _parent_scale, "CompositeImplicitAutograd")
PARENT_SCALE: Any = torch.ops.kgraph.parent_scale.default
"""The operator, as it stands in a captured graph."""

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


@dataclass(frozen=True)
class Taps:
    """Where a convolution's taps lie; one number an axis everywhere.

    Attributes:
        before, after: zeros in front and behind (a transposed convolution cuts as many pixels off).
        output_padding: pixels that a transposed convolution adds behind.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool = False

    def parents(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """|P|: the same convolution of ones with ones, [1, 1, *output sizes] for input ``sizes``; float32 integers."""
        dims = len(self.kernel)
        ones = torch.ones(1, 1, *sizes, dtype=torch.float32, device=device)
        taps = torch.ones(1, 1, *self.kernel, dtype=torch.float32, device=device)
        if self.transposed:
            convolve = _TRANSPOSED[dims - 1]
            count = convolve(ones, taps, None, self.stride, self.before, self.output_padding, 1, self.dilation)
        else:
            padded = [amount for pair in zip(self.before[::-1], self.after[::-1], strict=True) for amount in pair]
            count = _CONVOLUTIONS[dims - 1](functional.pad(ones, padded), taps, None, self.stride, 0, self.dilation)
        return count.round()  # fast algorithms for small kernels leave 3.9999998

    def most(self, sizes: Sequence[int]) -> int:
        """c_max: the largest number of parents of any output pixel."""
        return int(self.parents(sizes).max())

    def ever_uneven(self) -> bool:
        """Whether there are input sizes at which output pixels differ in their number of parents."""
        return any(self._axis_uneven(axis) for axis in range(len(self.kernel)))

    def _axis_uneven(self, axis: int) -> bool:
        kernel, stride, before, after, dilation, extra = (
            (values[axis],)
            for values in (self.kernel, self.stride, self.before, self.after, self.dilation, self.output_padding)
        )
        taps = Taps(kernel, stride, before, after, dilation, extra, self.transposed)
        reach, cut = dilation[0] * (kernel[0] - 1) + 1, before[0] + after[0]
        # the smallest size with an output; beyond another reach and stride only pixels of the bulk are new
        least = 1 + max(0, -(-(cut - reach - extra[0] + 1) // stride[0]) if self.transposed else reach - cut - 1)
        counts = (taps.parents((size,)) for size in range(least, least + reach + stride[0] + 1))
        return any(bool((count != count.max()).any()) for count in counts)

    def scale(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """M = sqrt(c_max / |P|), 0 where |P| = 0; [1, 1, *output sizes]. Exactly 1 at every bulk pixel."""
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        count = self.parents(sizes, device).to(wide)
        ratio = torch.sqrt(count.amax() / count.clamp_min(1.0))
        return torch.where(count > 0, ratio, torch.zeros_like(ratio)).to(dtype)


class ParentScale(nn.Module):
    """``M y + b`` behind a convolution y of ``like`` without bias; M as above.

    M is a buffer that is in no state dict and is made anew, from integers, whenever the module is moved or cast: a
    cast to half precision and back, or ``to_empty`` after a build on the meta device, leaves it exact.

    Args:
        taps: of the convolution.
        sizes: input sizes that M is kept for; another size is computed on the way. None: always computed, also in
            an exported graph with dynamic sizes.

    Shapes: y ``[N, C, *output sizes]``, like ``[N, C', *input sizes]`` (only its sizes are read), bias ``[C]`` or None.
    Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
    """

    scale: Tensor | None

    def __init__(
        self,
        taps: Taps,
        sizes: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.taps, self.sizes = taps, None if sizes is None else tuple(int(size) for size in sizes)
        dtype = dtype or torch.get_default_dtype()
        kept = None if self.sizes is None else taps.scale(self.sizes, dtype, device or "cpu")
        self.register_buffer("scale", kept, persistent=False)

    def factors(self, sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """M for inputs of these sizes, [1, 1, *output sizes]."""
        return self.taps.scale(sizes, dtype)

    def forward(self, y: Tensor, like: Tensor, bias: Tensor | None = None) -> Tensor:
        """``M y + b``, of y's shape and dtype."""
        sizes = like.shape[2:]
        scale = self.scale
        if scale is None or tuple(sizes) != self.sizes:
            scale = self.taps.scale(sizes, y.dtype, y.device)
        return PARENT_SCALE(y, scale, bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParentScale:
        super()._apply(fn, recurse)
        if self.scale is not None and self.sizes is not None and not self.scale.is_meta:
            self.scale = self.taps.scale(self.sizes, self.scale.dtype, self.scale.device)
        return self

    def extra_repr(self) -> str:
        kind = "transposed, " if self.taps.transposed else ""
        place = "any sizes" if self.sizes is None else f"input sizes {self.sizes}"
        return f"{kind}kernel {self.taps.kernel}, stride {self.taps.stride}, {place}"
