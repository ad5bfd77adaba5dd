"""The phase diagram of an activation: depth scales over (sigma_w, sigma_b), as numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from kgraph.errors import InputError, KGraphError
from kgraph.files import destination, save_figure
from kgraph.maps import Pointwise
from kgraph.meanfield.critical import critical_point
from kgraph.meanfield.moments import Activation, as_pointwise
from kgraph.meanfield.phases import mean_field

_SCALES = (2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
_LONGEST = 1000.0
_FINE = 240
_LINE_POINTS = 60


@dataclass(frozen=True)
class PhaseDiagram:
    """Mean field on a grid, and the critical line.

    Attributes:
        activation: its name.
        sigma_w, sigma_b: standard deviations, [w] and [b].
        q, chi_1, xi_c: fixed point, slope at c = 1 and depth scale of c, [b, w].
        line: (sigma_w, sigma_b) of the critical line, [points, 2], by rising sigma_b; empty where there is none.
    """

    activation: str
    sigma_w: Tensor
    sigma_b: Tensor
    q: Tensor
    chi_1: Tensor
    xi_c: Tensor
    line: Tensor

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON-ready data."""
        values = {name: getattr(self, name).tolist() for name in ("sigma_w", "sigma_b", "q", "chi_1", "xi_c", "line")}
        return {"activation": self.activation, **values}

    def plot(self, path: str | PathLike[str]) -> None:
        """Order and chaos with contours of the depth scale, as an image file.

        Raises:
            KGraphError: matplotlib is not installed.
        """
        destination(path)
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise KGraphError("Plots need matplotlib", hint="Install it with: pip install 'kgraph[plot]'") from error
        figure = Figure(figsize=(6, 4.4), layout="constrained")
        axes = figure.subplots()
        w, b, rate = self._fine()
        scale = 1 / np.abs(rate).clip(1 / _LONGEST, 1)
        mesh = axes.pcolormesh(w, b, scale, norm=LogNorm(1, _LONGEST), shading="nearest", rasterized=True)
        figure.colorbar(mesh, label="depth scale of c, layers")
        levels = sorted({sign / scale for scale in _SCALES for sign in (-1, 1)})
        lines = axes.contour(w, b, rate, levels=levels, colors="white", linewidths=0.7, linestyles="solid")
        named = [level for level in levels if abs(level) > 1 / 25]
        axes.clabel(lines, named, fmt=lambda level: f"{1 / abs(level):.0f}", fontsize=8)
        if len(self.line):
            marker = "o" if len(self.line) == 1 else None  # relu is critical at one point
            axes.plot(*self.line.T.numpy(), marker=marker, color="tab:red", linewidth=2, label="critical line")
            axes.legend(loc="upper left")
        _write_regimes(axes, self.chi_1, self.sigma_w.numpy(), self.sigma_b.numpy())
        axes.set(xlabel="σ_w", ylabel="σ_b", xlim=(w[0], w[-1]), ylim=(b[0], b[-1]))
        axes.set_title(f"Phase diagram of {self.activation}")
        save_figure(figure, path, dpi=110)

    def _fine(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A finer grid with 1 / xi, negative in the ordered phase: smooth across the critical line, unlike xi."""
        rate = torch.where(self.chi_1 > 1, 1.0, -1.0) / self.xi_c
        w, b = self.sigma_w.numpy(), self.sigma_b.numpy()
        fine = [np.linspace(axis[0], axis[-1], _FINE) for axis in (w, b)]
        degrees = [min(3, len(axis) - 1) for axis in (b, w)]
        spline = RectBivariateSpline(b, w, rate.numpy(), kx=degrees[0], ky=degrees[1])
        return fine[0], fine[1], spline(fine[1], fine[0])


def _write_regimes(axes: Any, chi_1: Tensor, w: np.ndarray, b: np.ndarray) -> None:
    for name, inside in (("order", chi_1 < 0.9), ("chaos", chi_1 > 1.1)):
        if bool(inside.any()):
            rows, columns = np.nonzero(inside.numpy())
            at = float(w[columns].mean()), float(b[rows].mean())
            axes.text(*at, name, color="white", fontsize=13, ha="center", weight="bold")


def phase_diagram(
    activation: Activation,
    *,
    sigma_w: Sequence[float] | Tensor | None = None,
    sigma_b: Sequence[float] | Tensor | None = None,
) -> PhaseDiagram:
    """Order, chaos and depth scales of ``z' = W phi(z) + b`` over a grid of standard deviations.

    Args:
        activation: a name, a `kgraph.maps.Pointwise`, or any elementwise torch function.
        sigma_w, sigma_b: rising; by default 41 values of [.5, 3] and 31 of [.01, .5].

    Raises:
        InputError: the activation jumps, or a grid is not rising.
    """
    phi = as_pointwise(activation)
    w = _grid("sigma_w", torch.linspace(0.5, 3, 41) if sigma_w is None else sigma_w)
    b = _grid("sigma_b", torch.linspace(0.01, 0.5, 31) if sigma_b is None else sigma_b)
    rows = []
    for bias in b.tolist():
        points, q = [], 1.0
        for weight in w.tolist():
            point = mean_field(phi, weight**2, bias**2, q0=q)
            points.append((point.q, point.chi_1, point.xi_c))
            q = point.q if 1e-9 < point.q < 1e9 else 1.0  # the neighbour's fixed point is near
        rows.append(points)
    q, chi_1, xi_c = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return PhaseDiagram(_name(activation), w, b, q, chi_1, xi_c, _line(phi, float(b[0]), float(b[-1])))


def _grid(name: str, values: Sequence[float] | Tensor) -> Tensor:
    try:
        grid = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        grid = torch.zeros(())
    rising = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() > 0).all()) and float(grid[0]) >= 0
    if not rising or not bool(grid.isfinite().all()):
        raise InputError(f"{name} must be at least two rising numbers >= 0")
    return grid


def _line(phi: Pointwise, low: float, high: float) -> Tensor:
    """The critical line between two bias deviations, by equal steps of ln q."""
    try:
        ends = [critical_point(phi, sigma_b2=max(sigma, 1e-6) ** 2).q for sigma in (low, high)]
    except InputError:
        try:
            only = critical_point(phi, q=1.0)
        except InputError:
            return torch.zeros(0, 2, dtype=torch.float64)
        return torch.tensor([[math.sqrt(only.sigma_w2), math.sqrt(only.sigma_b2)]], dtype=torch.float64)
    qs = np.geomspace(ends[0], ends[1], _LINE_POINTS)
    points = [critical_point(phi, q=float(q)) for q in qs]
    return torch.tensor([(p.sigma_w2**0.5, p.sigma_b2**0.5) for p in points], dtype=torch.float64)


def _name(activation: Activation) -> str:
    return activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
