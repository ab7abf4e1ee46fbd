"""Adds columns of a table that lies beside the data: features of users and items, a teacher's predictions, a back-filled feature."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_rows
from mlenv.datasets.join_report import Matches, count_ages, report
from mlenv.datasets.lookup import DuplicateKeyError, Integers, Lookup, one_array
from mlenv.datasets.side_table import SideTable, key_kind
from mlenv.datasets.transforms.expressions import as_array, require_columns, with_column, with_field
from mlenv.errors import ConfigError, DataError, TableError, check_at_least

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

HASH, VALID, TIME = "__hash__", "__valid__", "__time__"
"""Columns of rows on their way through a join: hash of the key, since when a row of the table holds, time of an event."""

_MICROSECONDS = {"ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_DURATION = re.compile(r"(\d+(ms|[smhd]))+")
_CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Gives each row the columns of the table's row with the same key; null where there is none. A null key finds nothing.

    With ``valid_from`` a key may have many rows, and an event gets the latest that was *known* at its time: ``delay`` or
    ``ready_at`` say how long after ``valid_from`` that was. Of rows equally late the last counts, files in the order of their
    names. Times count in microseconds: an event's is rounded down, a row's up.

    The table is held in memory, by each process that decodes. Keys are told apart by a hash of 64 bits, which is exact for a
    single column of integers; else the chance that one of ten million keys finds the row of another among ten million is 0.0005 %.
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
    """Largest table that is held in memory; a larger one is joined by ``mlenv data backfill``, this many rows at once."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("table", "key", "columns"):
            if not getattr(self, name):
                raise ConfigError(name, expected="a table" if name == "table" else "at least one column", received=getattr(self, name))
        if self.table_key and len(self.table_key) != len(self.key):
            raise ConfigError("table_key", expected=f"{len(self.key)} columns, as many as key", received=list(self.table_key))
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
            if getattr(self, name) and not _DURATION.fullmatch(getattr(self, name)):
                raise ConfigError(name, expected="a length of time such as 90m, 3h or 1d12h", received=getattr(self, name))
        if not 0 <= self.min_match_rate <= 1:
            raise ConfigError("min_match_rate", expected="a number in [0, 1]", received=self.min_match_rate)
        check_at_least("memory_rows", self.memory_rows, 1)
        _check_time_zone(self.time_zone)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(self.rename.get(name, name) for name in self.columns)

    def open(self, event_time: str) -> Join:
        """The join as it acts, its table opened. Windows that join the same share what they hold in memory.

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
    """A join whose table is opened: a transform, and what measures it or does it in parts.

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
        if config.valid_from:
            _check_time("valid_from", config.valid_from, self.table.schema.field(config.valid_from).type, text_days=True)
        self._lock = threading.Lock()
        self._held: Lookup | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the table is opened again, and held once for all who join it there."""
        table = self.config.table if "://" in self.config.table else str(Path(self.config.table).absolute())
        return JoinConfig.open, (replace(self.config, table=table), self._as_of)

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
        require_columns(config.key, columns, "key")
        for name, other in zip(config.key, self._table_key, strict=True):
            mine, theirs = columns.field(name).type, self.table.schema.field(other).type
            if not key_kind(theirs) or not key_kind(mine):
                received = f"{name}, which is {mine}, and {other} of the table, which is {theirs}"
                raise ConfigError("key", expected="columns of integers, texts, booleans or times", received=received)
            if key_kind(mine) != key_kind(theirs):
                into = "BIGINT" if key_kind(theirs) == "integer" else "VARCHAR"
                fix = f"write them with one type, or derive a key before the join: CAST({name} AS {into})"
                expected = f"a key of the type that the table has, {other}: {theirs}"
                raise ConfigError("key", expected=expected, received=f"{name}: {mine}", fix=fix)
        if self._as_of:
            require_columns((self._as_of,), columns, "as_of")
            _check_time("as_of", self._as_of, columns.field(self._as_of).type, text_days=False)
        for name in (name for name in self.writes if name in columns.names and name not in config.replace):
            fix = f"give it another name, rename: {{{name}: ...}}, or name it in replace"
            raise ConfigError("columns", expected="columns that the data do not have", received=name, fix=fix)
        require_columns(config.replace, columns, "replace")
        for name, other in zip(self.writes, config.columns, strict=True):
            columns = with_field(columns, name, self.table.schema.field(other).type)
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        lookup = self._lookup
        for name, values in zip(self.writes, lookup.take(self.find(lookup, self.queries(rows))), strict=True):
            rows = with_column(rows, name, values)
        return rows

    def check_memory(self) -> None:
        """
        Raises:
            ConfigError: the table is too large to be held in memory.
        """
        if self.table.num_rows > self.config.memory_rows:
            fix = "raise it, or write the joined columns once, with mlenv data backfill CONFIG --out FOLDER, and train on these"
            expected = f"at least the {self.table.num_rows} rows of {self.table.path}"
            raise ConfigError("memory_rows", expected=expected, received=self.config.memory_rows, fix=fix)

    def measure(self, rows: pa.RecordBatch) -> Matches:
        """How many of these rows find something, and how old it is."""
        lookup, queries = self._lookup, self.queries(rows)
        places = self.find(lookup, queries)
        examples = rows.select(list(self.config.key)).filter(pa.array(places < 0)).slice(0, 3).to_pylist()
        return self.matches(lookup, queries, places) + Matches(unmatched=tuple(_as_text(key) for key in examples))

    def matches(self, lookup: Lookup, queries: pa.RecordBatch, places: Integers) -> Matches:
        """The same for ``queries`` and what ``find`` gave for them, without examples."""
        found = places >= 0
        if not self._as_of:
            return Matches(len(found), int(found.sum()))
        ages = queries.column(TIME).to_numpy()[found] - lookup.valid_since(places[found])
        return Matches(len(found), int(found.sum()), count_ages(ages))

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

    def queries(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """What is looked up for these rows: the hash of the key, null where there is none, and the time."""
        hashes, known = _hash_keys([rows.column(name) for name in self.config.key])
        columns: dict[str, Any] = {HASH: hashes}
        if self._as_of:
            times, has_time = _microseconds(rows.column(self._as_of), self._as_of, self.config.time_zone, round_up=False)
            columns[TIME], known = times, known & has_time
        columns[HASH] = pa.array(hashes, mask=None if known.all() else ~known)
        return pa.RecordBatch.from_pydict(columns)

    def side_rows(self) -> Iterator[pa.RecordBatch]:
        """Rows of the table that can be found, in order: hash of the key, since when they hold, and the values.

        Raises:
            DataError: a file cannot be read, or a value is no time.
        """
        for file, rows in self.table.batches():
            hashes, known = _hash_keys([rows.column(name) for name in self._table_key])
            columns: dict[str, Any] = {HASH: pa.array(hashes)}
            if self._as_of:
                place = f"{file}, column {self.config.valid_from!r}"
                valid, has_time = _microseconds(rows.column(self.config.valid_from), place, self.config.time_zone, round_up=True)
                columns[VALID], known = pa.array(valid), known & has_time
            fields = [*columns, *self.writes]
            arrays = [*columns.values(), *(rows.column(name) for name in self.config.columns)]
            found = pa.RecordBatch.from_arrays(arrays, names=fields)
            yield found if known.all() else found.filter(pa.array(known))

    def lookup(self, parts: Iterable[pa.RecordBatch]) -> Lookup:
        """Those of ``side_rows`` that are searched together.

        Raises:
            DataError: a key has several rows, and there is no ``valid_from`` to choose by.
        """
        batches = list(parts)
        first = 1 + bool(self._as_of)
        types = [self.table.schema.field(name).type for name in self.config.columns]
        columns = [pa.chunked_array([rows.column(place) for rows in batches], kind) for place, kind in enumerate(types, first)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(rows.column(0).to_numpy() for rows in batches)])
        valid = np.concatenate([np.zeros(0, np.int64), *(rows.column(1).to_numpy() for rows in batches)]) if self._as_of else None
        del batches
        values = [one_array(columns.pop(0)) for _ in types]
        try:
            return Lookup(hashes, values, valid, None if valid is None else self._known(valid))
        except DuplicateKeyError as error:
            raise self._duplicate(error.key_hash) from error

    def find(self, lookup: Lookup, queries: pa.RecordBatch) -> Integers:
        """Places in the lookup for ``queries``; -1 for none."""
        hashes = queries.column(HASH)
        times = queries.column(TIME).to_numpy() if self._as_of else None
        places = lookup.find(pc.fill_null(hashes, 0).to_numpy(), times)
        if hashes.null_count:
            places[hashes.is_null().to_numpy(zero_copy_only=False)] = -1
        if self.config.max_age and times is not None:
            places[times - lookup.valid_since(places) > _duration(self.config.max_age)] = -1
        return places

    @property
    def _lookup(self) -> Lookup:
        with self._lock:
            if self._held is None:
                self.check_memory()
                self._held = self.lookup(self.side_rows())
            return self._held

    def _known(self, valid: Integers) -> Integers:
        """When rows are known that hold since these times."""
        if not self.config.ready_at:
            return valid + _duration(self.config.delay)
        import polars as pl

        days = pl.Series(valid).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(self.config.time_zone).dt.date()
        hours, minutes = map(int, self.config.ready_at.split(":"))
        return _to_utc(days.cast(pl.Datetime("us")) + timedelta(days=1, hours=hours, minutes=minutes), self.config.time_zone)

    def _duplicate(self, key_hash: int) -> TableError:
        """Reads the table again to name a key that it has more than once."""
        found: list[tuple[str, str]] = []
        for file, rows in self.table.batches():
            keys = rows.select(list(self._table_key))
            hashes, known = _hash_keys(keys.columns)
            same = keys.filter(pa.array(known & (hashes == np.uint64(key_hash))))
            found += [(_as_text(key), file) for key in same.slice(0, 2).to_pylist()]
            if len(found) > 1:
                break
        files = " and ".join(dict.fromkeys(file for _, file in found))
        fix = "write one row for each key, or say in valid_from since when each of them holds"
        return TableError(files, expected=f"one row for each {', '.join(self._table_key)}", received=f"several for {found[0][0]}", fix=fix)


_OPENED: WeakValueDictionary[str, Join] = WeakValueDictionary()


def _hash_keys(columns: Sequence[pa.Array]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hashes of the keys, and which of them have no null."""
    known = np.ones(len(columns[0]), bool)
    for column in columns:
        if column.null_count:
            known &= column.is_valid().to_numpy(zero_copy_only=False)
    return hash_rows(columns), known


def _microseconds(times: pa.Array, place: str, time_zone: str, *, round_up: bool) -> tuple[Integers, NDArray[np.bool_]]:
    """Times since 1970 in UTC, anything where there is none, and where there is one."""
    import polars as pl

    known = times.is_valid().to_numpy(zero_copy_only=False)
    try:
        if not pa.types.is_timestamp(times.type):
            days = pl.from_arrow(times.cast(pa.date32()))
            assert isinstance(days, pl.Series)
            return _to_utc(days.cast(pl.Datetime("us")), time_zone), known
        fine = times.cast(pa.timestamp("ns" if times.type.unit == "ns" else "us", times.type.tz)).cast(pa.int64())
    except (pa.ArrowException, pl.exceptions.PolarsError) as error:
        expected = "timestamps, or days as YYYY-MM-DD"
        raise DataError(place, expected=expected, received=" ".join(str(error).split()), fix="write the column anew") from error
    numbers: Integers = pc.fill_null(fine, 0).to_numpy()
    if times.type.unit == "ns":
        numbers = -(-numbers // 1000) if round_up else numbers // 1000
    return numbers, known


def _to_utc(local: pl.Series, time_zone: str) -> Integers:
    """Microseconds of local times: of two instants the later, and past the gap where the clock skips them."""
    import polars as pl

    frame = local.to_frame("local").select(
        pl.coalesce(
            (pl.col("local") + pl.duration(hours=hours)).dt.replace_time_zone(time_zone, ambiguous="latest", non_existent="null")
            for hours in (0, 1)
        ).dt.epoch("us")
    )
    numbers: Integers = as_array(frame.to_series().fill_null(0)).to_numpy()
    return numbers


def _check_time(key: str, name: str, kind: pa.DataType, *, text_days: bool) -> None:
    days = pa.types.is_date(kind) or (text_days and key_kind(kind) == "text")
    if not (pa.types.is_timestamp(kind) or days):
        fix = f"write it as a timestamp; milliseconds become one by CAST({name} * 1000 AS TIMESTAMP)"
        raise ConfigError(key, expected="a column of timestamps or days", received=f"{name}, which is {kind}", fix=fix)


def _check_time_zone(name: str) -> None:
    import polars as pl

    try:
        pl.select(pl.lit(0).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(name))
    except pl.exceptions.PolarsError as error:
        raise ConfigError("time_zone", expected="a time zone such as Europe/Oslo", received=name) from error


def _duration(text: str) -> int:
    """Microseconds of what ``delay`` and ``max_age`` hold; 0 for nothing."""
    return sum(int(number) * _MICROSECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", text))


def _as_text(key: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in key.items())
