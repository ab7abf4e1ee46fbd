"""The transforms of a config that make of a row's values others of its own, run on requests as on the rows of the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

import pyarrow as pa

from mlenv.config import TRANSFORMS, DataConfig, TableTransformConfig, TransformConfig, WindowTransformConfig
from mlenv.datasets.transforms.expressions import with_column, with_field
from mlenv.errors import ConfigError
from mlenv.kinds import kind_field, kind_of
from mlenv.serving.columns import RowProblem, RowsError, expected

SERVED: Final = ("bucket", "clip", "derive", "hash", "truncate")
"""Kinds that need neither a table nor a team's own code, nor other rows."""

_BEFORE: Final = "before transforms: "


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a file of a package says of its transforms."""

    steps: tuple[TransformConfig, ...] = kind_field(TRANSFORMS)


@dataclass(frozen=True)
class ServedTransforms:
    """What happens to a request before it is encoded."""

    steps: tuple[TransformConfig, ...] = ()
    """In order."""
    stored: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Columns of a request that they read, in the types of the log."""

    def apply(self, rows: pa.RecordBatch, first_row: int = 0) -> pa.RecordBatch:
        """
        Raises:
            RowsError: a value does not fit the type that its column has in the log.
        """
        for column in self.stored:
            rows = with_column(rows, column.name, _cast(rows, column, first_row))
        for step in self.steps:
            rows = step.apply(rows, ())
        return rows


@dataclass(frozen=True, kw_only=True)
class ServedPlan:
    """How the columns that a model reads come from a request."""

    steps: Mapping[int, TransformConfig]
    """By place in ``data.transforms``."""
    inputs: tuple[str, ...]
    """Columns that a request holds."""
    brought: Mapping[str, int]
    """Those of them that a transform makes which is not served, with its place."""

    @property
    def replaced(self) -> dict[str, int]:
        """Inputs that a step puts other values in the place of, with the place of the first one that does."""
        first = {name: place for place, step in sorted(self.steps.items(), reverse=True) for name in step.writes}
        return {name: place for name, place in first.items() if name in self.inputs}

    @property
    def read(self) -> tuple[str, ...]:
        """Inputs that the steps look at."""
        looked_at = {name for step in self.steps.values() for name in step.reads}
        return tuple(name for name in self.inputs if name in looked_at)


def plan_serving(transforms: Sequence[TransformConfig | WindowTransformConfig | TableTransformConfig], wanted: Sequence[str]) -> ServedPlan:
    """
    Args:
        wanted: columns that features and calibrators read, after all transforms.

    Raises:
        ConfigError: a step reads what a column held before a transform that is not served put something else there.
    """
    needed: dict[str, None] = dict.fromkeys(wanted)
    brought: dict[str, int] = {}
    steps: dict[int, TransformConfig] = {}
    for place, transform in reversed(list(enumerate(transforms))):
        made = [name for name in transform.writes if name in needed and name not in brought]
        if not made:
            continue
        if kind_of(transform, TRANSFORMS) not in SERVED:
            brought |= dict.fromkeys(made, place)
            continue
        assert isinstance(transform, TransformConfig)
        for name in transform.reads:
            if name in brought:
                key, fix = f"data.transforms[{place}]", f"let data.transforms[{brought[name]}] write a column of another name"
                raise ConfigError(key, expected="columns that a request can hold beside the others", received=name, fix=fix)
        steps[place] = transform
        needed = {name: None for name in needed if name not in transform.writes} | dict.fromkeys(transform.reads)
    return ServedPlan(steps=dict(sorted(steps.items())), inputs=tuple(needed), brought=brought)


def keeping(data: DataConfig, plan: ServedPlan) -> DataConfig:
    """The same rows, which also hold what the replaced inputs were before: see ``columns_before``."""
    transforms = list(data.transforms)
    for name, place in sorted(plan.replaced.items(), key=lambda item: -item[1]):
        transforms.insert(place, _Copy(column=name, into=_BEFORE + name))
    return replace(data, transforms=tuple(transforms))


def columns_before(steps: Iterable[TransformConfig], inputs: Iterable[str]) -> dict[str, str]:
    """For each input the column of the rows of ``keeping`` that holds it."""
    written = {name for step in steps for name in step.writes}
    return {name: _BEFORE + name if name in written else name for name in inputs}


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """A column once more, under another name."""

    column: str
    into: str

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into,)

    def held_out(self) -> _Copy:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        return with_field(columns, self.into, columns.field(self.column).type)

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        return with_column(rows, self.into, rows.column(self.column))


def _cast(rows: pa.RecordBatch, column: pa.Field, first_row: int) -> pa.Array:
    values, kind = rows.column(column.name), column.type
    try:
        return values if values.type == kind else values.cast(kind, safe=not pa.types.is_floating(kind))
    except pa.ArrowException as error:
        problems = []
        for row, value in enumerate(values.to_pylist()):
            try:
                values.slice(row, 1).cast(kind)
            except pa.ArrowException:
                problems.append(RowProblem(first_row + row, column.name, f"{expected(kind)} ({kind})", repr(value)))
        raise RowsError(problems) from error
