"""Where rows come from: ``data`` of a config."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import PurePosixPath
from typing import Literal, Protocol, TypeVar

from mlenv.config.transforms import TRANSFORMS, TableTransformConfig, TransformConfig, WindowTransformConfig
from mlenv.errors import ConfigError, check_at_least
from mlenv.kinds import class_of, kind_field

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers(Protocol):
    """Those who read and decode rows ahead of the training."""

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
        """Results in the order of the items, a bounded number ahead of the one that is used. An error of the function is
        raised in its place. The function gives the same for the same item, and may be called for it again."""

    def close(self) -> None:
        """Ends what was started for them; they may be used again."""


class WorkersConfig(Protocol):
    """Where rows are read and decoded. It changes nothing about the rows, their order or their numbers."""

    @property
    def local_threads(self) -> int:
        """Threads of the trainer's own process that decode; computing leaves them cores where there are many."""

    def build(self) -> Workers:
        """Starts nothing before the first item."""


WORKERS: dict[str, type | str] = {
    "ray": "mlenv.datasets.ray_workers:RayConfig",
    "threads": "mlenv.datasets.workers:ThreadsConfig",
}
"""Workers by the name that ``data.workers.kind`` takes."""


def _threads() -> WorkersConfig:
    config: WorkersConfig = class_of("threads", WORKERS, "data.workers")()
    return config


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD; days are compared as texts, so no other form will do."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """A part of the data: a folder, and the days of it that count, both ends included."""

    path: str = ""
    """Folder or file under ``data.path``; empty for all of it."""
    start: str = ""
    """First day, YYYY-MM-DD, of the partitions ``date=...``; empty for the earliest."""
    end: str = ""
    """Last day; empty for the latest."""
    skip_dates: tuple[str, ...] = ()
    """Days between them that do not count, such as those of an outage."""

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if getattr(self, name) and not is_day(getattr(self, name)):
                raise ConfigError(name, expected="a day as YYYY-MM-DD", received=getattr(self, name))
        _check_days("skip_dates", self.skip_dates)
        if PurePosixPath(self.path).is_absolute() or ".." in PurePosixPath(self.path).parts:
            raise ConfigError("path", expected="a folder or file under data.path", received=self.path)
        if self.start and self.end and self.start > self.end:
            raise ConfigError("start", expected=f"a day not after the end {self.end}", received=self.start)

    def holds(self, day: str) -> bool:
        """Whether the rows of a day belong to the window; "" for rows without a day."""
        if not (self.start or self.end or self.skip_dates):
            return True
        return is_day(day) and (self.start or day) <= day <= (self.end or day) and day not in self.skip_dates

    def overlaps(self, other: WindowConfig) -> bool:
        """Whether both windows can hold the same day of the same file; a day that one of them skips still lies within it."""
        latest = "9999-12-31"
        mine, theirs = PurePosixPath(self.path), PurePosixPath(other.path)
        if not (mine.is_relative_to(theirs) or theirs.is_relative_to(mine)):
            return False
        return self.start <= (other.end or latest) and other.start <= (self.end or latest)

    def __str__(self) -> str:
        days = f"{self.start or 'earliest'} to {self.end or 'latest'}" if self.start or self.end else "all days"
        days += f" without {', '.join(self.skip_dates)}" if self.skip_dates else ""
        return f"{self.path}: {days}" if self.path else days


@dataclass(frozen=True, kw_only=True)
class DaysConfig:
    """Windows by their lengths, counted back from the last day: training, then validation, then as many days as the labels
    have to wait, then test. ``data.days`` is written instead of the windows, which ``compose`` puts in its place."""

    end_date: str
    """Last day of the test window, YYYY-MM-DD."""
    num_train_days: int
    """Days that are trained on."""
    num_test_days: int
    """Days that the model is measured on."""
    num_validation_days: int = 0
    """Days between both, for early stopping and calibration."""
    skip_dates: tuple[str, ...] = ()
    """Days that do not count; a window reaches further back instead."""

    def __post_init__(self) -> None:
        _check_days("end_date", (self.end_date,))
        _check_days("skip_dates", self.skip_dates)
        for name, least in (("num_train_days", 1), ("num_test_days", 1), ("num_validation_days", 0)):
            check_at_least(name, getattr(self, name), least)

    def windows(self, label_wait_days: int = 0) -> dict[str, WindowConfig]:
        """The windows by the names that they have under ``data``.

        Raises:
            ConfigError: they reach back beyond the first year.
        """
        try:
            return self._windows(label_wait_days)
        except OverflowError as error:
            raise ConfigError("num_train_days", expected="days that the calendar has", received=self.num_train_days) from error

    def _windows(self, label_wait_days: int) -> dict[str, WindowConfig]:
        last, windows = datetime.date.fromisoformat(self.end_date), {}
        for name, num_days in (("test", self.num_test_days), ("validation", self.num_validation_days), ("train", self.num_train_days)):
            days = list(islice(self._back_from(last), num_days))
            if days:
                skipped = tuple(sorted(day for day in self.skip_dates if days[-1].isoformat() < day < days[0].isoformat()))
                windows[name] = WindowConfig(start=days[-1].isoformat(), end=days[0].isoformat(), skip_dates=skipped)
                last = days[-1] - datetime.timedelta(days=1)
            if name == "test":
                last -= datetime.timedelta(days=label_wait_days)
        return windows

    def _back_from(self, day: datetime.date) -> Iterator[datetime.date]:
        for distance in count():
            earlier = day - datetime.timedelta(days=distance)
            if earlier.isoformat() not in self.skip_dates:
                yield earlier


def _check_days(name: str, days: Sequence[str]) -> None:
    for day in days:
        if not is_day(day):
            raise ConfigError(name, expected="a day as YYYY-MM-DD", received=day)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they are read."""

    path: str
    """Folder of Parquet files, local or as a URL that Arrow or fsspec knows."""
    train: WindowConfig
    """What the model learns from."""
    test: WindowConfig | None = None
    """Held-out rows, scored when training ends."""
    validation: WindowConfig | None = None
    """Held-out rows, scored every ``loop.evaluate_every_steps`` steps; calibrators are fitted on them."""
    label_wait_days: int = 0
    """Days until a label is known: at least as many lie between the training window and the test window."""
    allow_missing_days: bool = False
    """Whether a window may have days without rows that it does not skip."""
    transforms: tuple[TransformConfig | WindowTransformConfig | TableTransformConfig, ...] = kind_field(TRANSFORMS, default=())
    """What happens to the rows before the schema reads them, in order. The columns that they make act as columns of the files."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """skip passes over row groups that cannot be read; to know them before the first step the rows are read once more."""
    max_bad_row_groups: int = 0
    """Row groups of a window that may be passed over; a file without a readable footer counts as one."""
    content_hash: Literal["bytes", "footers"] = "bytes"
    """What ``dataset.json`` tells files by: all their bytes, or their Parquet footers alone where reading all would take too long."""
    batch_size: int = 4096
    """Examples per step and rank."""
    num_epochs: int = 1
    """Passes over the training window."""
    shuffle_rows: int = 262_144
    """Rows that are shuffled together, at least a row group; 0 reads in file order. Bounds the memory of the reader."""
    workers: WorkersConfig = kind_field(WORKERS, default_factory=_threads)
    """Who reads and decodes ahead of the training: threads, or the CPUs of a Ray cluster."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_epochs": 1, "shuffle_rows": 0, "label_wait_days": 0, "max_bad_row_groups": 0}
        for name, smallest in least.items():
            check_at_least(name, getattr(self, name), smallest)
        if not self.path:
            raise ConfigError("path", expected="a folder of Parquet files", received=self.path)
        if (self.on_bad_file == "skip") != (self.max_bad_row_groups > 0):
            expected = "a number > 0 with on_bad_file: skip, and 0 with fail"
            raise ConfigError("max_bad_row_groups", expected=expected, received=self.max_bad_row_groups)
