"""Line charts as SVG geometry: plain numbers that the template writes out, no drawing library needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 84.0, 14.0, 40.0
MOST_DOTS, MOST_POINTS = 400, 4000


@dataclass(frozen=True)
class Point:
    """One node in a chart: data coordinates, what hovering shows, where a click leads."""

    x: float
    y: float
    title: str
    anchor: str
    marked: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through the trunk's nodes and loose dots for the nodes in branches."""

    label: str
    css: str
    line: tuple[Point, ...]
    dots: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Tick:
    """A tick in pixels with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Drawn:
    """A curve in pixels."""

    label: str
    css: str
    path: str
    line: tuple[Point, ...]
    dots: tuple[Point, ...]
    label_y: float


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to write one chart."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Drawn, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def chart(title: str, y_label: str, curves: Sequence[Curve], log: bool, y_range: tuple[float, float]) -> Chart:
    """Lay the curves out. On a log axis values that are not positive are left out, as they have no place."""
    curves = [_usable(curve, log) for curve in curves]
    points = [point for curve in curves for point in (*curve.line, *curve.dots)]
    x_high = max([1.0, *(point.x for point in points)])
    y_ticks, y_low, y_high = _y_axis([point.y for point in points], log, y_range)

    def x_pixel(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / x_high, 1)

    def y_pixel(place: float) -> float:
        share = (place - y_low) / (y_high - y_low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    def place(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple(Point(x_pixel(p.x), y_pixel(_scale(p.y, log)), p.title, p.anchor, p.marked) for p in points)

    drawn = []
    for curve in curves:
        line = place(thin(curve.line, MOST_POINTS))
        path = "M" + " ".join(f"{p.x:g},{p.y:g}" for p in line) if line else ""
        end = line[-1].y if line else HEIGHT - BOTTOM
        drawn.append(Drawn(curve.label, curve.css, path, thin(line), thin(place(curve.dots)), end))
    x_ticks = tuple(Tick(x_pixel(x), f"{x:g}") for x in steps(0.0, x_high, 8) if x == int(x))
    pixel_ticks = tuple(Tick(y_pixel(at), label) for at, label in y_ticks)
    return Chart(title, "depth (nonlinear layers)", y_label, x_ticks, pixel_ticks, tuple(spread_labels(drawn)))


def thin(points: Sequence[Point], most: int = MOST_DOTS) -> tuple[Point, ...]:
    """At most about `most` points, evenly chosen; marked points and the last one always stay."""
    step = math.ceil(len(points) / most)
    last = len(points) - 1
    return tuple(p for i, p in enumerate(points) if step <= 1 or i % step == 0 or p.marked or i == last)


def steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, at most about `most`."""
    raw = max((high - low) / most, 1e-12)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def spread_labels(curves: Sequence[Drawn], gap: float = 12.0) -> list[Drawn]:
    """Move the labels at the ends of the curves apart so that none covers another, and keep them inside."""
    order = sorted(range(len(curves)), key=lambda i: curves[i].label_y)
    places = [0.0] * len(curves)
    at = TOP
    for i in order:
        at = places[i] = max(curves[i].label_y, at)
        at += gap
    at = HEIGHT - BOTTOM
    for i in reversed(order):
        at = places[i] = min(places[i], at)
        at -= gap
    return [Drawn(c.label, c.css, c.path, c.line, c.dots, round(y, 1)) for c, y in zip(curves, places, strict=True)]


def _usable(curve: Curve, log: bool) -> Curve:
    def keep(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple(p for p in points if math.isfinite(p.y) and (p.y > 0 or not log))

    return Curve(curve.label, curve.css, keep(curve.line), keep(curve.dots))


def _scale(y: float, log: bool) -> float:
    return math.log10(y) if log else y


def _y_axis(
    values: Sequence[float], log: bool, y_range: tuple[float, float]
) -> tuple[list[tuple[float, str]], float, float]:
    """Ticks (place, label), lowest and highest place, in axis units (exponents on a log axis);
    `y_range` is shown at least."""
    places = [_scale(y, log) for y in (*values, *y_range)]
    low, high = min(places), max(places)
    if not log:
        return [(y, f"{y:g}") for y in steps(low, high, 6)], low, high
    low, high = math.floor(low), math.ceil(high)
    exponents = [e for e in steps(low, high, 6) if e == int(e)]
    return [(e, f"1e{e:g}" if e else "1") for e in exponents], low, high
