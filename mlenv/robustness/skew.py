"""Served feature values against logged ones: which features differ, how much, and what has probably happened to them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa

from mlenv.datasets.times import check_time, microseconds
from mlenv.errors import ConfigError, DataError, check_above, check_at_least, nearest
from mlenv.pages.page import write_whole
from mlenv.robustness.parquet_log import Ints, KeyColumn, ParquetLog, common_rows, read_keys
from mlenv.robustness.skew_guess import Guess, History, guess, guess_stale
from mlenv.robustness.value_distance import Compared, as_numbers, codes_of_values, compare_values, kind_of_values

SKEW_FILE, PAGE_FILE = "skew.json", "skew.html"

CONFIDENCE: Final = 0.95
_NO_FEATURES: Final = ("served_", "prediction_", "label_", "weight_")
"""How the columns begin that servers and ``mlenv predict`` add."""


@dataclass(frozen=True, kw_only=True)
class SkewOptions:
    key: tuple[KeyColumn, ...]
    """What tells rows apart: columns of the served log and of the other one."""
    features: tuple[str, ...] = ()
    """Columns that are compared; all that both logs have when empty."""
    entities: tuple[str, ...] = ()
    """Columns of the other log that tell users or items apart: a stale value is one that the same entity had before."""
    time: str = ""
    """Column of the other log with the time of the row."""
    limit: float = 0.01
    """Share of the rows that may differ."""
    tolerance: float = 1e-3
    """Difference of numbers that does not count, as a share of the usual difference of two rows."""
    seed: int = 0
    """Of the random rows that numbers are held against."""

    def __post_init__(self) -> None:
        if not self.key:
            raise ConfigError("--key", expected="columns that tell rows apart", received="none", fix="name them: --key COLUMN")
        if bool(self.entities) != bool(self.time):
            received = f"--entity {','.join(self.entities)} --time {self.time}"
            raise ConfigError("--entity", expected="both --entity and --time, or neither", received=received)
        check_at_least("--limit", self.limit, 0)
        check_above("--tolerance", self.tolerance, 0)


@dataclass(frozen=True, kw_only=True)
class FeatureSkew:
    """One feature on both sides."""

    feature: str
    kind: str
    differs: float
    """Share of the rows that differ beyond noise."""
    low: float
    """Of the interval of that share (Wilson)."""
    high: float
    score: float
    """Mean distance over all rows: 0 when all are the same, 1 when every row is as far off as a random other one."""
    relative: float | None
    """Of numbers: the median relative difference of the rows that differ."""
    guess: str
    """What has probably happened; empty when no row differs."""
    explained: float
    """Share of the rows that differ which the guess holds for."""
    is_above: bool
    """Whether more rows differ than may, by more than chance."""


@dataclass(frozen=True, kw_only=True)
class Skew:
    """All features of two logs, the most skewed first."""

    served: str
    logged: str
    num_common: int
    num_served: int
    num_logged: int
    features: Sequence[FeatureSkew]
    not_compared: Mapping[str, str]
    """Columns that only one side has, or that have nothing in common, and why."""
    limit: float

    @property
    def above(self) -> list[FeatureSkew]:
        """Features beyond the limit."""
        return [feature for feature in self.features if feature.is_above]


def find_skew(served: str, logged: str, options: SkewOptions) -> Skew:
    """Joins two logs by row key and compares them feature by feature; the memory that it takes is that of the keys and one feature.

    Raises:
        ConfigError: a log is not there, or a feature is in neither.
        DataError: a log lacks a column of the key, a key occurs twice, or no row is in both.
    """
    first, second = ParquetLog(served, "SERVED"), ParquetLog(logged, "LOGGED")
    keys = read_keys(first, [pair.first for pair in options.key]), read_keys(second, [pair.second for pair in options.key])
    second.check_columns([*options.entities, *filter(None, [options.time])], "a column of --entity and --time")
    features, not_compared = _features(first, second, options)
    rows = common_rows(*keys)
    histories = _histories(second, rows[1], options)
    found = [_feature_skew(feature, first, second, rows, histories, options) for feature in features]
    return Skew(
        served=served,
        logged=logged,
        num_common=len(rows[0]),
        num_served=first.num_rows,
        num_logged=second.num_rows,
        features=sorted(found, key=lambda one: (-one.score, one.feature)),
        not_compared=not_compared,
        limit=options.limit,
    )


def write_skew(skew: Skew, folder: Path) -> Path:
    """Writes ``skew.json`` and the page; gives back the page's path."""
    from mlenv.robustness.skew_page import render_skew

    folder.mkdir(exist_ok=True)
    write_whole(json.dumps(asdict(skew), indent=1), folder / SKEW_FILE)
    write_whole(render_skew(skew), folder / PAGE_FILE)
    return folder / PAGE_FILE


def wilson(count: int, total: int) -> tuple[float, float]:
    """The interval of a share.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _features(served: ParquetLog, logged: ParquetLog, options: SkewOptions) -> tuple[list[str], dict[str, str]]:
    """What is compared, and what cannot be."""
    for feature in options.features:
        if feature not in served.columns or feature not in logged.columns:
            lacking = served if feature not in served.columns else logged
            fix = nearest(feature, lacking.columns)
            raise ConfigError("--features", expected=f"columns of both logs; {lacking.path} lacks one", received=feature, fix=fix)
    own = {name for pair in options.key for name in (pair.first, pair.second)} | {options.time}
    names = options.features or [
        name for name in dict.fromkeys([*served.columns, *logged.columns]) if name not in own and not name.startswith(_NO_FEATURES)
    ]
    features, not_compared = [], {}
    for name in names:
        kinds = [log.columns.get(name) for log in (served, logged)]
        if kinds[0] is None or kinds[1] is None:
            not_compared[name] = f"not in {served.path if kinds[0] is None else logged.path}"
        elif kind_of_values(kinds[0], kinds[1]) is None:
            not_compared[name] = f"{kinds[0]} when served, {kinds[1]} in the log"
        else:
            features.append(name)
    if not features:
        raise DataError(f"{served.path} and {logged.path}", expected="features that both have", received=dict(not_compared))
    return features, not_compared


def _histories(logged: ParquetLog, rows: Ints, options: SkewOptions) -> list[History]:
    if not options.entities:
        return []
    place = f"{logged.place} {logged.path}, column {options.time!r}"
    check_time(place, options.time, logged.columns[options.time])
    times, known = microseconds(logged.read([options.time]).column(0).combine_chunks(), place)
    histories = []
    for name in options.entities:
        entities = pl.Series(pl.from_arrow(logged.read([name]).column(0))).cast(pl.String)
        entities = pl.select(pl.when(pl.Series(known)).then(entities)).to_series()  # without a time nothing is earlier
        histories.append(History(name, entities, times, rows))
    return histories


def _feature_skew(
    feature: str, served: ParquetLog, logged: ParquetLog, rows: tuple[Ints, Ints], histories: Sequence[History], options: SkewOptions
) -> FeatureSkew:
    all_logged = logged.read([feature]).column(0)
    first, second = served.read([feature]).column(0).take(pa.array(rows[0])), all_logged.take(pa.array(rows[1]))
    compared = compare_values(first, second, options.tolerance, options.seed)
    low, high = wilson(int(compared.differs.sum()), len(rows[0]))
    found = guess(first, second, compared.differs, compared.kind, _stale(feature, first, all_logged, compared, histories, options.seed))
    return FeatureSkew(
        feature=feature,
        kind=compared.kind,
        differs=float(compared.differs.mean()),
        low=low,
        high=high,
        score=float(compared.distances.mean()),
        relative=_relative(first, second, compared),
        guess=found.words,
        explained=found.share,
        is_above=low > options.limit,
    )


def _stale(
    feature: str, served: pa.ChunkedArray, logged: pa.ChunkedArray, compared: Compared, histories: Sequence[History], seed: int
) -> Guess | None:
    """The best of the entities' explanations."""
    if not compared.differs.any():
        return None
    # The log's type on both sides, so that equal values have equal codes.
    codes = [codes_of_values(values, compared.kind) for values in (_as_type_of(served, logged), logged)]
    guesses = [guess_stale(codes[0], codes[1], compared.differs, one, seed) for one in histories if one.entity != feature]
    return max((one for one in guesses if one is not None), key=lambda one: one.share, default=None)


def _as_type_of(values: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return values.cast(other.type, safe=False)
    except pa.ArrowException:
        return values


def _relative(served: pa.ChunkedArray, logged: pa.ChunkedArray, compared: Compared) -> float | None:
    if compared.kind != "number" or not compared.differs.any():
        return None
    first, second = (as_numbers(values)[compared.differs] for values in (served, logged))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.abs(first - second) / np.abs(second)
    finite = shares[np.isfinite(shares)]
    return float(np.median(finite)) if len(finite) else None
