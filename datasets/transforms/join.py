"""Adds columns of a table that lies beside the data: features of users and items, a teacher's predictions, a back-filled feature."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa

from mlenv.datasets.disk_lookup import DiskLookup, open_lookup
from mlenv.datasets.join_report import Matches, count_ages, report
from mlenv.datasets.lookup import HASH, TIME, DuplicateKeyError, Integers, Lookup
from mlenv.datasets.side_table import SideTable, absolute
from mlenv.datasets.table_keys import as_text, check_keys, check_new, check_table_key, hash_keys
from mlenv.datasets.times import check_duration, check_time, check_time_zone, duration, microseconds, to_utc
from mlenv.datasets.transforms.expressions import require_columns, with_column, with_field
from mlenv.errors import ConfigError, DataError, TableError, check_at_least

logger = logging.getLogger(__name__)

_CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Gives each row the columns of the table's row with the same key; null where there is none. A null key finds nothing.

    With ``valid_from`` a key may have many rows, and an event gets the latest that was *known* at its time: ``delay`` or
    ``ready_at`` say how long after ``valid_from`` that was. Of rows equally late the last counts, files in the order of their
    names. Times count in microseconds: an event's is rounded down, a row's up.

    The table is held by each process that decodes: in memory, or sorted in temporary files. Keys are told apart by a hash of 64
    bits, which is exact for a single column of integers; else the chance that one of ten million keys finds the row of another
    among ten million is 0.0005 %.
    """

    table: str
    """Folder or file of Parquet, local or as a URL that Arrow or fsspec knows."""
    key: tuple[str, ...]
    """Columns of the data that make up the key."""
    columns: tuple[str, ...]
    """Columns of the table to add."""
    table_key: tuple[str, ...] = ()
    """The columns of ``key`` as the table names them, in the same order; empty for the same names."""
    rename: dict[str, str] = field(default_factory=dict)
    """Columns of the table, and what to call them in the data."""
    replace: tuple[str, ...] = ()
    """Columns of the data whose place added ones may take."""
    valid_from: str = ""
    """Column of the table: since when a row holds, a timestamp (UTC unless it has a zone), or a day as a date or a text."""
    as_of: str = ""
    """Time of the event in the data; ``schema.event_time`` when empty."""
    delay: str = ""
    """Time until a row is known, such as 90m, 3h or 1d12h."""
    ready_at: str = ""
    """HH:MM at which the rows of a day are known, on the next day; instead of ``delay``."""
    time_zone: str = "UTC"
    """Whose days and whose clock ``ready_at`` and days in ``valid_from`` mean."""
    max_age: str = ""
    """Longest time between ``valid_from`` and the event; an older row counts as none."""
    min_match_rate: float = 0.0
    """Share of a window's rows that must find a row, or nothing is trained."""
    memory_rows: int = 10_000_000
    """Largest table that is held in memory; a larger one is sorted about this many rows at once, and looked up in files under TMPDIR."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("table", "columns"):
            if not getattr(self, name):
                raise ConfigError(name, expected="a table" if name == "table" else "at least one column", received=getattr(self, name))
        check_table_key(self.key, self.table_key)
        for name in self.rename.keys() - set(self.columns):
            raise ConfigError(f"rename.{name}", expected=f"one of columns, {list(self.columns)}", received=name)
        if len(set(self.writes)) < len(self.columns):
            raise ConfigError("columns", expected="columns with names of their own", received=list(self.writes))
        for name in set(self.replace) - set(self.writes):
            raise ConfigError("replace", expected=f"columns that the join writes, {list(self.writes)}", received=name)
        for name in ("as_of", "delay", "ready_at", "max_age"):
            if getattr(self, name) and not self.valid_from:
                raise ConfigError(name, expected="nothing without valid_from", received=getattr(self, name))
        if self.delay and self.ready_at:
            raise ConfigError("ready_at", expected="nothing beside delay", received=self.ready_at)
        if self.ready_at and not _CLOCK.fullmatch(self.ready_at):
            raise ConfigError("ready_at", expected="a time of day as HH:MM", received=self.ready_at)
        for name in ("delay", "max_age"):
            check_duration(name, getattr(self, name))
        if not 0 <= self.min_match_rate <= 1:
            raise ConfigError("min_match_rate", expected="a number in [0, 1]", received=self.min_match_rate)
        check_at_least("memory_rows", self.memory_rows, 1)
        check_time_zone(self.time_zone)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(self.rename.get(name, name) for name in self.columns)

    def open(self, event_time: str) -> Join:
        """The join as it acts, its table opened. Windows that join the same share what they hold.

        Args:
            event_time: what ``as_of`` is when it is empty.

        Raises:
            ConfigError, DataError: see SideTable; or there is no event time.
        """
        as_of = (self.as_of or event_time) if self.valid_from else ""
        if self.valid_from and not as_of:
            raise ConfigError("as_of", expected="the time of the event, here or in schema.event_time", received="")
        join = Join(self, as_of)
        return _OPENED.setdefault(f"{self!r} {as_of} {join.fingerprint} {join.table.modified}", join)


class Join:
    """A join whose table is opened: a transform, and what measures it.

    Raises:
        ConfigError, DataError: see SideTable.
    """

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __init__(self, config: JoinConfig, as_of: str) -> None:
        self.config, self._as_of = config, as_of
        keys = config.table_key or config.key
        valid = {config.valid_from: "valid_from"} if config.valid_from else {}
        self._table_key = keys
        self.table = SideTable(
            config.table, dict.fromkeys(config.columns, "columns") | valid | dict.fromkeys(keys, "table_key" if config.table_key else "key")
        )
        self.table.require_rows("write its rows first, or take the join out")
        if config.valid_from:
            check_time("valid_from", config.valid_from, self.table.schema.field(config.valid_from).type, text_days=True)
        self._lock = threading.Lock()
        self._held: Lookup | DiskLookup | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the table is opened again, and held once for all who join it there."""
        return JoinConfig.open, (replace(self.config, table=absolute(self.config.table)), self._as_of)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.config.key, *((self._as_of,) if self._as_of else ()))))

    @property
    def writes(self) -> tuple[str, ...]:
        return self.config.writes

    @property
    def fingerprint(self) -> str:
        """Changes when the table does."""
        return self.table.fingerprint

    def held_out(self) -> Join:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        config = self.config
        check_keys(config.key, columns, self._table_key, self.table.schema)
        if self._as_of:
            require_columns((self._as_of,), columns, "as_of")
            check_time("as_of", self._as_of, columns.field(self._as_of).type)
        check_new(self.writes, columns, config.replace, "columns", "rename: {{{}: ...}}")
        for name, other in zip(self.writes, config.columns, strict=True):
            columns = with_field(columns, name, self.table.schema.field(other).type)
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        places, _ = self._find(rows)
        for name, values in zip(self.writes, self._lookup.take(places), strict=True):
            rows = with_column(rows, name, values)
        return rows

    def measure(self, rows: pa.RecordBatch) -> Matches:
        """How many of these rows find something, and how old it is."""
        places, times = self._find(rows)
        found = places >= 0
        examples = rows.select(list(self.config.key)).filter(pa.array(~found)).slice(0, 3).to_pylist()
        unmatched = tuple(as_text(key) for key in examples)
        if times is None:
            return Matches(len(found), int(found.sum()), unmatched=unmatched)
        ages = times[found] - self._lookup.times_at(places[found])
        return Matches(len(found), int(found.sum()), count_ages(ages), unmatched)

    def conclude(self, by_day: Mapping[str, Sequence[Matches]], window: str) -> dict[str, Any]:
        """What is kept of the measures of a window.

        Raises:
            DataError: too few rows find something.
        """
        total, kept = report(self.table.path, by_day)
        if total.rate < self.config.min_match_rate:
            expected = f"at least {self.config.min_match_rate:.1%} of the rows of {window} to find a row, min_match_rate"
            received = f"{total.rate:.1%}" + (f"; nothing for {' or '.join(total.unmatched)}" if total.unmatched else "")
            fix = "look at the key, at valid_from and at the days that the table holds, or lower min_match_rate"
            raise DataError(self.table.path, expected=expected, received=received, fix=fix)
        ages = kept.get("staleness_hours")
        age = f", half of them at most {ages['p50']:.3g} h old" if ages else ""
        logger.info("%s: %.2f %% of %d rows find a row of %s%s", window, 100 * total.rate, total.rows, self.table.path, age)
        return kept

    def _find(self, rows: pa.RecordBatch) -> tuple[Integers, Integers | None]:
        """Places in the lookup, -1 for none, and the times of the events where they matter."""
        hashes, known = hash_keys([rows.column(name) for name in self.config.key])
        times = None
        if self._as_of:
            times, has_time = microseconds(rows.column(self._as_of), self._as_of, self.config.time_zone)
            known = known & has_time
        places = np.where(known, self._lookup.find(hashes, times), -1)
        if self.config.max_age and times is not None:
            places[times - self._lookup.times_at(places) > duration(self.config.max_age)] = -1
        return places, times

    @property
    def _lookup(self) -> Lookup | DiskLookup:
        with self._lock:
            if self._held is None:
                values = pa.schema([self.table.schema.field(name) for name in self.config.columns])
                sizes = {"num_rows": self.table.num_rows, "memory_rows": self.config.memory_rows}
                try:
                    self._held = open_lookup(self._table_rows(), values, self._known if self._as_of else None, **sizes)
                except DuplicateKeyError as error:
                    raise self._duplicate(error.key_hash) from error
            return self._held

    def _table_rows(self) -> Iterator[pa.RecordBatch]:
        """Rows of the table that can be found, in order: hash of the key, since when they hold, and the values.

        Raises:
            DataError: a file cannot be read, or a value is no time.
        """
        for file, rows in self.table.batches():
            hashes, known = hash_keys([rows.column(name) for name in self._table_key])
            columns = {HASH: pa.array(hashes)}
            if self._as_of:
                place = f"{file}, column {self.config.valid_from!r}"
                valid, has_time = microseconds(rows.column(self.config.valid_from), place, self.config.time_zone, round_up=True)
                columns[TIME], known = pa.array(valid), known & has_time
            arrays = [*columns.values(), *(rows.column(name) for name in self.config.columns)]
            found = pa.RecordBatch.from_arrays(arrays, names=[*columns, *self.config.columns])
            yield found if known.all() else found.filter(pa.array(known))

    def _known(self, valid: Integers) -> Integers:
        """When rows are known that hold since these times."""
        if not self.config.ready_at:
            return valid + duration(self.config.delay)
        import polars as pl

        days = pl.Series(valid).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(self.config.time_zone).dt.date()
        hours, minutes = map(int, self.config.ready_at.split(":"))
        return to_utc(days.cast(pl.Datetime("us")) + timedelta(days=1, hours=hours, minutes=minutes), self.config.time_zone)

    def _duplicate(self, key_hash: int) -> TableError:
        """Reads the table again to name a key that it has more than once."""
        found: list[tuple[str, str]] = []
        for file, rows in self.table.batches():
            keys = rows.select(list(self._table_key))
            hashes, known = hash_keys(keys.columns)
            same = keys.filter(pa.array(known & (hashes == np.uint64(key_hash))))
            found += [(as_text(key), file) for key in same.slice(0, 2).to_pylist()]
            if len(found) > 1:
                break
        files = " and ".join(dict.fromkeys(file for _, file in found))
        fix = "write one row for each key, or say in valid_from since when each of them holds"
        return TableError(files, expected=f"one row for each {', '.join(self._table_key)}", received=f"several for {found[0][0]}", fix=fix)


_OPENED: WeakValueDictionary[str, Join] = WeakValueDictionary()
