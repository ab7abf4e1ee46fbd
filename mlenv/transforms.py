"""Runs the transforms of a config over the rows of a row group: only those that matter, on only the columns they touch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.config import RowRule, TableTransformConfig, TransformConfig, WindowTransformConfig
from mlenv.errors import ConfigError, nearest, placed_under

Rows = NDArray[np.int64]
Found = Rows | RowRule
"""What the whole window said of a row group: the rows that go, or what acts on them."""

_ROW = "__row__"
"""Column that carries the number of each row in its row group past transforms that drop rows."""


@dataclass(frozen=True)
class Plan:
    """What has to be read and done to get some columns."""

    steps: tuple[tuple[int, TransformConfig | WindowTransformConfig], ...]
    """Transforms with their place in ``data.transforms``: those that drop rows, and those whose columns somebody reads."""
    stored: tuple[str, ...]
    """Columns to read."""
    wanted: tuple[str, ...]
    """Columns to give."""

    @property
    def drops_rows(self) -> bool:
        """Whether fewer rows may come out than go in."""
        return any(transform.drops_rows for _, transform in self.steps)


class Transforms:
    """Those of a config that act on one window, in order.

    Args:
        transforms: as in the config.
        row_key: columns that the fate of a sampled row hangs on.
        is_training: whether the rows are trained on; some transforms leave held-out rows alone.
    """

    def __init__(
        self, transforms: Sequence[TransformConfig | WindowTransformConfig], row_key: tuple[str, ...], *, is_training: bool
    ) -> None:
        chosen = ((place, one if is_training else one.held_out()) for place, one in enumerate(transforms))
        self._steps = tuple((place, one) for place, one in chosen if one is not None)
        self._row_key = row_key

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def over_the_window(self) -> tuple[tuple[int, WindowTransformConfig], ...]:
        """Those that must see every row group before they can judge a row, with their places."""
        return tuple((place, one) for place, one in self._steps if isinstance(one, WindowTransformConfig))

    def plan(self, wanted: Sequence[str], *, before: int | None = None) -> Plan:
        """How to get these columns after all transforms, or after those before a place."""
        needed = dict.fromkeys(wanted)
        steps: list[tuple[int, TransformConfig | WindowTransformConfig]] = []
        for place, transform in reversed(self._steps):
            if before is not None and place >= before:
                continue
            if transform.drops_rows or any(name in needed for name in transform.writes):
                steps.append((place, transform))
                needed = {name: None for name in needed if name not in transform.writes} | dict.fromkeys(self._reads(transform))
        return Plan(tuple(reversed(steps)), tuple(needed), tuple(dict.fromkeys(wanted)))

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        """The columns after all transforms, given those of a file.

        Raises:
            ConfigError: names the transform that reads a column that is not there or of a type that it cannot use.
        """
        for place, transform in self._steps:
            if transform.sampling_seed is not None:
                for name in (name for name in self._row_key if name not in columns.names):
                    fix = f"write the column; {nearest(name, columns.names)}"
                    raise ConfigError("schema.row_key", expected="columns of the data", received=name, fix=fix)
            with placed_under(f"data.transforms[{place}]"):
                columns = transform.output_schema(columns)
        return columns

    def apply(self, plan: Plan, rows: pa.RecordBatch, found: Mapping[int, Found] | None = None) -> tuple[pa.RecordBatch, Rows | None]:
        """The wanted columns of the rows that stay, and the numbers that these rows had before; None when all rows stay.

        Columns that no transform touches are neither looked at nor copied, but for one filter at the end.

        Args:
            rows: the columns ``plan.stored``.
            found: by the place of each transform of ``over_the_window``, which rows it drops of those that come to it.
        """
        touched = {name for _, transform in plan.steps for name in (*self._reads(transform), *transform.writes)}
        names = rows.schema.names
        active = rows.select([name for name in names if name in touched])
        if plan.drops_rows:
            active = active.append_column(_ROW, pa.array(np.arange(rows.num_rows)))
        for place, transform in plan.steps:
            if isinstance(transform, WindowTransformConfig):
                finding = (found or {})[place]
                active = finding(active, self._row_key) if callable(finding) else _without(active, finding)
            else:
                with placed_under(f"data.transforms[{place}]"):
                    active = transform.apply(active, self._row_key)
        passive = rows.select([name for name in names if name not in touched])
        kept = None
        if plan.drops_rows and active.num_rows < rows.num_rows:
            kept = active.column(_ROW).to_numpy()
            mask = np.zeros(rows.num_rows, bool)
            mask[kept] = True
            passive = passive.filter(pa.array(mask))
        parts = {name: part.column(name) for part in (passive, active) for name in part.schema.names if name in plan.wanted}
        return pa.RecordBatch.from_arrays([parts[name] for name in plan.wanted], names=list(plan.wanted)), kept

    def _reads(self, transform: TransformConfig | WindowTransformConfig) -> tuple[str, ...]:
        return transform.reads if transform.sampling_seed is None else (*transform.reads, *self._row_key)


def without(
    transforms: Sequence[TransformConfig | WindowTransformConfig | TableTransformConfig], columns: Collection[str]
) -> tuple[TransformConfig | WindowTransformConfig | TableTransformConfig, ...]:
    """Transforms of a config, in their places, without those that read or write columns that are not there, or what these would write."""
    absent, kept = set(columns), list(transforms)
    for place, one in enumerate(transforms):
        reads = () if isinstance(one, TableTransformConfig) else one.reads
        if absent.intersection((*reads, *one.writes)):
            absent.update(one.writes)
            kept[place] = _LeftOut()
    return tuple(kept)


@dataclass(frozen=True)
class _LeftOut:
    """Stands in the place of a transform that does not act."""

    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[None] = None

    def held_out(self) -> None:
        return None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        return rows


def open_tables(
    transforms: Sequence[TransformConfig | WindowTransformConfig | TableTransformConfig], event_time: str
) -> tuple[TransformConfig | WindowTransformConfig, ...]:
    """Transforms of a config with the tables opened that they join.

    Raises:
        ConfigError, DataError: a table or a column of it is not there, or cannot be used.
    """
    opened: list[TransformConfig | WindowTransformConfig] = []
    for place, one in enumerate(transforms):
        with placed_under(f"data.transforms[{place}]"):
            opened.append(one.open(event_time) if isinstance(one, TableTransformConfig) else one)
    return tuple(opened)


def _without(rows: pa.RecordBatch, dropped: Rows) -> pa.RecordBatch:
    if not len(dropped):
        return rows
    mask = np.ones(rows.num_rows, bool)
    mask[dropped] = False
    return rows.filter(pa.array(mask))
