"""What a step costs when tables, features, batches and ranks grow."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from benchmarks.training_turns import Contender, median_ratio, rates_in_turn

REPETITIONS, SECONDS = 5, 1.0
TARGET = 2.0
"""Most that a step may grow when tables become 100 times as large: only the rows that are looked up should count."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A training whose steps are timed."""

    engine: str = "torchrec"
    features: int = 26
    rows: int = 10_000
    """Of each table; every feature has one."""
    batch: int = 4096
    """Of each rank."""
    ranks: int = 1
    cores: int = 2


AXES: dict[str, list[Size]] = {
    "rows of each of 26 tables": [Size(rows=rows) for rows in (4_000, 10_000, 100_000, 400_000)],
    "rows of each of 26 tables, engine torch": [Size(engine="torch", rows=rows) for rows in (4_000, 10_000, 100_000, 400_000)],
    "features, a table of 10,000 rows each": [Size(features=features) for features in (13, 26, 52, 104)],
    "examples in a batch": [Size(batch=batch) for batch in (512, 1024, 4096, 16_384)],
    "ranks, with 4,096 examples each": [Size(cores=1), Size(), Size(ranks=2)],
}


def measure(folder: Path) -> Result:
    tables, growth = [], 0.0
    for name, sizes in AXES.items():
        ways = {_label(size, sizes): size for size in sizes}
        rates = _rates(folder / name, ways)
        first, last = next(iter(ways)), list(ways)[-1]
        growth = growth or median_ratio(rates, first, last)
        tables.append(
            markdown_table([name, "a step", "examples/s", "of the first"], [_row(way, size, rates, first) for way, size in ways.items()])
        )
    return Result(
        "A step when tables, features, batches and ranks grow: 16 wide tables, zipf ids, MLP 64-32, no reading",
        "\n\n".join(tables),
        f"With torchrec a step costs {growth:.2f} times as much on tables 100 times as large (target: at most {TARGET}).",
        growth <= TARGET,
    )


def _rates(folder: Path, ways: Mapping[str, Size]) -> dict[str, list[float]]:
    """Steps/s of each way, in turn."""
    folder.mkdir()
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        contenders = {}
        for way, size in ways.items():
            numbers = map(str, (size.features, size.rows, size.batch, size.ranks))
            command = ["-m", "benchmarks.scaling_step", size.engine, *numbers, str(folder / way)]
            contender = Contender(command, {"OMP_WAIT_POLICY": "PASSIVE"}, folder / f"{way}.log", set(cores[: size.cores]))
            contenders[way] = stack.enter_context(contender)
        return rates_in_turn(contenders, REPETITIONS, SECONDS, batch_size=1)  # of steps, not of rows


def _label(size: Size, sizes: list[Size]) -> str:
    """What is different about a size."""
    if len({(other.ranks, other.cores) for other in sizes}) > 1:
        return f"{size.ranks}, on {size.cores} core{'s' if size.cores > 1 else ''}"
    return next(f"{getattr(size, name):,}" for name in ("rows", "features", "batch") if len({getattr(other, name) for other in sizes}) > 1)


def _row(way: str, size: Size, rates: Mapping[str, list[float]], first: str) -> list[str]:
    per_second = statistics.median(rates[way])
    cost = median_ratio(rates, first, way)
    return [way, f"{1e3 / per_second:.1f} ms", f"{per_second * size.batch * size.ranks / 1e3:.0f} k", f"{cost:.2f}"]
