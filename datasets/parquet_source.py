"""Reads day-partitioned Parquet into batches: sharded by row group, shuffled within a bounded window, decoded ahead by workers."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from mlenv.batch import START, Batch, Extra, Position
from mlenv.composition import to_plain
from mlenv.config import TRANSFORMS, DataConfig, TableTransform, WindowConfig, is_day
from mlenv.datasets.columns import ReadColumns, check_columns
from mlenv.datasets.division import Division, Piece
from mlenv.datasets.encoded_rows import EncodedRows, Integers, join, tell_apart, to_batch
from mlenv.datasets.encoding import RowError, encode
from mlenv.errors import ConfigError, DataError, MlenvError, PlacedError, Problems, TableError, placed_under
from mlenv.schema import Schema
from mlenv.transforms import Found, Plan, Rows, Transforms, open_tables, without

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

WHOLE = -1
"""End of a piece that takes in all rows of a window."""


class NoFilesError(DataError):
    """A window has no files, or none yet."""


@dataclass(frozen=True)
class RowGroup:
    """The unit that is read at once and that ranks share out."""

    file: str
    index: int
    num_rows: int


@dataclass(frozen=True)
class LoggedRows:
    """All rows of some row groups as they are stored, and those that the transforms leave as numbers."""

    metadata: pa.Table
    """Of all rows, in order. What a transform writes is null where the row is left out."""
    kept: Rows | None
    """Which of them ``encoded`` has; None for all."""
    encoded: EncodedRows
    """Without metadata."""


class ParquetSource:
    """Rows of one window of a data set, as batches.

    Each epoch puts the row groups in a seeded order, deals them out to the ranks, joins them to windows of at least
    ``shuffle_rows`` rows, and permutes the rows of each window. All of it follows from the seed and the position, so
    that a source started at ``batch.position`` gives exactly the batches that would have come next.

    The transforms of the config act on each row group when it has been read, before anything else sees its rows. Rows are dealt out
    and gathered as they are stored, and counted as they come out.

    Args:
        is_training: whether the rows are trained on; some transforms leave others alone.
        extras: parts of the batches that are read only when asked for. With ``requests``, whole requests are permuted
            instead of rows, so that the rows of a request follow one another and losses within a request find their
            pairs. A request is cut where a batch or a window ends in the middle of it.
        carried: columns that the metadata hold beside those of the schema; of any type.
        has_labels: whether the labels are read. Without, none of their columns need be there, their weights are 0, and the
            transforms that read or write them do not act.

    Raises:
        ConfigError: requests are asked for, and the schema names no column of them.
        Problems, DataError: the window has no files, a file is no Parquet file, or columns do not fit the schema;
            found when the source is made, before any row is read.
    """

    def __init__(
        self,
        config: DataConfig,
        window: WindowConfig,
        schema: Schema,
        *,
        is_training: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        num_epochs: int = 1,
        extras: Collection[Extra] = (),
        carried: tuple[str, ...] = (),
        has_labels: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.schema, self.batch_size, self.num_epochs = schema, config.batch_size, num_epochs
        self._window_rows = config.shuffle_rows if shuffle else 0
        self._shuffle, self._seed, self._workers = shuffle and config.shuffle_rows > 0, seed, config.workers.build()
        self._rank, self._world_size = rank, world_size
        self.division = Division()
        """How a training that goes on with another number of ranks has divided its rows; set before rows are asked for."""
        if "requests" in extras and not schema.request:
            raise ConfigError("schema.request", expected="the column that groups rows shown together", received=schema.request)
        self._config, self._window = config, window
        self._columns_read = ReadColumns(schema=schema, extras=extras, carried=carried, has_labels=has_labels)
        transforms = config.transforms if has_labels else without(config.transforms, schema.label_columns)
        self._transforms = Transforms(open_tables(transforms, schema.event_time), schema.row_key, is_training=is_training)
        self._plan = self._transforms.plan(self._columns_read.all)
        self._filesystem, self._data = open_folder(config.path)
        self._root = str(PurePosixPath(self._data, window.path))
        self._bad: dict[str, MlenvError] = {}
        self._notes: list[str] = []
        self._footers = self._read_footers(window)
        self._stored_groups = [
            RowGroup(file, index, footer.row_group(index).num_rows)
            for file, footer in self._footers.items()
            for index in range(footer.num_row_groups)
            if footer.row_group(index).num_rows
        ]
        if not self._stored_groups:
            raise DataError(self._root, expected=f"rows in {window}", received="empty files only")
        if not config.allow_missing_days:
            self._check_days()

    @property
    def num_rows(self) -> int:
        """Rows of the window, over all ranks and one epoch."""
        return sum(self._num_kept.values())

    @property
    def num_own_rows(self) -> int:
        """Rows that this rank gets from the start of the division, over all epochs."""
        pieces = (piece for epoch in range(self.division.start.epoch, self.num_epochs) for piece in self._pieces(epoch))
        return sum(piece.last - piece.first for piece in pieces)

    @property
    def num_batches(self) -> int:
        """Batches that this rank gets from the start of the division, over all epochs."""
        return -(-self.num_own_rows // self.batch_size)

    @property
    def skipped(self) -> tuple[str, ...]:
        """What could not be read and was passed over: files, and row groups of files with their rows."""
        return tuple(self._bad) if self._row_groups else ()

    @property
    def findings(self) -> tuple[str, ...]:
        """What transforms that look over the whole window dropped or sampled, and why."""
        _ = self._found
        return tuple(self._notes)

    @property
    def days(self) -> tuple[str, ...]:
        """Partition days that are read, in order; empty when the data has no day partitions."""
        files = dict.fromkeys(group.file for group in self._stored_groups)
        return tuple(sorted({day for file in files if (day := self._partitions(file).get("date"))}))

    @property
    def column_names(self) -> frozenset[str]:
        """Columns that every file has after the transforms, those of the names of folders included."""
        return frozenset.intersection(*(frozenset(columns.names) for columns in self._columns_by_file.values()))

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        """Row groups with rows that can be read, in the order of the files."""
        return self._row_groups

    def stored_schema(self, file: str) -> pa.Schema:
        """Columns of a file, and those that its folders' names make."""
        return self._columns(file, self._footers[file])

    def read(self, group: RowGroup, columns: tuple[str, ...]) -> pa.RecordBatch:
        """Columns of a row group as stored, before any transform.

        Raises:
            DataError: the row group cannot be read.
        """
        return self._read(group, columns)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths under ``data.path`` of the files of the window whose footers can be read, in order."""
        return tuple(self.relative(file) for file in self._footers)

    @property
    def num_stored_rows(self) -> int:
        """Rows of these files, those that cannot be read or that transforms drop included."""
        return sum(footer.num_rows for footer in self._footers.values())

    @property
    def stored_columns(self) -> dict[str, str]:
        """Columns that are read of the files, with their types in the first of them."""
        columns = self.stored_schema(next(iter(self._footers)))
        return {name: str(columns.field(name).type) for name in self._plan.stored}

    @property
    def table_fingerprints(self) -> dict[int, str]:
        """Of the tables that are joined, by place in ``data.transforms``."""
        return {place: table.fingerprint for place, table in self._tables}

    def relative(self, file: str) -> str:
        """A file's path under ``data.path``."""
        return str(PurePosixPath(file).relative_to(self._data))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the files, their row groups, their rows and the transforms; changes when the data does."""
        text = "\n".join(
            f"{PurePosixPath(group.file).relative_to(self._data)} {group.index} {group.num_rows}" for group in self._row_groups
        )
        if self._transforms:
            text += "\n" + json.dumps(to_plain(self._config.transforms, TRANSFORMS))
            text += "".join(f"\n{place} {table.fingerprint}" for place, table in self._tables)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def joins(self) -> dict[str, dict[str, Any]]:
        """By key of the config, how many rows find something in the table that is joined, and how old it is, in all and by day.

        Raises:
            DataError: too few find something, or the table cannot be read.
        """
        joins = {}
        for place, table in self._tables:
            plan = self._transforms.plan(table.reads, before=place)

            def measure(group: RowGroup, plan: Plan = plan, look: Callable[[pa.RecordBatch], object] = table.measure) -> object:
                return look(self._transformed(group, plan, self._read(group, plan.stored), self._found[group])[0])

            _ = self._found  # surveyed before the threads ask for it
            by_day = defaultdict(list)
            for group, measured in zip(self._row_groups, self._map(measure, self._row_groups), strict=True):
                by_day[self._partitions(group.file).get("date", "")].append(measured)
            with placed_under(f"data.transforms[{place}]"):
                joins[f"data.transforms[{place}]"] = table.conclude(by_day, str(self._window))
        return joins

    def batches(self, start: Position = START) -> Generator[Batch, None, None]:
        """Batches of ``batch_size`` examples from a position on; only the very last one may be shorter.

        Raises:
            DataError: names file, row group, row and column of a value that cannot be used.
        """
        parts: list[EncodedRows] = []
        missing, position = self.batch_size, start
        for epoch, window, rows in self._encoded_windows(start):
            first = start.row if (epoch, window) == (start.epoch, start.window) else 0
            while first < len(rows):
                last = min(first + missing, len(rows))
                parts.append(rows.rows(first, last))
                missing, first, position = missing - (last - first), last, Position(epoch, window, last)
                if missing == 0:
                    yield to_batch(parts, position)
                    parts, missing = [], self.batch_size
        if parts:
            yield to_batch(parts, position)

    def logged(self, groups: Sequence[RowGroup]) -> LoggedRows:
        """Row groups with all of their rows, those too that the transforms leave out; asked for with ``metadata``.

        Raises:
            DataError: see ``batches``.
        """
        parts = [self._encode_kept(group) for group in groups]
        metadata = [self._logged_metadata(group, encoded.metadata, kept) for group, (encoded, kept) in zip(groups, parts, strict=True)]
        which = None
        if any(kept is not None for _, kept in parts):
            starts = np.cumsum([0, *(group.num_rows for group in groups)])
            numbers = (np.arange(group.num_rows) if kept is None else kept for group, (_, kept) in zip(groups, parts, strict=True))
            which = np.concatenate([start + rows for start, rows in zip(starts[:-1], numbers, strict=True)])
        return LoggedRows(pa.Table.from_batches(metadata), which, join([replace(encoded, metadata=None) for encoded, _ in parts]))

    def record_batches(self, columns: tuple[str, ...], *, at_most: int = 0) -> Iterator[pa.RecordBatch]:
        """Columns after transforms, row group by row group in file order; for statistics.

        Args:
            at_most: stored rows, about; the row groups are then spread evenly over the window. 0 gives all.
        """
        plan, groups = self._transforms.plan(columns), self._row_groups[self._rank :: self._world_size]
        stored = sum(group.num_rows for group in groups)
        step = max(stored / at_most, 1.0) if at_most else 1.0
        for place in range(max(int(len(groups) / step), 1) if groups else 0):
            yield self._rows(groups[int(place * step)], plan)[0]

    def nothing_left(self) -> DataError:
        """The error of a window of which the transforms leave no row."""
        fix = "loosen data.transforms, or change the window"
        return DataError(self._root, expected=f"rows that data.transforms leave in {self._window}", received="none", fix=fix)

    def close(self) -> None:
        """Ends what was started for the workers."""
        self._workers.close()

    @property
    def _tables(self) -> list[tuple[int, TableTransform]]:
        """Joins whose columns somebody reads, with their places."""
        return [(place, one) for place, one in self._plan.steps if isinstance(one, TableTransform)]

    def rows_of_windows(self, epoch: int, rank: int, world_size: int) -> list[int]:
        """Rows of each window that a rank would have in an epoch."""
        return [sum(self._num_kept[group] for group in window) for window in self._windows(epoch, rank, world_size)]

    def _encoded_windows(self, start: Position) -> Iterator[tuple[int, int, EncodedRows]]:
        """Windows in order, read ahead by the workers."""
        plan = (
            (epoch, window, piece, groups)
            for epoch in range(start.epoch, self.num_epochs)
            for window, (piece, groups) in enumerate(self._planned(epoch))
            if (epoch, window) >= (start.epoch, start.window)
        )
        _ = self._found  # surveyed before the workers ask for it
        return self._workers.map(self._encode_window, plan)

    def _pieces(self, epoch: int) -> list[Piece]:
        """What this rank gets of an epoch."""
        if epoch == self.division.epoch:
            return list(self.division.pieces[self._rank])
        rows = self.rows_of_windows(epoch, self._rank, self._world_size)
        return [Piece(epoch, window, self._rank, self._world_size, 0, last) for window, last in enumerate(rows)]

    def _planned(self, epoch: int) -> Iterator[tuple[Piece, list[RowGroup]]]:
        """What this rank gets of an epoch, with the row groups of it."""
        windows: dict[tuple[int, int, int], list[list[RowGroup]]] = {}
        if epoch != self.division.epoch:  # whole windows: how many rows the transforms leave of them need not be known
            for window, groups in enumerate(self._windows(epoch, self._rank, self._world_size)):
                yield Piece(epoch, window, self._rank, self._world_size, 0, WHOLE), groups
            return
        for piece in self.division.pieces[self._rank]:
            key = piece.epoch, piece.rank, piece.world_size
            if key not in windows:
                windows[key] = self._windows(*key)
            yield piece, windows[key][piece.window]

    def _windows(self, epoch: int, rank: int, world_size: int) -> list[list[RowGroup]]:
        """Row groups of a rank, gathered to windows of at least ``shuffle_rows`` rows."""
        order = (
            np.random.default_rng([self._seed, epoch]).permutation(len(self._row_groups)) if self._shuffle else range(len(self._row_groups))
        )
        windows: list[list[RowGroup]] = []
        room = 0
        for place in list(order)[rank::world_size]:
            if room <= 0:
                windows.append([])
                room = max(self._window_rows, 1)
            windows[-1].append(self._row_groups[place])
            room -= self._row_groups[place].num_rows
        return windows

    def _encode_window(self, numbered: tuple[int, int, Piece, list[RowGroup]]) -> tuple[int, int, EncodedRows]:
        """The same rows in the same order whenever and wherever it is called."""
        epoch, window, piece, groups = numbered
        rows = join([self._encode_group(group) for group in groups])
        if self._shuffle:
            generator = np.random.default_rng([self._seed, piece.epoch, piece.window, piece.rank])
            rows = rows.take(generator.permutation(len(rows)) if rows.requests is None else _shuffled_requests(rows.requests, generator))
        return epoch, window, rows if (piece.first, piece.last) in ((0, WHOLE), (0, len(rows))) else rows.rows(piece.first, piece.last)

    def _encode_group(self, group: RowGroup) -> EncodedRows:
        return self._encode_kept(group)[0]

    def _encode_kept(self, group: RowGroup) -> tuple[EncodedRows, Rows | None]:
        """Examples, and which rows of the row group they are; None for all."""
        rows, kept = self._rows(group, self._plan)
        asked = self._columns_read
        try:
            return encode(rows, self.schema, extras=asked.extras, carried=asked.carried, has_labels=asked.has_labels), kept
        except RowError as error:
            row = error.row if kept is None else kept[error.row]
            place = f"{group.file}, row group {group.index}, row {row}, column {error.column!r}"
            raise DataError(place, expected=error.expected, received=error.received, fix=error.fix) from error

    def _logged_metadata(self, group: RowGroup, metadata: pa.RecordBatch | None, kept: Rows | None) -> pa.RecordBatch:
        """Metadata of all rows of a row group, given those of the rows that are kept."""
        assert metadata is not None
        if kept is None:
            return metadata
        written = {name for _, transform in self._plan.steps for name in transform.writes}
        stored = self._read(group, tuple(name for name in metadata.schema.names if name not in written))
        places = np.full(group.num_rows, -1)
        places[kept] = np.arange(len(kept))
        spread = pa.array(places, mask=places < 0)
        columns = {
            name: stored.column(name) if name in stored.schema.names else metadata.column(name).take(spread)
            for name in metadata.schema.names
        }
        return pa.RecordBatch.from_pydict(columns).cast(metadata.schema)

    def _rows(self, group: RowGroup, plan: Plan) -> tuple[pa.RecordBatch, Rows | None]:
        """The rows that the transforms leave of a row group, and which of its rows they are; None for all."""
        rows, kept = self._read(group, plan.stored), None
        if plan.steps:
            rows, kept = self._transformed(group, plan, rows, self._found[group])
        if any(name in self._extra_types for name in plan.wanted):
            # Files may store them differently; predictions have one type a column, and so have equal requests.
            rows = rows.cast(pa.schema([(field.name, self._extra_types.get(field.name, field.type)) for field in rows.schema]))
        return rows, kept

    def _transformed(
        self, group: RowGroup, plan: Plan, rows: pa.RecordBatch, found: dict[int, Found]
    ) -> tuple[pa.RecordBatch, Rows | None]:
        try:
            return self._transforms.apply(plan, rows, found)
        except TableError:
            raise
        except PlacedError as error:
            place = f"{group.file}, row group {group.index}, {error.place}"
            raise DataError(place, expected=error.expected, received=error.received, fix=error.fix) from error

    @cached_property
    def _row_groups(self) -> list[RowGroup]:
        """Row groups with rows that can be read, in the order of the files."""
        if self._config.on_bad_file == "fail":
            return self._stored_groups
        readable = []
        for group, error in zip(self._stored_groups, self._map(self._unreadable, self._stored_groups), strict=True):
            if error is None:
                readable.append(group)
            else:
                self._pass_over(f"{group.file}, row group {group.index}, {group.num_rows} rows", error)
        if not readable:
            raise DataError(self._root, expected=f"rows in {self._window}", received="row groups that cannot be read only")
        return readable

    def _unreadable(self, group: RowGroup) -> DataError | None:
        try:
            self._read(group, self._plan.stored)
        except DataError as error:
            return error
        return None

    def _pass_over(self, place: str, error: MlenvError) -> None:
        """
        Raises:
            DataError: ``max_bad_row_groups`` are passed over already.
        """
        self._bad[place] = error
        if len(self._bad) > self._config.max_bad_row_groups:
            expected = f"at most {self._config.max_bad_row_groups} row groups that cannot be read, data.max_bad_row_groups"
            raise DataError(self._root, expected=expected, received=list(self._bad), fix="write the files again") from error
        logger.warning("passed over: %s", error)

    @cached_property
    def _found(self) -> dict[RowGroup, dict[int, Found]]:
        """By row group and place in the config, what only the whole window shows."""
        found: dict[RowGroup, dict[int, Found]] = {group: {} for group in self._row_groups}
        for place, transform in self._transforms.over_the_window:
            plan = self._transforms.plan(transform.reads, before=place)

            def survey(group: RowGroup, plan: Plan = plan, look: Callable[[pa.RecordBatch], object] = transform.survey) -> object:
                return look(self._transformed(group, plan, self._read(group, plan.stored), found[group])[0])

            surveys = self._map(survey, self._row_groups)
            with placed_under(f"data.transforms[{place}]"):
                findings = transform.conclude(surveys)
            rules: Sequence[Found] = [findings.apply] * len(self._row_groups) if findings.apply is not None else findings.dropped
            for group, rule in zip(self._row_groups, rules, strict=True):
                found[group][place] = rule
            notes = list(findings.notes)
            if findings.apply is None:
                notes.insert(0, f"drops {sum(map(len, findings.dropped))} rows")
            self._notes += [f"data.transforms[{place}]: {note}" for note in notes]
            logger.info("%s: data.transforms[%d] %s", self._window, place, "; ".join(notes))
        return found

    @cached_property
    def _num_kept(self) -> dict[RowGroup, int]:
        """Rows that the transforms leave of each row group, from the columns that those read which drop rows.

        Raises:
            DataError: they leave none at all.
        """
        if not self._plan.drops_rows:
            return {group: group.num_rows for group in self._row_groups}
        plan, found = self._transforms.plan(()), self._found

        def count(group: RowGroup) -> int:
            kept = self._transformed(group, plan, self._read(group, plan.stored), found[group])[1]
            return group.num_rows if kept is None else len(kept)

        counts = dict(zip(self._row_groups, self._map(count, self._row_groups), strict=True))
        stored = sum(group.num_rows for group in self._row_groups)
        logger.info("%s: data.transforms leave %d of %d rows", self._window, sum(counts.values()), stored)
        if not any(counts.values()):
            raise self.nothing_left()
        return counts

    def _map(self, function: Callable[[RowGroup], _Result], groups: Sequence[RowGroup]) -> list[_Result]:
        return list(self._workers.map(function, groups))

    def _read(self, group: RowGroup, columns: tuple[str, ...]) -> pa.RecordBatch:
        """Columns as stored."""
        partitions = self._partitions(group.file)
        stored = [column for column in columns if column not in partitions]
        try:
            file = pq.ParquetFile(group.file, filesystem=self._filesystem, metadata=self._footers[group.file])
            table = file.read_row_group(group.index, columns=stored, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            fix = "write the file again, or take it out of the folder"
            raise DataError(
                f"{group.file}, row group {group.index}", expected="readable pages", received=" ".join(str(error).split()), fix=fix
            ) from error
        for column in (column for column in columns if column in partitions):
            table = table.append_column(column, pa.array([partitions[column]] * group.num_rows))
        table = table.select(list(columns))
        batches = table.to_batches()
        if len(batches) > 1:
            batches = table.combine_chunks().to_batches()
        if len(batches) > 1:  # Arrow cannot combine more
            fix = "write smaller row groups"
            raise DataError(f"{group.file}, row group {group.index}", expected="columns of less than 2 GiB", received="more", fix=fix)
        return batches[0]

    def _read_footers(self, window: WindowConfig) -> dict[str, pq.FileMetaData]:
        """Footers of the files of the window, in the order of their paths.

        The order of rows must not depend on how a file system lists them.
        """
        files = self._list_files()
        chosen = [file for file in files if window.holds(self._partitions(file).get("date", ""))]
        if not chosen:
            days = sorted({day for file in files if (day := self._partitions(file).get("date"))})
            received = f"days {days[0]} to {days[-1]}" if days else f"{len(files)} Parquet files without date=YYYY-MM-DD folders"
            raise NoFilesError(
                self._root, expected=f"Parquet files in {window}", received=received, fix="change the window, or write the missing days"
            )
        with ThreadPoolExecutor(8) as pool:
            read = dict(zip(chosen, pool.map(self._try_footer, chosen), strict=True))
        for file, failed in read.items():
            if isinstance(failed, DataError):
                self._pass_over(file, failed)
        footers = {file: footer for file, footer in read.items() if not isinstance(footer, DataError)}
        self._columns_by_file, problems = self._transformed_columns(footers)
        for file, columns in self._columns_by_file.items():
            asked = self._columns_read
            problems += check_columns(columns, self.schema, file, extras=asked.extras, carried=asked.carried, has_labels=asked.has_labels)
        if problems:
            raise Problems(f"data under {self._root}", problems)
        self._extra_types = self._common_types()
        return footers

    def _transformed_columns(self, footers: dict[str, pq.FileMetaData]) -> tuple[dict[str, pa.Schema], list[MlenvError]]:
        """Columns of each file after the transforms, and what keeps these from being applied: once, with the first file."""
        columns: dict[str, pa.Schema] = {}
        known: dict[pa.Schema, pa.Schema] = {}
        problems: dict[tuple[str, str], MlenvError] = {}
        for file, footer in footers.items():
            stored = self._columns(file, footer)
            try:
                if stored not in known:
                    known[stored] = self._transforms.output_schema(stored)
                columns[file] = known[stored]
            except PlacedError as error:
                place = f"{file}, {error.place}"
                named = DataError(place, expected=error.expected, received=error.received, fix=error.fix)
                problems.setdefault((error.place, str(error.received)), named)
        return columns, list(problems.values())

    def _check_days(self) -> None:
        """
        Raises:
            DataError: a day of the window has no rows.
        """
        days = [day for day in self.days if is_day(day)]
        if not days:
            return
        first, last = (datetime.date.fromisoformat(day) for day in (self._window.start or days[0], self._window.end or days[-1]))
        wanted = ((first + datetime.timedelta(days=distance)).isoformat() for distance in range((last - first).days + 1))
        missing = [day for day in wanted if self._window.holds(day) and day not in days]
        if missing:
            received = f"no rows on {', '.join(missing[:10])}" + (f" and {len(missing) - 10} more days" if len(missing) > 10 else "")
            fix = "write the days, name them in skip_dates of the window, or set data.allow_missing_days to true"
            raise DataError(self._root, expected=f"rows on every day of {self._window}", received=received, fix=fix)

    def _common_types(self) -> dict[str, pa.DataType]:
        """One type for each column of the extras over all files.

        Raises:
            DataError: names the column and the file that does not go with the others.
        """
        common: dict[str, pa.DataType] = {}
        names = self._columns_read.of_extras
        for file, columns in self._columns_by_file.items():
            for name in names:
                found = columns.field(name).type
                found = found.value_type if pa.types.is_dictionary(found) else found
                try:
                    schemas = [pa.schema([(name, kind)]) for kind in (common.get(name, found), found)]
                    common[name] = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
                except pa.ArrowException as error:
                    fix = "write the column with one type in all files"
                    raise DataError(f"{file}, column {name!r}", expected=str(common[name]), received=str(found), fix=fix) from error
        return common

    def _partitions(self, file: str) -> dict[str, str]:
        """Keys and values of the folders ``key=value`` that a file lies in; they act as text columns."""
        return partitions(self.relative(file))

    def _columns(self, file: str, footer: pq.FileMetaData) -> pa.Schema:
        types = {field.name: field.type for field in footer.schema.to_arrow_schema()}
        return pa.schema(types | dict.fromkeys(self._partitions(file), pa.string()))

    def _list_files(self) -> list[str]:
        return list_files(self._filesystem, self._data, self._window.path)

    def _try_footer(self, file: str) -> pq.FileMetaData | DataError:
        try:
            return self._read_footer(file)
        except DataError as error:
            if self._config.on_bad_file == "fail":
                raise
            return error

    def _read_footer(self, file: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(file, filesystem=self._filesystem)
        except (OSError, pa.ArrowException) as error:
            fix = "write the file again, or take it out of the folder"
            raise DataError(file, expected="a whole Parquet file", received=" ".join(str(error).split()), fix=fix) from error


def list_files(filesystem: pyarrow.fs.FileSystem, folder: str, inside: str) -> list[str]:
    """Parquet files of all days in a part of a data set's folder, or the one file that the part is, in the order of their paths.

    Raises:
        NoFilesError: there is no such part.
    """
    root = str(PurePosixPath(folder, inside))
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise NoFilesError(
            root, expected="a folder of Parquet files", received="nothing there", fix="set data.path, or write the data first"
        )
    if info.type == pyarrow.fs.FileType.File:
        return [root]
    selector = pyarrow.fs.FileSelector(root, recursive=True)
    files = (entry.path for entry in filesystem.get_file_info(selector) if entry.is_file and entry.path.endswith(".parquet"))
    return sorted(file for file in files if not _is_hidden(PurePosixPath(file).relative_to(folder)))


def partitions(file: str) -> dict[str, str]:
    """Keys and values of the folders ``key=value`` on the way to a file."""
    return dict(part.split("=", 1) for part in PurePosixPath(file).parts[:-1] if "=" in part)


def open_folder(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and the path in it, for a local path or any URL that Arrow or fsspec knows.

    Raises:
        ConfigError: nobody knows the scheme of the URL.
    """
    if "://" not in path:
        local = pyarrow.fs.LocalFileSystem()
        if not PurePosixPath(path).is_absolute():  # a worker may run in another folder, and messages name the path as it was given
            local = pyarrow.fs.SubTreeFileSystem(str(Path.cwd()), local)
        return local, str(PurePosixPath(path))
    try:
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(path)
        return filesystem, inside
    except pa.ArrowInvalid:
        import fsspec

        try:
            opened, inside = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                "data.path", expected="a local path, or a URL that Arrow or fsspec knows", received=path, fix=str(error)
            ) from error
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(opened)), inside


def _is_hidden(file: PurePosixPath) -> bool:
    """Whether a name on the way begins as those of unfinished output do: ``_temporary``, ``.part``."""
    return any(part.startswith(("_", ".")) for part in file.parts)


def _shuffled_requests(requests: Integers, generator: np.random.Generator) -> Integers:
    """An order of rows in which requests come at random and the rows of each follow one another as before."""
    distinct, request_of_row = np.unique(tell_apart(requests), return_inverse=True)
    return np.argsort(generator.permutation(len(distinct))[request_of_row], kind="stable")
