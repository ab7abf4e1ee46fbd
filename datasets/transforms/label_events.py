"""Makes a label of events that lie in a table beside the data, such as conversions, once they can be known."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.disk_lookup import DiskLookup, open_lookup
from mlenv.datasets.hashing import splitmix64
from mlenv.datasets.join_report import Matches, count_ages, report
from mlenv.datasets.lookup import HASH, TIME, Integers, Lookup
from mlenv.datasets.side_table import SideTable, absolute
from mlenv.datasets.table_keys import check_keys, check_new, check_table_key, hash_keys
from mlenv.datasets.times import check_duration, check_time, duration, microseconds
from mlenv.datasets.transforms.expressions import columns_of, evaluate, parse, require_boolean, require_columns, with_column, with_field
from mlenv.errors import ConfigError, DataError, check_at_least, placed_under

logger = logging.getLogger(__name__)

_DAY = duration("1d")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class LabelEventsConfig:
    """Writes 1 where the table has an event of the row's key from the time of the row until ``window`` later, both ends included,
    and 0 where it has none. Times count in whole microseconds, rounded down. An event counts for every such row of its key, or with
    ``touches`` for the last one before it alone.

    A label is known once ``window`` and ``wait`` have passed: when time of the row + ``window`` + ``wait`` is not after the moment up
    to which events are complete. Before that it is null, *even if an event is there already*: the young rows with an event would be
    positives, and those without could not be negatives yet. Nor is it known where the key or the time is null.

    The table is held by each process that decodes, see ``join``; keys are told apart as there.
    """

    table: str
    """Folder or file of Parquet with a row for each event, local or as a URL that Arrow or fsspec knows."""
    key: tuple[str, ...]
    """Columns of the data that make up the key."""
    time: str
    """Column of the table: when the event happened, a timestamp (UTC unless it has a zone)."""
    column: str
    """Column to write the label to."""
    window: str
    """Attribution window: the longest time from a row to an event that counts for it, such as 30m, 24h or 7d."""
    table_key: tuple[str, ...] = ()
    """The columns of ``key`` as the table names them, in the same order; empty for the same names."""
    where: str = ""
    """SQL expression over the columns of the table, true for the events that count; empty for all."""
    as_of: str = ""
    """Time of the row in the data; ``schema.event_time`` when empty."""
    wait: str = ""
    """How late events are written, at most."""
    complete_until: str = ""
    """Moment up to which the table has all events but late ones, in ISO 8601 (UTC unless it has a zone); the time of the newest
    event in the table when empty, of whatever kind. Never the clock: the same config gives the same labels tomorrow."""
    mask_column: str = ""
    """Column to write whether the label is known, for ``schema.labels.TASK.mask``; when empty, rows with an unknown label leave."""
    touches: str = ""
    """Table of all rows that an event can be credited to, with the columns ``key`` and ``as_of``, such as the folder of the data with all
    its days: an event then counts for the last of its key at or before it alone, whatever window is read; empty for every row.
    Rows with one key and one time are credited together."""
    count_column: str = ""
    """Column to write the number of events to."""
    delay_column: str = ""
    """Column to write the seconds to the first event to; null without one."""
    sums: dict[str, str] = field(default_factory=dict)
    """Columns of numbers of the table, and the columns to write their sums over the events to; null counts as 0."""
    replace: tuple[str, ...] = ()
    """Columns of the data whose place written ones may take."""
    memory_rows: int = 10_000_000
    """Largest table that is held in memory; a larger one is sorted about this many rows at once, and looked up in files under TMPDIR."""

    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("table", "time", "column", "window"):
            if not getattr(self, name):
                raise ConfigError(name, expected="a value", received=getattr(self, name))
        check_table_key(self.key, self.table_key)
        if len(set(self.writes)) < len(self.writes):
            raise ConfigError("column", expected="columns with names of their own", received=list(self.writes))
        for name in set(self.replace) - set(self.writes):
            raise ConfigError("replace", expected=f"columns that are written, {list(self.writes)}", received=name)
        for name in ("window", "wait"):
            check_duration(name, getattr(self, name))
        if self.where:
            parse(self.where, "where")
        _moment(self.complete_until)
        check_at_least("memory_rows", self.memory_rows, 1)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(name for name in (self.column, self.mask_column, self.count_column, self.delay_column, *self.sums.values()) if name)

    @property
    def masks(self) -> dict[str, str]:
        """The label, and the column that says where it is known."""
        return {self.column: self.mask_column} if self.mask_column else {}

    @property
    def days_until_known(self) -> int:
        """Whole days after the day of a row until its label is known."""
        return -(-(duration(self.window) + duration(self.wait)) // _DAY)

    def open(self, event_time: str) -> LabelEvents:
        """The transform as it acts, its table opened. Windows with the same labels share what they hold.

        Args:
            event_time: what ``as_of`` is when it is empty.

        Raises:
            ConfigError, DataError: see SideTable; or there is no time of the row.
        """
        as_of = self.as_of or event_time
        if not as_of:
            raise ConfigError("as_of", expected="the time of the row, here or in schema.event_time", received="")
        labels = LabelEvents(self, as_of)
        modified = [table.modified for table in labels.tables]
        return _OPENED.setdefault(f"{self!r} {as_of} {labels.fingerprint} {modified}", labels)


class _Events(NamedTuple):
    """The table, read."""

    lookup: Lookup | DiskLookup
    complete_until: int
    """In microseconds."""


class _Found(NamedTuple):
    """What the table has for some rows. All ``(rows,)``."""

    is_known: NDArray[np.bool_]
    start: Integers
    stop: Integers
    """Places of the events of each row, none where its label is not known."""
    times: Integers
    """Of the rows."""


class LabelEvents:
    """The transform with its table opened.

    Raises:
        ConfigError, DataError: see SideTable.
    """

    sampling_seed: ClassVar[int | None] = None

    def __init__(self, config: LabelEventsConfig, as_of: str) -> None:
        self.config, self._as_of = config, as_of
        self._table_key = config.table_key or config.key
        columns = dict.fromkeys(columns_of(config.where), "where") if config.where else {}
        columns |= {name: f"sums.{name}" for name in config.sums} | {config.time: "time"}
        columns |= dict.fromkeys(self._table_key, "table_key" if config.table_key else "key")
        self.table = SideTable(config.table, columns)
        check_time("time", config.time, self.table.schema.field(config.time).type, days=False)
        if config.where:
            require_boolean(config.where, self.table.schema, "where")
        for name in config.sums:
            kind = self.table.schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
                raise ConfigError(f"sums.{name}", expected="a column of numbers", received=f"{name}, which is {kind}")
        self._touches: SideTable | None = None
        if config.touches:
            with placed_under("touches"):
                self._touches = SideTable(config.touches, dict.fromkeys(config.key, "key") | {as_of: "as_of"})
                check_time("as_of", as_of, self._touches.schema.field(as_of).type, days=False)
                check_keys(config.key, self._touches.schema, self._table_key, self.table.schema)
        if not config.complete_until:
            self.table.require_rows("write its rows first, or say in complete_until up to when there were no events")
        self._lock = threading.Lock()
        self._held: _Events | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the table is opened again, and held once for all who read it there."""
        config = self.config
        here = replace(config, table=absolute(config.table), touches=absolute(config.touches) if config.touches else "")
        return LabelEventsConfig.open, (here, self._as_of)

    @property
    def tables(self) -> tuple[SideTable, ...]:
        """Those that are read."""
        return (self.table,) if self._touches is None else (self.table, self._touches)

    @property
    def drops_rows(self) -> bool:
        return not self.config.mask_column

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.config.key, self._as_of)))

    @property
    def writes(self) -> tuple[str, ...]:
        return self.config.writes

    @property
    def fingerprint(self) -> str:
        """Changes when the table does, or that of the touches."""
        return " ".join(table.fingerprint for table in self.tables)

    def held_out(self) -> LabelEvents:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        check_keys(self.config.key, columns, self._table_key, self.table.schema)
        require_columns((self._as_of,), columns, "as_of")
        check_time("as_of", self._as_of, columns.field(self._as_of).type, days=False)
        check_new(self.writes, columns, self.config.replace, "column", "write another one than {}")
        config = self.config
        types = {config.column: pa.int8(), config.mask_column: pa.bool_(), config.count_column: pa.int64()}
        types |= dict.fromkeys((config.delay_column, *config.sums.values()), pa.float64())
        for name in self.writes:
            columns = with_field(columns, name, types[name])
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        found = self._find(rows)
        count = found.stop - found.start
        first_of_row = np.repeat(found.start - np.cumsum(count) + count, count)
        values = self._events.lookup.take(first_of_row + np.arange(len(first_of_row))) if self.config.sums else []
        for name, column in self._columns(found, values).items():
            rows = with_column(rows, name, column)
        return rows.filter(pa.array(found.is_known)) if self.drops_rows else rows

    def measure(self, rows: pa.RecordBatch) -> Matches:
        """How many of these rows have an event and after which time, and how many are not known."""
        found = self._find(rows)
        has_event = found.stop > found.start
        unknown = int((~found.is_known).sum())
        return Matches(len(has_event), int(has_event.sum()), count_ages(self._delays(found)[has_event]), unknown=unknown)

    def conclude(self, by_day: Mapping[str, Sequence[Matches]], window: str) -> dict[str, Any]:
        """What is kept of the measures of a window."""
        total, kept = report(self.config.table, by_day, ages="delay_hours")
        until = (_EPOCH + self._events.complete_until * _MICROSECOND).isoformat()
        text = (
            "%s: %.2f %% of %d rows with a known label have an event in %s; of %d rows the label is not known, events are complete until %s"
        )
        tell = logger.info if total.unknown < total.rows else logger.warning
        tell(text, window, 100 * total.rate, total.rows - total.unknown, self.config.table, total.unknown, until)
        return kept | {"complete_until": until}

    def _find(self, rows: pa.RecordBatch) -> _Found:
        hashes, has_key = hash_keys([rows.column(name) for name in self.config.key])
        times, has_time = microseconds(rows.column(self._as_of), self._as_of)
        ends = times + duration(self.config.window)
        if self._touches is not None:
            hashes = _with_time(hashes, times)
        start, stop = self._events.lookup.between(hashes, times, ends)
        # A young row with an event stays unknown too: of the young rows only positives would be known, and the label rate would
        # rise towards the end of the data.
        is_known = has_key & has_time & (ends + duration(self.config.wait) <= self._events.complete_until)
        return _Found(is_known, start, np.where(is_known, stop, start), times)

    def _columns(self, found: _Found, values: Sequence[pa.Array]) -> dict[str, pa.Array]:
        """What is written.

        Args:
            values: of the events of all rows, one row's after the other's.
        """
        config, count, unknown = self.config, found.stop - found.start, ~found.is_known
        columns = {config.column: pa.array((count > 0).astype(np.int8), mask=unknown)}
        if config.mask_column:
            columns[config.mask_column] = pa.array(found.is_known)
        if config.count_column:
            columns[config.count_column] = pa.array(count, mask=unknown)
        if config.delay_column:
            columns[config.delay_column] = pa.array(self._delays(found) / duration("1s"), mask=count == 0)
        row_of_event = np.repeat(np.arange(len(count)), count)
        for name, of_events in zip(config.sums.values(), values, strict=True):
            sums = np.bincount(row_of_event, of_events.to_numpy(zero_copy_only=False), minlength=len(count)).astype(np.float64)
            columns[name] = pa.array(sums, mask=unknown)
        return columns

    def _delays(self, found: _Found) -> Integers:
        """Microseconds to the first event of each row, anything where it has none."""
        has_event = found.stop > found.start
        return self._events.lookup.times_at(np.where(has_event, found.start, -1)) - found.times

    @property
    def _events(self) -> _Events:
        with self._lock:
            if self._held is None:
                newest: list[int] = []
                values = pa.schema([(name, pa.float64()) for name in self.config.sums])
                sizes = {"num_rows": self.table.num_rows, "memory_rows": self.config.memory_rows}
                lookup = open_lookup(self._table_rows(newest), values, lambda times: times, **sizes)
                until = _moment(self.config.complete_until)
                if until is None and not newest:
                    fix = "say in complete_until up to when there were no events"
                    raise DataError(self.config.table, expected=f"events with a time in {self.config.time}", received="none", fix=fix)
                self._held = _Events(lookup, max(newest) if until is None else until)
            return self._held

    def _table_rows(self, newest: list[int]) -> Iterator[pa.RecordBatch]:
        """Events that count, in order: hash of the key, time, and the values; notes the newest times of all events.

        Raises:
            DataError: a file cannot be read, or ``where`` cannot be computed on its rows.
        """
        touches = None if self._touches is None else self._last_touches(self._touches)
        for file, rows in self.table.batches():
            hashes, has_key = hash_keys([rows.column(name) for name in self._table_key])
            times, has_time = microseconds(rows.column(self.config.time), f"{file}, column {self.config.time!r}")
            if has_time.any():
                newest.append(int(times[has_time].max()))
            counts = has_key & has_time
            if self.config.where:
                counts &= pc.fill_null(evaluate(self.config.where, rows, "where"), False).to_numpy(zero_copy_only=False)
            if touches is not None:
                places = touches.find(hashes, times)
                hashes, counts = _with_time(hashes, touches.times_at(places)), counts & (places >= 0)
            values = [pc.fill_null(rows.column(name).cast(pa.float64()), 0.0) for name in self.config.sums]
            names = [HASH, TIME, *self.config.sums]
            yield pa.RecordBatch.from_arrays([pa.array(hashes), pa.array(times), *values], names=names).filter(pa.array(counts))

    def _last_touches(self, table: SideTable) -> Lookup | DiskLookup:
        def rows_with_time() -> Iterator[pa.RecordBatch]:
            for file, rows in table.batches():
                hashes, has_key = hash_keys([rows.column(name) for name in self.config.key])
                times, has_time = microseconds(rows.column(self._as_of), f"{file}, column {self._as_of!r}")
                yield pa.record_batch({HASH: hashes, TIME: times}).filter(pa.array(has_key & has_time))

        sizes = {"num_rows": table.num_rows, "memory_rows": self.config.memory_rows}
        return open_lookup(rows_with_time(), pa.schema([]), lambda times: times, **sizes)


_OPENED: WeakValueDictionary[str, LabelEvents] = WeakValueDictionary()


def _with_time(hashes: NDArray[np.uint64], times: Integers) -> NDArray[np.uint64]:
    """Keys of the rows of one time: an event that is credited to a row has the key and the time of that row for its key."""
    return splitmix64(hashes ^ splitmix64(times.view(np.uint64)))


def _moment(text: str) -> int | None:
    """Microseconds of a moment in ISO 8601; None for none.

    Raises:
        ConfigError: it is no moment.
    """
    if not text:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError("complete_until", expected="a moment as 2026-01-08T03:00:00+00:00", received=text) from error
    return ((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - _EPOCH) // _MICROSECOND
