"""What `kgraph.order_chaos` returns, with its views."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kgraph.checks import count as count_of
from kgraph.meanfield.order_chaos import Regime, regime_of
from kgraph.report.numbers import short
from kgraph.report.table import to_text
from kgraph.studies.order_chaos.pixels import Pixels
from kgraph.studies.order_chaos.plot import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {"order": "cyan", "edge": "green", "chaos": "magenta"}


@dataclass(frozen=True)
class LayerOrder:
    """One activation with the affine layer behind it.

    Attributes:
        name: module path of the activation (graph node of a function).
        layer: module path of the affine layer's weight.
        q: q value that the activation sees.
        r: C'(1) from the activation's input to the layer's output; (1 - beta^2) E[sigma'^2] where q stays 1.
        tolerance: how far r may be from 1 at the edge: the sampling error of the layer's weights.
    """

    name: str
    layer: str
    q: float
    r: float
    tolerance: float

    @property
    def regime(self) -> Regime:
        return regime_of(self.r, self.tolerance)


@dataclass(frozen=True)
class OrderChaosReport:
    """What `kgraph.order_chaos` finds; print it, show it in a notebook, plot it.

    Attributes:
        model: class name.
        layers: r of every layer.
        ntk: NTK of the inputs, [n, n], averaged over equal output positions.
        constant_share: part of its trace on the constant vector: 1/n for inputs that share nothing, 1 in deep order.
        pixels: borders and checkerboards, where the output is an image.
        parametrization, how: of the NTK.
        notes: what was left out, and why.
    """

    model: str
    layers: tuple[LayerOrder, ...]
    ntk: Tensor
    constant_share: float
    pixels: Pixels | None
    parametrization: str
    how: str
    notes: tuple[str, ...] = ()

    @property
    def r(self) -> float:
        """Geometric mean of the layers' r; nan without activations."""
        logs = [math.log(layer.r) for layer in self.layers if layer.r > 0]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan

    @property
    def regime(self) -> Regime | None:
        """Of the geometric mean, the edge as wide as the layers' own; None without activations."""
        count = len(self.layers)
        if not count:
            return None
        return regime_of(self.r, math.sqrt(sum(layer.tolerance**2 for layer in self.layers)) / count)

    @property
    def vartheta(self) -> Tensor:
        """Scaled NTK, Theta(x, y) / sqrt(Theta(x, x) Theta(y, y)), [n, n]."""
        root = self.ntk.diagonal().sqrt()
        return self.ntk / root.outer(root)

    @property
    def spread(self) -> tuple[float, float, float]:
        """Smallest, mean and largest scaled NTK of two different inputs; nan for a single one."""
        n = len(self.ntk)
        apart = self.vartheta[~torch.eye(n, dtype=torch.bool)]
        return (
            (math.nan, math.nan, math.nan) if n < 2 else (float(apart.min()), float(apart.mean()), float(apart.max()))
        )

    def summary(self) -> list[str]:
        """The findings in a sentence each."""
        low, mean, high = self.spread
        lines = [f"{self.model}: {self.regime or 'no activation'}, r = {self.r:.4g} (geometric mean of its layers)"]
        lines.append(f"scaled NTK of two inputs: {mean:.3g} on average, from {low:.3g} to {high:.3g} ({self.how})")
        n = len(self.ntk)
        lines.append(f"constant mode: {self.constant_share:.1%} of the NTK's trace ({1 / n:.1%} for unrelated inputs)")
        return [*lines, *(self.pixels.summary() if self.pixels is not None else [])]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        fields = ("name", "layer", "q", "r", "regime")
        return {
            "model": self.model,
            "regime": self.regime,
            "r": self.r,
            "layers": [{name: getattr(layer, name) for name in fields} for layer in self.layers],
            "ntk": self.ntk.tolist(),
            "vartheta": self.vartheta.tolist(),
            "constant_share": self.constant_share,
            "pixels": self.pixels.to_dict() if self.pixels is not None else None,
            "parametrization": self.parametrization,
            "how": self.how,
            "notes": list(self.notes),
        }

    def plot(self) -> Figure:
        """r by layer and the scaled NTK of the inputs; for images the variance map and the kernel of a pixel.

        Raises:
            KGraphError: matplotlib is not installed.
        """
        return plot(self)

    def text(self, width: int = 100) -> str:
        return to_text(self._parts(), count_of("width", width))

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in _cells(row))}</tr>" for row in self.layers)
        head = "".join(f"<th>{name}</th>" for name in _HEADS)
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (*self.summary(), *self.notes))
        return f"<div>{lines}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"

    def _parts(self) -> Iterator[RenderableType]:
        yield from (Text(line, style="bold" if not i else "") for i, line in enumerate(self.summary()))
        if self.layers:
            table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
            for name in _HEADS:
                table.add_column(name, justify="right" if name in ("q", "r") else "left")
            for layer in self.layers:
                *plain, regime = _cells(layer)
                table.add_row(*plain, Text(regime, style=_STYLES[regime]))
            yield from (Text(""), table)
        yield from (Text(f"note: {note}", style="dim") for note in self.notes)


_HEADS = ("activation", "layer", "q", "r", "regime")


def _cells(layer: LayerOrder) -> list[str]:
    return [layer.name, layer.layer, short(layer.q), f"{layer.r:.4f}", layer.regime]
