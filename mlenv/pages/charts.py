"""Line, reliability and dot charts as inline SVG.

Colours come from the page's CSS: classes ``c0`` to ``c5``, one per series. Every name is escaped by ``Markup.format``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

if TYPE_CHECKING:
    from mlenv.loops.metrics import ReliabilityCurve

Range = tuple[float, float]
Point = tuple[float, float]

NUM_COLORS = 6
NEUTRAL = 5
"""The colour of what belongs to no task."""

_WIDTH = 480  # about what a chart gets on the page, so that its text is about as large as the page's
_MAX_POINTS = 200
_MAX_NAME = 20
_MAX_X_NAMES = 5


@dataclass(frozen=True)
class Series:
    """Points of one colour in one style."""

    name: str
    points: Sequence[Point]
    color: int
    style: Literal["line", "dots", "level"] = "line"
    """line: joined; dots: marked; level: one value, dashed across the chart."""

    @property
    def css(self) -> str:
        """Classes of all that is drawn for it, and of its mark in the legend."""
        return f"{self.style} c{self.color % NUM_COLORS}"


@dataclass(frozen=True)
class Chart:
    """A drawing and what its colours mean."""

    title: str
    svg: Markup
    legend: Sequence[Series] = ()


@dataclass(frozen=True)
class _Frame:
    """Places numbers in a rectangle of the drawing and draws its axes."""

    x_range: Range
    y_range: Range
    left: float
    top: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * _share(value, self.x_range)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * _share(value, self.y_range)

    def x_grid(self) -> Markup:
        return _joined(_line(self.x(tick), self.top, self.x(tick), self.bottom, "grid") for tick in _ticks(self.x_range))

    def x_axis(self, label: str, names: Sequence[str] = ()) -> Markup:
        """With names, they stand at 0, 1, 2 and so on, as many as there is room for."""
        places = range(0, len(names), math.ceil(len(names) / _MAX_X_NAMES) or 1)
        ticks = [float(place) for place in places] if names else _ticks(self.x_range)
        texts = [names[place] for place in places] if names else _tick_texts(ticks)
        grid = _joined(_line(self.x(tick), self.top, self.x(tick), self.bottom, "grid") for tick in ticks)
        shown = [_text(self.x(tick), self.bottom + 16, text, "middle") for tick, text in zip(ticks, texts, strict=True)]
        return _joined([grid, *shown, _text((self.left + self.right) / 2, self.bottom + 34, label, "middle")])

    def log_axis(self) -> Markup:
        """The numbers whose logarithms are the places."""
        shown = [(tick, f"{10**tick:.1e}" if tick < -3 else f"{10**tick:.2g}") for tick in _ticks(self.x_range)]
        grid = [_line(self.x(tick), self.top, self.x(tick), self.bottom, "grid") for tick, _ in shown]
        return _joined([*grid, *(_text(self.x(tick), self.bottom + 16, text, "middle") for tick, text in shown)])

    def y_axis(self) -> Markup:
        ticks = _ticks(self.y_range)
        grid = [_line(self.left, self.y(tick), self.right, self.y(tick), "grid") for tick in ticks]
        texts = [_text(self.left - 8, self.y(tick) + 4, text, "end") for tick, text in zip(ticks, _tick_texts(ticks), strict=True)]
        return _joined([*grid, *texts])

    def curve(self, points: Sequence[Point], css: str) -> Markup:
        """A joined line; an svg within the svg cuts off what lies outside of the rectangle."""
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        box = (self.left, self.top, self.right - self.left, self.bottom - self.top)
        clip = Markup('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">').format(*box)
        return clip + Markup('<polyline class="{}" points="{}"/></svg>').format(css, places)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    from_zero: bool = False,
    x_names: Sequence[str] = (),
    y_range: Range | None = None,
) -> Chart:
    """Curves over one horizontal axis.

    Numbers that are not finite are left out; a long curve is drawn as means of neighbouring points. The first twentieth
    of a curve may leave the chart: the first losses would dwarf all that follows.

    Args:
        x_names: what stands at 0, 1, 2 and so on, such as days.
        y_range: of the vertical axis; otherwise it follows from the points.
    """
    drawn = [replace(entry, points=_thinned(_finite(entry.points))) for entry in series]
    drawn = [entry for entry in drawn if entry.points]
    low, high = _range(y for entry in drawn for _, y in entry.points[len(entry.points) // 20 :])
    margin = 0.06 * (high - low)
    frame = _Frame(
        x_range=_range(range(len(x_names)) if x_names else (x for entry in drawn if entry.style != "level" for x, _ in entry.points)),
        y_range=y_range or (0.0 if from_zero else low - margin, high + margin),
        left=62,
        top=10,
        right=_WIDTH - (36 if x_names else 16),  # half a name
        bottom=210,
    )
    shapes = [frame.x_axis(x_label, x_names), frame.y_axis()]
    for entry in drawn:
        if entry.style == "level":
            level = frame.y(entry.points[0][1])
            shapes.append(_line(frame.left, level, frame.right, level, entry.css))
            continue
        shapes.append(frame.curve(entry.points, entry.css))
        if entry.style == "dots" or len(entry.points) == 1:
            for x, y in entry.points:
                place = x_names[round(x)] if x_names else f"{x_label} {x:,.0f}"
                shapes.append(_dot(frame.x(x), frame.y(y), entry.css, f"{entry.name}, {place}: {y:.5g}"))
    return Chart(title, _svg(title, frame.bottom + 42, shapes), drawn)


def scatter_chart(title: str, series: Sequence[Series], *, is_log: bool = False) -> Chart:
    """Dots that nothing joins.

    Args:
        is_log: whether the horizontal places are logarithms to the base of ten; the axis shows the numbers themselves.
    """
    points = [point for entry in series for point in _finite(entry.points)]
    ranges = [_range(places) for places in ([x for x, _ in points], [y for _, y in points])]
    x_range, y_range = ((low - 0.06 * (high - low), high + 0.06 * (high - low)) for low, high in ranges)
    frame = _Frame(x_range, y_range, left=62, top=10, right=_WIDTH - 16, bottom=210)
    axis = frame.log_axis() if is_log else frame.x_axis("")
    shapes = [axis, frame.y_axis()]
    for entry in series:
        for x, y in _finite(entry.points):
            shapes.append(_dot(frame.x(x), frame.y(y), entry.css, f"{entry.name}, {10**x if is_log else x:.5g}: {y:.5g}"))
    return Chart(title, _svg(title, frame.bottom + 26, shapes), series)


def reliability_chart(title: str, curve: ReliabilityCurve, color: int, before: ReliabilityCurve | None = None) -> Chart:
    """Mean label over mean prediction, against the diagonal, above the histogram of the predictions; before calibration too, if given."""
    high = max(*curve.predictions, *curve.labels, curve.histogram_edges[-1], *(before.predictions if before else ()))
    upper = _Frame((0, high), (0, high), left=62, top=10, right=_WIDTH - 16, bottom=290)
    lower = _Frame((0, high), (0, max(curve.histogram)), left=62, top=304, right=_WIDTH - 16, bottom=370)
    dots = Series("mean label", list(zip(curve.predictions, curve.labels, strict=True)), color, "dots")
    shapes = [upper.x_grid(), upper.y_axis(), upper.curve([(0, 0), (high, high)], "diagonal")]
    drawn = [(dots, curve.weights)]
    if before is not None:
        earlier = Series("before calibration", list(zip(before.predictions, before.labels, strict=True)), NEUTRAL, "dots")
        drawn.insert(0, (earlier, before.weights))
    for series, weights in drawn:
        shapes.append(upper.curve(series.points, series.css))
        for (prediction, label), weight in zip(series.points, weights, strict=True):
            note = f"predicted {prediction:.4f}, observed {label:.4f}, weight {weight:,.0f}"
            shapes.append(_dot(upper.x(prediction), upper.y(label), series.css, note))
    shapes.append(lower.x_axis("mean prediction, and how the predictions are spread"))
    for left, right, weight in zip(curve.histogram_edges[:-1], curve.histogram_edges[1:], curve.histogram, strict=True):
        shapes.append(
            _bar(lower.x(left), lower.y(weight), lower.x(right), lower.bottom, dots.css, f"{left:.4f} to {right:.4f}: {weight:,.0f}")
        )
    perfect = Series("calibrated", (), NEUTRAL, "level")
    return Chart(title, _svg(title, lower.bottom + 42, shapes), [*(series for series, _ in reversed(drawn)), perfect])


def dot_chart(title: str, rows: Sequence[str], series: Sequence[Series], x_range: Range) -> Chart:
    """Values by name: the points of a series are a value and the index of its row. A name may have several lines.

    A value beyond the range lies on its border. A level series stands upright at its first point.
    """
    dotted = [entry for entry in series if entry.style == "dots"]
    row_height = 14 + 8 * len(dotted)
    frame = _Frame(x_range, (0, 1), left=150, top=6, right=_WIDTH - 16, bottom=6 + row_height * len(rows))
    shapes = [frame.x_axis("")]
    for number, name in enumerate(rows):
        middle = frame.top + row_height * (number + 0.5)
        shapes.append(_line(frame.left, middle, frame.right, middle, "grid"))
        lines = name.split("\n")
        for step, line in enumerate(lines):
            shapes.append(_text(frame.left - 10, middle + 4 + 13 * (step - (len(lines) - 1) / 2), line, "end"))
    for entry in series:
        if entry.style == "level":
            place = frame.x(entry.points[0][0])
            shapes.append(_line(place, frame.top, place, frame.bottom, entry.css))
    for lane, entry in enumerate(dotted):
        for value, row in _finite(entry.points):
            place = frame.x(min(max(value, x_range[0]), x_range[1]))
            middle = frame.top + row_height * (row + 0.5) + 8 * (lane - (len(dotted) - 1) / 2)
            shapes.append(_dot(place, middle, entry.css, f"{rows[int(row)].replace(chr(10), ' ')}, {entry.name}: {value:.4f}"))
    return Chart(title, _svg(title, frame.bottom + 26, shapes), series)


def _svg(title: str, height: float, shapes: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(_WIDTH, height, title, _joined(shapes))


def _joined(shapes: Iterable[Markup]) -> Markup:
    return Markup("").join(shapes)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _dot(x: float, y: float, css: str, note: str) -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>').format(css, x, y, note)


def _bar(left: float, top: float, right: float, bottom: float, css: str, note: str) -> Markup:
    shape = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    return Markup(shape).format(css, left + 0.5, top, max(right - left - 1, 0.5), bottom - top, note)


def _text(x: float, y: float, text: str, anchor: Literal["middle", "end"]) -> Markup:
    short = text if len(text) <= _MAX_NAME or anchor == "middle" else f"{text[: _MAX_NAME - 1]}…"
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, short)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of groups of neighbours, so that a chart has no more points than one can see."""
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _range(values: Iterable[float]) -> Range:
    """From the smallest to the largest; around a single value, and from 0 to 1 when there is none."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)


def _share(value: float, bounds: Range) -> float:
    return (value - bounds[0]) / (bounds[1] - bounds[0])


def _ticks(bounds: Range) -> list[float]:
    """Four to seven multiples of 1, 2 or 5 times a power of ten."""
    rough = (bounds[1] - bounds[0]) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(bounds[0] / step - 1e-9), math.floor(bounds[1] / step + 1e-9) + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as tell the ticks apart, and thousands as k."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    unit, sign = (1_000_000, "M") if step >= 1_000_000 else (1_000, "k") if max(map(abs, ticks), default=0) >= 10_000 else (1, "")
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return [f"{tick / unit:.{decimals}f}{sign}" if tick else "0" for tick in ticks]
