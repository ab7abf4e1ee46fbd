"""Reads logged decisions from Parquet files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from mlenv.errors import ConfigError, DataError
from mlenv.offline.policy import Integers, LoggedRows, choices


@dataclass(frozen=True, kw_only=True)
class PolicyColumns:
    """Names of columns. Either each row is a decision and ``policy`` holds the other policy's probability of what was shown,
    or each row is a candidate, ``shown`` marks what was shown, and ``score`` with ``chooses`` make the other policy."""

    reward: str
    propensity: str
    policy: str = ""
    request: str = ""
    """Rows of one request or user vary together; the candidates of a decision share it."""
    shown: str = ""
    score: str = ""
    chooses: str = "greedy:0"
    """``greedy:SHARE`` or ``softmax:TEMPERATURE``."""
    expected: str = ""
    """A model's reward: of each candidate; of what was shown, where rows are decisions."""
    expected_policy: str = ""
    """A model's reward of what the other policy shows, where rows are decisions."""

    def __post_init__(self) -> None:
        if bool(self.policy) == bool(self.score):
            fix = "name the column of its probabilities, or that of a model's scores of all candidates"
            raise ConfigError("--policy", expected="it or --score", received=f"{self.policy!r} and {self.score!r}", fix=fix)
        if self.score and not (self.request and self.shown):
            raise ConfigError("--score", expected="--request and --shown beside it", received=f"{self.request!r} and {self.shown!r}")
        if self.policy and bool(self.expected) != bool(self.expected_policy):
            raise ConfigError("--expected", expected="--expected-policy beside it", received=self.expected_policy)
        _ = self.way

    @property
    def way(self) -> tuple[str, float]:
        """How a policy of scores chooses."""
        kind, _, amount = self.chooses.partition(":")
        try:
            number = float(amount)
        except ValueError:
            number = -1.0
        if kind not in ("greedy", "softmax") or not (0 <= number <= 1 if kind == "greedy" else number > 0):
            expected = "greedy:SHARE from 0 to 1, or softmax:TEMPERATURE above 0"
            raise ConfigError("--chooses", expected=expected, received=self.chooses)
        return kind, number

    @property
    def names(self) -> list[str]:
        """All columns that are named."""
        wanted = (self.reward, self.propensity, self.policy, self.request, self.shown, self.score, self.expected, self.expected_policy)
        return list(dict.fromkeys(name for name in wanted if name))


def read_log(path: Path, columns: PolicyColumns) -> LoggedRows:
    """
    Raises:
        DataError: there is no file, a column is missing or not a number, or a request does not show one candidate.
    """
    frame = _read(path, columns.names)
    numbers = _numbers(frame.get_column(columns.request)) if columns.request else np.arange(len(frame))
    if columns.policy:
        return LoggedRows(
            rewards=_floats(frame, columns.reward),
            propensities=_floats(frame, columns.propensity),
            targets=_floats(frame, columns.policy),
            clusters=numbers,
            expected_shown=_floats(frame, columns.expected) if columns.expected else None,
            expected_policy=_floats(frame, columns.expected_policy) if columns.expected_policy else None,
        )
    shown = frame.get_column(columns.shown).cast(pl.Boolean).fill_null(value=False).to_numpy()
    per_request = np.bincount(numbers, shown)
    if wrong := np.flatnonzero(per_request != 1).tolist():
        received = f"{per_request[wrong[0]]:.0f} in {len(wrong):,} of {len(per_request):,} requests or other numbers"
        fix = "keep a row for each candidate, and mark the one that was shown; a page of several is several decisions"
        raise DataError(f"{path}, column {columns.shown!r}", expected="one row that was shown of each request", received=received, fix=fix)
    chances = choices(_floats(frame, columns.score), numbers, *columns.way)
    of_candidates = _floats(frame, columns.expected) if columns.expected else None
    order = np.flatnonzero(shown)[np.argsort(numbers[shown], kind="stable")]
    return LoggedRows(
        rewards=_floats(frame, columns.reward)[order],
        propensities=_floats(frame, columns.propensity)[order],
        targets=chances[order],
        clusters=np.arange(len(order)),
        expected_shown=None if of_candidates is None else of_candidates[order],
        expected_policy=None if of_candidates is None else np.bincount(numbers, chances * of_candidates).astype(np.float64),
    )


def _read(path: Path, names: list[str]) -> pl.DataFrame:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(str(path), expected="Parquet files", received="none", fix="name a file or a folder of them")
    try:
        frame = pl.scan_parquet(files, hive_partitioning=path.is_dir())
        known = frame.collect_schema().names()
        for name in names:
            if name not in known:
                raise DataError(f"{path}, column {name!r}", expected="a column of the log", received=known)
        return frame.select(names).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(str(path), expected="Parquet files", received=str(error), fix="name a file or a folder of them") from error


def _floats(frame: pl.DataFrame, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    try:
        return frame.get_column(name).cast(pl.Float64).fill_null(float("nan")).to_numpy()
    except pl.exceptions.PolarsError as error:
        fix = "write it as a number"
        raise DataError(f"column {name!r}", expected="numbers", received=str(frame.schema[name]), fix=fix) from error


def _numbers(column: pl.Series) -> Integers:
    numbers: Integers = column.rank("dense").fill_null(0).to_numpy().astype(np.int64)
    numbers -= numbers.min()
    return numbers
