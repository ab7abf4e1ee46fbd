"""The report shows the figures that it was given, says nothing of parts that are empty, and needs nothing but itself."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlenv.loops.metrics import ReliabilityCurve
from mlenv.pages.report import Report, format_figure, render_report, write_report

EMPTY = Report(
    title="run",
    facts={},
    tasks=("click",),
    metrics={},
    best={},
    reliability={},
    uncalibrated={},
    reliability_before={},
    history=[],
    coverage={},
    artifacts={},
)
FULL = Report(
    title="ads demo",
    facts={"train window": "2026-01-01 to 2026-01-07", "schema fingerprint": "0123456789ab"},
    tasks=("click", "conversion"),
    metrics={
        "click/auc": 0.765432,
        "click/normalized_entropy": 0.87654,
        "click/calibration": 1.0123,
        "click/base_rate": 0.2345,
        "click/examples": 123_456.0,
        "conversion/auc": math.nan,
        "conversion/normalized_entropy": math.nan,
        "conversion/calibration": math.inf,
        "conversion/base_rate": 0.00042,
        "conversion/examples": 10.0,
        **{f"click/{metric}@page=a/b=c": value for metric, value in {"auc": 0.7, "calibration": 1.2, "examples": 5.0}.items()},
        **{f"click/{metric}@page=null": value for metric, value in {"auc": 0.6, "calibration": 0.95, "examples": 9.0}.items()},
    },
    best={"click/auc": 0.7811, "click/normalized_entropy": 0.8512, "conversion/auc": math.nan, "click/examples": 123_456.0},
    reliability={
        "click": ReliabilityCurve((0.1, 0.4), (0.2, 0.4), (10.0, 10.0), (0.0, 0.25, 0.5), (12.0, 8.0)),
        "conversion": ReliabilityCurve(),
    },
    uncalibrated={},
    reliability_before={},
    history=[
        {
            "step": 10,
            "time": 1.0,
            "examples": 100,
            "train/click/loss": 0.6,
            "train/conversion/loss": math.nan,
            "train/examples_per_second": 1_000.0,
        },
        {"step": 20, "time": 2.0, "examples": 200, "train/click/loss": 0.5, "train/examples_per_second": 2_000.0},
        {"step": 20, "time": 3.0, "validation/click/auc": 0.71, "validation/click/log_loss": 0.55},
        {"step": 20, "time": 4.0, "test/click/auc": 0.7},
    ],
    coverage={"user_id": 1.0, "past_clicks": 0.25, "price": 0.875},
    artifacts={"predictions": "predictions/part-0.parquet"},
)


class Page(HTMLParser):
    """Tables as rows of texts, headings, words of drawings, and every attribute value."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.setdefault(self._open[-1], []).append(data.strip())
            if "tr" in self._open:
                self.tables[-1][-1][-1] += (" " if self._open[-1] == "small" else "") + data.strip()


def test_the_summary_shows_the_figures_that_it_was_given() -> None:
    header, click, conversion = Page(render_report(FULL)).tables[0]
    assert header == ["Task", "AUC", "Normalized entropy", "Calibration", "Base rate", "Examples"]
    assert click == ["click", "0.7654 best 0.7811", "0.8765 best 0.8512", "1.012", "23.450%", "123,456"]
    assert conversion == ["conversion", "—", "—", "∞", "0.042%", "10"]


def test_the_segments_are_a_table_and_charts_with_the_largest_value_first() -> None:
    page = Page(render_report(FULL))
    assert page.tables[1][0][:3] == ["page", "Task", "AUC"]
    assert [row[0] for row in page.tables[1][1:]] == ["null", "", "a/b=c", ""]
    assert page.tables[1][3] == ["a/b=c", "click", "0.7000", "—", "1.200", "—", "5"]
    assert {"Calibration by page", "AUC by page"} <= set(page.texts["b"])
    assert "a/b=c" in page.texts["text"]


def test_what_calibration_changed_stands_under_the_figures_and_in_the_diagram() -> None:
    before = {"click/auc": 0.1, "click/calibration": 1.5, "click/normalized_entropy": 0.99, "click/calibration@page=null": 2.5}
    curve = ReliabilityCurve((0.3, 0.9), (0.2, 0.4), (10.0, 10.0), (0.0, 0.5, 1.0), (12.0, 8.0))
    page = Page(render_report(replace(FULL, uncalibrated=before, reliability_before={"click": curve})))
    assert page.tables[0][1] == [
        "click",
        "0.7654 best 0.7811",
        "0.8765 before 0.9900 best 0.8512",
        "1.012 before 1.500",
        "23.450%",
        "123,456",
    ]
    assert page.tables[1][1][:5] == ["null", "click", "0.6000", "—", "0.950 before 2.500"]
    assert "before calibration" in page.texts["span"]
    assert "predicted 0.9000, observed 0.4000, weight 10" in page.texts["title"]
    assert "before calibration" not in Page(render_report(FULL)).texts["span"]


def test_many_segment_values_are_all_in_the_table_and_the_largest_in_the_charts() -> None:
    sizes = {f"click/examples@item={number:02d}": 100.0 - number for number in range(30)}
    page = Page(render_report(replace(EMPTY, metrics={"click/examples": 2_500.0, "click/auc": 0.7, **sizes})))
    assert len(page.tables[1]) == 31
    assert "The charts show the 20 largest of 30 values." in page.texts["p"]
    assert "19" in page.texts["text"]
    assert "20" not in page.texts["text"]


def test_every_part_is_there() -> None:
    page = Page(render_report(FULL))
    assert page.texts["h1"] == ["ads demo"]
    assert page.texts["h2"] == [
        "Run",
        "Quality on held-out data",
        "Learning curves",
        "Reliability",
        "Segments",
        "Feature coverage",
        "Throughput",
        "Files",
    ]
    assert page.texts["dd"] == [*FULL.facts.values(), *FULL.artifacts.values()]
    assert {"Log loss: click", "Validation: AUC"} <= set(page.texts["b"])
    assert "Log loss: conversion" not in page.texts["b"]


def test_coverage_is_sorted_with_the_emptiest_first() -> None:
    coverage = render_report(FULL).partition('class="coverage"')[2]
    assert re.findall(r'title="(\w+)"', coverage)[:3] == ["past_clicks", "price", "user_id"]
    assert re.findall(r'style="width: ([\d.]+)%".*?<b>([\d.]+)%', coverage) == [("25.0", "25.0"), ("87.5", "87.5"), ("100.0", "100.0")]


def test_empty_parts_are_not_mentioned() -> None:
    page = Page(render_report(EMPTY))
    assert page.texts["h2"] == ["Quality on held-out data"]
    assert "svg" not in page.tags


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_numbers_break_nothing(value: float) -> None:
    metrics = dict.fromkeys(FULL.metrics, value) | {"click/examples@page=null": 0.0}
    page = render_report(replace(FULL, metrics=metrics, best=dict.fromkeys(FULL.best, value)))
    assert not re.search(r"\bnan\b", page)
    Page(page)


def test_the_page_needs_nothing_from_anywhere() -> None:
    page = render_report(FULL)
    assert not re.search(r"https?:|//\w|url\(|@import", page)
    assert not {"script", "link", "img", "iframe", "object"} & set(Page(page).tags)


def test_names_from_data_are_text_and_nothing_else() -> None:
    evil = "\"'><script>alert(1)</script>&{{ 1 }}"
    page = render_report(
        Report(
            title=evil,
            facts={evil: evil},
            tasks=(evil,),
            metrics={f"{evil}/{metric}{end}": 1.0 for metric in ("auc", "calibration", "examples") for end in ("", f"@{evil}={evil}")},
            best={f"{evil}/auc": 0.9},
            reliability={evil: FULL.reliability["click"]},
            uncalibrated={f"{evil}/calibration": 2.0},
            reliability_before={evil: FULL.reliability["click"]},
            history=[{"step": 1, f"train/{evil}/loss": 1.0, f"validation/{evil}/auc": 0.5}],
            coverage={evil: 0.5},
            artifacts={evil: evil},
        )
    )
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.texts["h1"] == [evil]
    assert parsed.texts["dd"] == [evil, evil]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("auc", 0.76543, "0.7654"),
        ("auc", math.nan, "—"),
        ("calibration", -math.inf, "-∞"),
        ("calibration", 1.0, "1.000"),
        ("base_rate", 0.005, "0.500%"),
        ("examples", 1_234_567.0, "1,234,567"),
    ],
)
def test_figures_have_one_form(metric: str, value: float, text: str) -> None:
    assert format_figure(metric, value) == text


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(FULL, path)
    assert path.read_text(encoding="utf-8") == render_report(FULL)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(EMPTY, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert "ads demo" in path.read_text(encoding="utf-8")
