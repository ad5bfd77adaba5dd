"""The picture of `kgraph.order_chaos`: r by layer, the NTK between inputs, and the image of the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kgraph.errors import KGraphError
from kgraph.studies.order_chaos.pixels import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kgraph.studies.order_chaos.report import OrderChaosReport

COLORS = {"order": "tab:cyan", "edge": "tab:green", "chaos": "tab:purple"}


_FAINT = 0.2
"""Smallest full scale of a pixel's kernel: what is weak looks weak."""


def plot(report: OrderChaosReport) -> Figure:
    """Two panels; two more where the output is an image of one or two axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KGraphError("Plots need matplotlib", hint="Install it with: pip install 'kgraph[plot]'") from error
    pixels = report.pixels if report.pixels is not None and len(report.pixels.places) <= 2 else None
    count = 2 if pixels is None else 4
    figure = Figure(figsize=(3.6 * count, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, count)
    _layers(panels[0], report)
    _image(figure, panels[1], report.vartheta, "scaled NTK between inputs", (-1.0, 1.0))
    if pixels is not None:
        _variance_map(figure, panels[2], pixels)
        _kernel_of_a_pixel(figure, panels[3], pixels)
    return figure


def _layers(axes: Axes, report: OrderChaosReport) -> None:
    r = [layer.r for layer in report.layers]
    axes.bar(range(len(r)), r, color=[COLORS[layer.regime] for layer in report.layers])
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    for name, color in COLORS.items():
        axes.plot([], [], "s", color=color, label=name)
    axes.set(xlabel="activation", ylabel="r", title=f"{report.model}: {report.regime}")
    axes.set_xticks(range(len(r)) if len(r) <= 12 else range(0, len(r), len(r) // 8))
    axes.legend(loc="lower right", fontsize="small")


def _image(figure: Figure, axes: Axes, values: Tensor, title: str, limits: tuple[float, float]) -> None:
    shown = axes.imshow(values.tolist(), cmap="RdBu_r", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_title(title, fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(shown, ax=axes, shrink=0.8)


def _variance_map(figure: Figure, axes: Axes, pixels: Pixels) -> None:
    title = f"output variance, corner {pixels.variance_ratio:.2g} of bulk"
    if len(pixels.places) == 1:
        axes.plot(pixels.variances.tolist())
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="pixel", ylim=(0, None))
        return
    shown = axes.imshow(pixels.variances.tolist(), cmap="viridis", vmin=0.0, interpolation="nearest")
    axes.set_title(title, fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(shown, ax=axes, shrink=0.8)


def _kernel_of_a_pixel(figure: Figure, axes: Axes, pixels: Pixels) -> None:
    """Scaled NTK of the middle pixel with every other; in one dimension the whole matrix."""
    root = pixels.theta.diagonal().clamp_min(1e-300).sqrt()
    scaled = pixels.theta / root.outer(root)
    share = "" if pixels.period is None else f", period-{pixels.period} share {pixels.checkerboard_share:.1%}"
    if len(pixels.places) == 1:
        _image(figure, axes, scaled, f"scaled NTK of pixels{share}", (-1.0, 1.0))
        return
    height, width = pixels.places
    middle = scaled[height // 2 * width + width // 2].reshape(height, width)
    apart = middle[~_is_middle(height, width)]
    limit = max(float(apart.abs().max()), _FAINT)
    _image(figure, axes, middle, f"NTK with the middle pixel{share}", (-limit, limit))


def _is_middle(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 2, width // 2] = True
    return mask
