"""What the drawings show: places, ticks and names; and that odd numbers do not break them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from mlenv.loops.metrics import ReliabilityCurve
from mlenv.pages.charts import Chart, Series, dot_chart, line_chart, reliability_chart, scatter_chart


def shapes(chart: Chart, tag: str) -> Iterator[ElementTree.Element]:
    return ElementTree.fromstring(chart.svg).iter(tag)


def texts(chart: Chart) -> list[str | None]:
    return [text.text for text in shapes(chart, "text")]


def curve_of(chart: Chart, number: int = 0) -> list[tuple[float, float]]:
    points = list(shapes(chart, "polyline"))[number].attrib["points"].split()
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points)]


def test_a_curve_is_drawn_to_scale() -> None:
    chart = line_chart("loss", [Series("training", [(0, 1), (50, 3), (100, 2)], 0)], "step")
    (x0, y0), (x1, y1), (x2, y2) = curve_of(chart)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 > y2 > y1
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    assert {"0", "20", "100", "step"} <= set(texts(chart))
    assert [series.name for series in chart.legend] == ["training"]


def test_numbers_that_are_not_finite_and_empty_series_are_left_out() -> None:
    chart = line_chart("x", [Series("a", [(1, math.nan), (2, 1), (3, math.inf), (4, 2)], 0), Series("b", [], 1)], "step")
    assert len(curve_of(chart)) == 2
    assert [series.name for series in chart.legend] == ["a"]


def test_the_first_values_do_not_set_the_scale() -> None:
    points = [(step, 1000.0 if step < 4 else 1 + step % 2) for step in range(100)]
    heights = [y for _, y in curve_of(line_chart("loss", [Series("training", points, 0)], "step"))]
    assert heights[0] < 0 < heights[10] - heights[11]


def test_a_long_curve_is_averaged_in_groups() -> None:
    points = curve_of(line_chart("x", [Series("a", [(step, step % 10) for step in range(100_000)], 0)], "step"))
    assert len(points) == 200
    assert max(y for _, y in points) - min(y for _, y in points) < 1


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-9, 12_345_678.0])
def test_a_single_point_has_axes_and_a_dot(value: float) -> None:
    chart = line_chart("x", [Series("a", [(10, value)], 0)], "step")
    assert len(list(shapes(chart, "circle"))) == 1
    assert len(texts(chart)) >= 6


def test_levels_lie_on_the_scale_of_the_curves() -> None:
    chart = line_chart("auc", [Series("click", [(0, 0.6), (10, 0.7)], 0, "dots"), Series("best", [(0, 0.7)], 0, "level")], "step")
    (level,) = (line for line in shapes(chart, "line") if line.attrib["class"].startswith("level"))
    assert float(level.attrib["y1"]) == pytest.approx(curve_of(chart)[1][1])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 30_000, ["0", "5k", "10k", "15k", "20k", "25k", "30k"]),
        (0, 6_000_000, ["0", "1M", "2M", "3M", "4M", "5M", "6M"]),
        (0, 3_000, ["0", "500", "1000", "1500", "2000", "2500", "3000"]),
        (0.000_1, 0.000_4, ["0.00010", "0.00015", "0.00020", "0.00025", "0.00030", "0.00035", "0.00040"]),
    ],
)
def test_ticks_are_round_and_differ(low: float, high: float, expected: list[str]) -> None:
    assert texts(line_chart("x", [Series("a", [(low, 1), (high, 2)], 0)], "step"))[: len(expected)] == expected


def test_reliability_has_a_dot_per_bin_and_a_bar_per_cell() -> None:
    curve = ReliabilityCurve((0.1, 0.4), (0.2, 0.4), (10.0, 10.0), (0.0, 0.25, 0.5), (12.0, 8.0))
    chart = reliability_chart("click", curve, 0)
    diagonal, dots = curve_of(chart, 0), curve_of(chart, 1)
    assert dots[0][1] < _on(diagonal, dots[0][0])  # more positives than predicted: above the diagonal
    assert dots[1][1] == pytest.approx(_on(diagonal, dots[1][0]), abs=0.1)
    heights = [float(bar.attrib["height"]) for bar in shapes(chart, "rect")]
    assert heights[1] / heights[0] == pytest.approx(8 / 12, abs=0.01)


def _on(line: list[tuple[float, float]], x: float) -> float:
    (x0, y0), (x1, y1) = line
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def test_dots_stand_in_their_rows_and_stay_inside() -> None:
    chart = dot_chart("auc", ["feed", "search"], [Series("click", [(0.5, 0), (7.0, 1), (math.nan, 1)], 0, "dots")], (0.0, 1.0))
    left, right = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in shapes(chart, "circle")]
    names = {text.text: float(text.attrib["y"]) for text in shapes(chart, "text")}
    assert left[1] == pytest.approx(names["feed"] - 4)
    assert right[1] == pytest.approx(names["search"] - 4)
    edge = max(float(line.attrib["x1"]) for line in shapes(chart, "line"))
    assert right[0] == edge


def test_names_are_escaped_and_shortened() -> None:
    name = '<b a="1">&' + "x" * 40
    chart = dot_chart(name, [name], [Series(name, [(0.5, 0)], 0, "dots")], (0.0, 1.0))
    assert ElementTree.fromstring(chart.svg).attrib["aria-label"] == name
    assert f"{name[:19]}…" in texts(chart)
    assert not re.search("<b ", chart.svg)


def test_a_name_may_have_two_lines() -> None:
    chart = dot_chart("auc", ["click, user_degree\nfull_active", "click"], [Series("gain", [(0.5, 0)], 0, "dots")], (0.0, 1.0))
    places = {text.text: float(text.attrib["y"]) for text in shapes(chart, "text")}
    assert places["full_active"] - places["click, user_degree"] == pytest.approx(13, abs=0.11)
    assert (places["full_active"] + places["click, user_degree"]) / 2 == pytest.approx(places["click"] - 22, abs=0.11)
    assert "<title>click, user_degree full_active, gain: 0.5000</title>" in chart.svg


def test_names_stand_on_the_horizontal_axis_as_many_as_there_is_room_for() -> None:
    days = [f"2026-01-{number:02d}" for number in range(1, 13)]
    series = Series("coverage", [(float(place), 0.9) for place in range(12)], 0, "dots")
    svg = line_chart("Coverage by day", [series], "", x_names=days, y_range=(0.5, 1.0)).svg
    assert re.findall(r">(2026-01-\d\d)</text>", svg) == ["2026-01-01", "2026-01-04", "2026-01-07", "2026-01-10"]
    assert "<title>coverage, 2026-01-12: 0.9</title>" in svg
    heights = {float(height) for height in re.findall(r'cy="([\d.]+)"', svg)}
    assert heights == {210 - 0.8 * 200}


def test_dots_over_logarithms_stand_at_the_numbers_themselves() -> None:
    dots = Series("trials", [(-4, 1.0), (-3, 2.0), (-2, 3.0), (math.nan, 2.0)], 0, "dots")
    chart = scatter_chart("learning rate", [dots], is_log=True)
    places = [float(circle.attrib["cx"]) for circle in shapes(chart, "circle")]
    assert len(places) == 3
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.11)
    assert {"1.0e-04", "0.001", "0.01"} <= set(texts(chart))
    assert "trials, 0.001: 2" in chart.svg
