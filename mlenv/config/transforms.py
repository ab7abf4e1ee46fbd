"""What a transform of rows is: the contracts, and the table to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


class _RowTransform(Protocol):
    """What every transform says about itself."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that it looks at, beside the row key."""

    @property
    def writes(self) -> tuple[str, ...]:
        """Columns that it makes, new or in place of others."""

    @property
    def drops_rows(self) -> bool:
        """Whether fewer rows may come out than go in."""

    @property
    def sampling_seed(self) -> int | None:
        """Seed with which it draws the fate of a row from ``schema.row_key``; None when it draws nothing."""

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        """The columns after it, given those before; raises ConfigError when it cannot use them."""


@runtime_checkable
class TransformConfig(_RowTransform, Protocol):
    """Turns the rows of a row group into others before the schema reads them. A row's fate and its values hang on the row alone,
    so that they are the same on any number of workers and after a resume."""

    def held_out(self) -> TransformConfig | None:
        """What takes its place on rows that are not trained on; None for nothing."""

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        """The rows that stay, in order, with the columns ``writes``; columns that it does not know pass through."""


RowRule = Callable[["pa.RecordBatch", tuple[str, ...]], "pa.RecordBatch"]
"""Rows and the columns of the row key to the rows that stay."""


@dataclass(frozen=True)
class Findings:
    """What a look over the whole window gives."""

    dropped: Sequence[NDArray[np.int64]] = ()
    """For each row group, in the order of the files, the rows that go, in rising order; empty with ``apply``."""
    notes: tuple[str, ...] = ()
    """Why, for the log and the record of the run."""
    apply: RowRule | None = None
    """Instead of ``dropped``: what acts on each row group by what the window showed, as ``TransformConfig.apply`` does. It can be
    pickled."""


@runtime_checkable
class WindowTransformConfig(_RowTransform, Protocol):
    """Drops or weighs rows for a reason that only the whole window shows. The columns ``reads`` of all row groups are surveyed, in
    any order and in threads, before the first row is used."""

    def held_out(self) -> TransformConfig | WindowTransformConfig | None:
        """What takes its place on rows that are not trained on; None for nothing."""

    def survey(self, rows: pa.RecordBatch) -> Any:
        """What is kept of a row group."""

    def conclude(self, surveys: Sequence[Any]) -> Findings:
        """What follows from the surveys of all row groups, in the order of the files."""


@runtime_checkable
class TableTransformConfig(Protocol):
    """Adds columns of a table that lies beside the data."""

    @property
    def writes(self) -> tuple[str, ...]:
        """Columns that it makes, new or in place of others."""

    @property
    def sampling_seed(self) -> int | None:
        """None: it draws nothing."""

    def open(self, event_time: str) -> TableTransform:
        """What acts on rows; ``event_time`` is the schema's."""


@runtime_checkable
class TableTransform(TransformConfig, Protocol):
    """A transform whose table is opened, and whose rows are read when they are first asked for."""

    @property
    def fingerprint(self) -> str:
        """Changes when the table does."""

    def measure(self, rows: pa.RecordBatch) -> Any:
        """How many of these rows find something in the table."""

    def conclude(self, by_day: Mapping[str, Sequence[Any]], window: str) -> dict[str, Any]:
        """What is kept of the measures of a window; raises DataError when they show that the join does not work."""


@runtime_checkable
class LabelTransformConfig(TableTransformConfig, Protocol):
    """Makes a label that is known only some time after its row."""

    @property
    def days_until_known(self) -> int:
        """Whole days after the day of a row until its label is known."""

    @property
    def masks(self) -> Mapping[str, str]:
        """Labels that are null while they are not known, and the column that says where they are."""


TRANSFORMS: dict[str, type | str] = {
    "bucket": "mlenv.datasets.transforms.values:BucketConfig",
    "clip": "mlenv.datasets.transforms.values:ClipConfig",
    "deduplicate": "mlenv.datasets.transforms.deduplicate:DeduplicateConfig",
    "derive": "mlenv.datasets.transforms.derive:DeriveConfig",
    "exclude_outliers": "mlenv.datasets.transforms.outliers:ExcludeOutliersConfig",
    "filter": "mlenv.datasets.transforms.filter:FilterConfig",
    "hash": "mlenv.datasets.transforms.values:HashConfig",
    "join": "mlenv.datasets.transforms.join:JoinConfig",
    "label_events": "mlenv.datasets.transforms.label_events:LabelEventsConfig",
    "python": "mlenv.datasets.transforms.python_function:PythonConfig",
    "sample": "mlenv.datasets.transforms.sampling:SampleConfig",
    "sample_negatives": "mlenv.datasets.transforms.sampling:SampleNegativesConfig",
    "stratify": "mlenv.datasets.transforms.stratify:StratifyConfig",
    "truncate": "mlenv.datasets.transforms.values:TruncateConfig",
}
"""Transforms by the name that ``data.transforms[N].kind`` takes."""
