"""Writing a data set with the columns of its joins, once: tables of any size, in the memory of a part of them.

A table that is too large to be held is cut by the hash of its key into buckets on the disk. What is looked up in it is cut the
same way, and each bucket is joined by itself. Its answers are written in the order of the questions, a strip of rows after the
other, so that the answers to a strip are read from all buckets and put in the order of the rows.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlenv.config import DataConfig, TransformConfig, WindowTransformConfig
from mlenv.datasets.day_partitions import new_folder
from mlenv.datasets.join_report import Matches
from mlenv.datasets.lookup import Lookup, one_array
from mlenv.datasets.parquet_source import ParquetSource, RowGroup
from mlenv.datasets.transforms.join import HASH, Join
from mlenv.errors import ConfigError, placed_under
from mlenv.schema import Schema
from mlenv.transforms import Transforms, open_tables

logger = logging.getLogger(__name__)

MAX_BUCKETS = 512
"""Files that are open at once; a table of more than this many times ``memory_rows`` has larger buckets."""

_PLACE = "__place__"
"""Place of a question in its strip."""

Stored = tuple[ParquetSource, RowGroup]


def backfill(data: DataConfig, schema: Schema, out: Path) -> int:
    """Writes the files of all windows to ``out`` under the names that they have under ``data.path``, with the columns of every
    join in ``data.transforms`` added: the same config without the joins then reads the same rows. Returns their number.

    ``out`` appears at the end, complete. No row is left out; what the other transforms do is left to the reader.

    Raises:
        ConfigError: there is no join; a join cannot be done before the transforms that come before it; or as ParquetSource.
        Problems, DataError: see ParquetSource; or ``out`` cannot be written.
    """
    transforms = open_tables(data.transforms, schema.event_time)
    joins = [place for place, one in enumerate(transforms) if isinstance(one, Join)]
    if not joins:
        raise ConfigError("data.transforms", expected="a transform of kind join", received="none")
    for place in joins:
        _check_movable(transforms, place)
    groups = _groups(data, schema)
    with new_folder(out) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as spilled:
        answers = _Answers(Path(spilled))
        for place in joins:
            with placed_under(f"data.transforms[{place}]"):
                _join(transforms, place, groups, answers, schema)
        return _write(groups, answers, folder)


class _Answers:
    """Joined columns on the disk, one file for each join, one batch for each row group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[tuple[tuple[str, ...], Path]] = []

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for names, _ in self._files for name in names)

    def add(self, join: Join, answers: Iterable[pa.RecordBatch]) -> None:
        file = self.folder / f"join-{len(self._files)}.arrow"
        with pa.OSFile(str(file), "wb") as sink, ExitStack() as stack:
            writer = None
            for rows in answers:
                writer = writer or stack.enter_context(pa.ipc.new_file(sink, rows.schema))
                writer.write_batch(rows)
        self._files.append((join.writes, file))

    def rows(self, columns: Sequence[str]) -> Iterator[list[tuple[str, pa.Array]]]:
        """For each row group, those of the columns that were joined."""
        with ExitStack() as stack:
            readers = [
                pa.ipc.open_file(stack.enter_context(pa.OSFile(str(file)))) for names, file in self._files if set(names) & set(columns)
            ]
            index = 0
            while True:
                batches = [reader.get_batch(index) for reader in readers]
                yield [(name, rows.column(name)) for rows in batches for name in rows.schema.names if name in columns]
                index += 1


def _join(
    transforms: Sequence[TransformConfig | WindowTransformConfig], place: int, groups: Sequence[Stored], answers: _Answers, schema: Schema
) -> None:
    """Adds one join's columns to the answers."""
    join = transforms[place]
    assert isinstance(join, Join)
    before = [one for one in transforms[:place] if not (one.drops_rows or isinstance(one, Join))]
    chain = Transforms(before, schema.row_key, is_training=True)
    plan = chain.plan(join.reads)

    def questions() -> Iterator[pa.RecordBatch]:
        for (source, group), joined in zip(groups, answers.rows(plan.stored), strict=False):
            names = [name for name in plan.stored if name not in dict(joined)]
            _check_stored(names, source.stored_schema(group.file))
            stored = source.read(group, tuple(names))
            columns = dict(zip(names, stored.columns, strict=True)) | dict(joined)
            rows = pa.RecordBatch.from_arrays([columns[name] for name in plan.stored], names=list(plan.stored))
            yield join.queries(chain.apply(plan, rows)[0])

    measured: list[Matches] = []
    if join.table.num_rows <= join.config.memory_rows:
        lookup = join.lookup(join.side_rows())
        answers.add(join, (_answer(join, lookup, one, measured) for one in questions()))
    else:
        num_buckets = min(-(-join.table.num_rows // join.config.memory_rows), MAX_BUCKETS)
        logger.info("%s: %d rows in %d buckets", join.table.path, join.table.num_rows, num_buckets)
        with tempfile.TemporaryDirectory(dir=answers.folder) as folder:
            answers.add(join, _in_buckets(join, questions(), num_buckets, Path(folder), measured))
    join.conclude({"": measured}, "all windows")


def _in_buckets(
    join: Join, questions: Iterator[pa.RecordBatch], num_buckets: int, folder: Path, measured: list[Matches]
) -> Iterator[pa.RecordBatch]:
    """Answers to the questions, in their order and of their lengths."""
    _scatter(join.side_rows(), num_buckets, folder, "table")
    lengths: list[list[int]] = []
    _scatter(_strips(questions, join.config.memory_rows, lengths), num_buckets, folder, "asked", keep_empty=True)
    for bucket in range(num_buckets):
        side = folder / f"table-{bucket}.arrow"
        lookup = join.lookup(_batches(side))
        side.unlink(missing_ok=True)
        asked = folder / f"asked-{bucket}.arrow"
        with pa.OSFile(str(folder / f"answers-{bucket}.arrow"), "wb") as sink, ExitStack() as stack:
            writer = None
            for rows in _batches(asked):
                answer = _answer(join, lookup, rows, measured).append_column(_PLACE, rows.column(_PLACE))
                writer = writer or stack.enter_context(pa.ipc.new_file(sink, answer.schema))
                writer.write_batch(answer)
        asked.unlink()
        del lookup
    with ExitStack() as stack:
        files = [stack.enter_context(pa.OSFile(str(folder / f"answers-{bucket}.arrow"))) for bucket in range(num_buckets)]
        readers = [pa.ipc.open_file(file) for file in files]
        for strip, rows_of_groups in enumerate(lengths):
            parts = pa.Table.from_batches([reader.get_batch(strip) for reader in readers])
            places = parts.column(_PLACE).to_numpy()
            order = np.empty(len(places), np.int64)
            order[places] = np.arange(len(places))
            rows = parts.drop_columns(_PLACE).combine_chunks().take(pa.array(order)).combine_chunks()
            first = 0
            for length in rows_of_groups:
                cut = rows.slice(first, length)
                yield pa.RecordBatch.from_arrays([one_array(column) for column in cut.columns], schema=cut.schema)
                first += length


def _strips(questions: Iterator[pa.RecordBatch], num_rows: int, lengths: list[list[int]]) -> Iterator[pa.RecordBatch]:
    """Questions of several row groups at once, at least ``num_rows`` of them, with their places; notes the rows of each."""
    gathered: list[pa.RecordBatch] = []

    def strip() -> pa.RecordBatch:
        rows = pa.concat_batches(gathered)
        lengths.append([len(one) for one in gathered])
        gathered.clear()
        return rows.append_column(_PLACE, pa.array(np.arange(rows.num_rows)))

    for rows in questions:
        gathered.append(rows)
        if sum(map(len, gathered)) >= num_rows:
            yield strip()
    if gathered:
        yield strip()


def _scatter(rows: Iterator[pa.RecordBatch], num_buckets: int, folder: Path, name: str, *, keep_empty: bool = False) -> None:
    """Writes rows to ``folder/NAME-BUCKET.arrow`` by the hash of their key; their order stays. Null goes to bucket 0."""
    with ExitStack() as stack:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for batch in rows:
            buckets = (pc.fill_null(batch.column(HASH), 0).to_numpy() % np.uint64(num_buckets)).astype(np.int64)
            order = np.argsort(buckets, kind="stable")
            sorted_rows, ends = batch.take(pa.array(order)), np.cumsum(np.bincount(buckets, minlength=num_buckets))
            for bucket, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                if last == first and not keep_empty:
                    continue
                if bucket not in writers:
                    sink = stack.enter_context(pa.OSFile(str(folder / f"{name}-{bucket}.arrow"), "wb"))
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(sink, batch.schema))
                writers[bucket].write_batch(sorted_rows.slice(first, last - first))


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.exists():
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def _answer(join: Join, lookup: Lookup, questions: pa.RecordBatch, measured: list[Matches]) -> pa.RecordBatch:
    places = join.find(lookup, questions)
    measured.append(join.matches(lookup, questions, places))
    return pa.RecordBatch.from_arrays(lookup.take(places), names=list(join.writes))


def _write(groups: Sequence[Stored], answers: _Answers, folder: Path) -> int:
    """Files as they were, row group by row group, with the joined columns at the end or in place of those of their names."""
    joined_rows, num_rows = answers.rows(answers.columns), 0
    for file, of_file in groupby(groups, key=lambda stored: stored[1].file):
        with ExitStack() as stack:
            writer = None
            for source, group in of_file:
                partitions = PurePosixPath(source.relative(file)).parts[:-1]
                names = [name for name in source.stored_schema(file).names if not any(part.startswith(f"{name}=") for part in partitions)]
                stored = source.read(group, tuple(names))
                columns = dict(zip(names, stored.columns, strict=True)) | dict(next(joined_rows))
                rows = pa.table(columns)
                if writer is None:
                    target = folder / source.relative(file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = stack.enter_context(pq.ParquetWriter(target, rows.schema))
                writer.write_table(rows, row_group_size=rows.num_rows)
                num_rows += rows.num_rows
    return num_rows


def _groups(data: DataConfig, schema: Schema) -> list[Stored]:
    """Row groups of all windows, each once."""
    groups: dict[RowGroup, ParquetSource] = {}
    for name in ("train", "validation", "test"):
        if (window := getattr(data, name)) is not None:
            source = ParquetSource(data, window, schema, is_training=name == "train")
            groups |= {group: source for group in source.row_groups if group not in groups}
            source.close()
    return sorted(((source, group) for group, source in groups.items()), key=lambda stored: (stored[1].file, stored[1].index))


def _check_movable(transforms: Sequence[TransformConfig | WindowTransformConfig], place: int) -> None:
    """
    Raises:
        ConfigError: a transform before a join touches a column that the join writes, and would then see the joined one.
    """
    for earlier, one in enumerate(transforms[:place]):
        for name in set(transforms[place].writes) & {*one.reads, *one.writes}:
            fix = "rename the joined column"
            expected = f"columns that no transform before it touches, as data.transforms[{earlier}] does"
            raise ConfigError(f"data.transforms[{place}].columns", expected=expected, received=name, fix=fix)


def _check_stored(names: Sequence[str], columns: pa.Schema) -> None:
    """
    Raises:
        ConfigError: a key hangs on what a transform writes that drops rows.
    """
    for name in names:
        if name not in columns.names:
            raise ConfigError("key", expected="columns that are stored, derived or joined", received=f"{name}, which a sampler writes")
