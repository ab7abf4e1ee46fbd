"""Comparing two ways of doing the same work, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a benchmark found."""

    title: str
    table: str
    """Markdown."""
    verdict: str
    """The claim with its figure."""
    reached: bool


def paired_seconds(ways: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, repetition by repetition, taking turns, so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm up
    for _ in range(repetitions):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(seconds: dict[str, list[float]], way: str, reference: str) -> float:
    """Speed of a way relative to the reference: the median over repetitions of the paired ratios; above 1 is faster."""
    return statistics.median(base / own for own, base in zip(seconds[way], seconds[reference], strict=True))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows under a header, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
