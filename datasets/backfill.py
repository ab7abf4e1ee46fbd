"""Writing a data set with the columns of its joins, once, so that no later run joins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.config import DataConfig, TableTransform, TransformConfig, WindowTransformConfig
from mlenv.datasets.day_partitions import new_folder
from mlenv.datasets.parquet_source import ParquetSource, RowGroup
from mlenv.errors import ConfigError, placed_under
from mlenv.schema import Schema
from mlenv.transforms import Plan, Transforms, open_tables

Stored = tuple[ParquetSource, RowGroup]


def backfill(data: DataConfig, schema: Schema, out: Path) -> int:
    """Writes the files of all windows to ``out`` under the names that they have under ``data.path``, with the columns added of
    every table in ``data.transforms``: the same config without these transforms then reads the same rows. Returns their number.

    ``out`` appears at the end, complete. No row is left out; what the other transforms do is left to the reader.

    Raises:
        ConfigError: no table is joined; one cannot be before the transforms that come before it, or drops rows; or as ParquetSource.
        Problems, DataError: see ParquetSource; or ``out`` cannot be written.
    """
    transforms = open_tables(data.transforms, schema.event_time)
    places = [place for place, one in enumerate(transforms) if isinstance(one, TableTransform)]
    if not places:
        raise ConfigError("data.transforms", expected="a transform that reads a table, such as a join", received="none")
    for place in places:
        _check_movable(transforms, place)
    joins = [_Join(transforms, place, schema) for place in places]
    groups = _groups(data, schema)
    with new_folder(out) as folder:
        num_rows = _write(groups, joins, folder)
        for join in joins:
            join.conclude()
    return num_rows


class _Join:
    """One of the tables: its columns for a row group after another, and what they tell all together."""

    def __init__(self, transforms: Sequence[TransformConfig | WindowTransformConfig], place: int, schema: Schema) -> None:
        table = transforms[place]
        assert isinstance(table, TableTransform)
        self.place, self.table = place, table
        self._chain = Transforms([one for one in transforms[:place] if not one.drops_rows], schema.row_key, is_training=True)
        self._plan: Plan = self._chain.plan(table.reads)
        self._measured: list[Any] = []

    def columns(self, source: ParquetSource, group: RowGroup) -> dict[str, pa.Array]:
        """What the table adds to the rows of a row group."""
        with placed_under(f"data.transforms[{self.place}]"):
            _check_stored(self._plan.stored, source.stored_schema(group.file))
            rows = self._chain.apply(self._plan, source.read(group, self._plan.stored))[0]
            self._measured.append(self.table.measure(rows))
            joined = self.table.apply(rows, ())
            return {name: joined.column(name) for name in self.table.writes}

    def conclude(self) -> None:
        """
        Raises:
            DataError: see TableTransform.
        """
        with placed_under(f"data.transforms[{self.place}]"):
            self.table.conclude({"": self._measured}, "all windows")


def _write(groups: Sequence[Stored], joins: Sequence[_Join], folder: Path) -> int:
    """Files as they were, row group by row group, with the joined columns at the end or in place of those of their names."""
    num_rows = 0
    for file, of_file in groupby(groups, key=lambda stored: stored[1].file):
        with ExitStack() as stack:
            writer = None
            for source, group in of_file:
                partitions = PurePosixPath(source.relative(file)).parts[:-1]
                names = [name for name in source.stored_schema(file).names if not any(part.startswith(f"{name}=") for part in partitions)]
                stored = source.read(group, tuple(names))
                columns = dict(zip(names, stored.columns, strict=True))
                for join in joins:
                    columns |= join.columns(source, group)
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
        ConfigError: a transform before a join touches a column that the join writes, and would then see the joined one; or
            the transform drops rows.
    """
    if transforms[place].drops_rows:
        fix = "set mask_column, or leave the transform to the reader"
        raise ConfigError(
            f"data.transforms[{place}]", expected="a transform that leaves every row in", received="one that drops rows", fix=fix
        )
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
