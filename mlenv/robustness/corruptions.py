"""What may happen to features on their way to a server, done to encoded rows: missing, stale, another row's, scaled, negated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlenv.batch import Batch
from mlenv.datasets.times import microseconds
from mlenv.inference.batch_rows import borrow_features
from mlenv.models.missing_features import MissingFeatures
from mlenv.schema import Categorical, DenseVector, Numeric, Schema, Weighted

Corruption = Literal["missing", "stale", "other", "scaled", "negated"]

MEANINGS: Final[dict[Corruption, str]] = {
    "missing": "null",
    "stale": "the last value that the same entity had at least a day before",
    "other": "the value of another row, drawn at random",
    "scaled": "ten times the number",
    "negated": "the number with the other sign",
}

DAY: Final = 86_400_000_000
"""Microseconds."""
_FACTORS: Final = {"scaled": 10.0, "negated": -1.0}
_SINGLE: Final = (Numeric, DenseVector)


def draw_rows(num_rows: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are hit, in file order: those whose number in ``numpy.random.default_rng(seed).random(num_rows)`` is below the share."""
    drawn: NDArray[np.bool_] = np.random.default_rng(seed).random(num_rows) < share
    return drawn


def entity_columns(schema: Schema) -> dict[str, str]:
    """Column that tells one user, or one item, from another: of the entity's first categorical feature."""
    columns: dict[str, str] = {}
    for name, feature in schema.features.items():
        if isinstance(feature, Categorical) and feature.entity in ("user", "item"):
            columns.setdefault(feature.entity, feature.column or name)
    return columns


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """Rows to be corrupted, and the rows of earlier days."""

    batch: Batch
    pool: Batch
    """The earlier rows, and after them those of ``batch``: where stale values come from."""
    day_before: dict[str, Tensor]
    """By entity, for each row of ``batch``: the row of ``pool`` that the entity had last, at least a day before; -1 without one."""


def find_day_before(metadata: pa.RecordBatch, num_earlier: int, entity: str, event_time: str) -> Tensor:
    """The last row of the same entity at least a day before, for each row after the earlier ones; -1 without one.

    Args:
        metadata: of the earlier rows and then of the others.
        entity: column of the entity's id; a row without one has no row before.
    """
    times, has_time = microseconds(metadata.column(event_time), f"schema.event_time, column {event_time!r}")
    rows = pl.DataFrame({"entity": pl.from_arrow(metadata.column(entity)), "time": pl.Series(times)}).with_row_index("row")
    rows = rows.with_columns(pl.col("entity").cast(pl.String)).filter(pl.Series(has_time))
    known = rows.drop_nulls().sort("time")
    asked = known.filter(pl.col("row") >= num_earlier).with_columns(pl.col("time") - DAY).sort("time")
    found = asked.join_asof(known.rename({"row": "before"}), on="time", by="entity", strategy="backward", check_sortedness=False)
    found = found.drop_nulls("before")
    before = torch.full((metadata.num_rows - num_earlier,), -1, dtype=torch.int64)
    before[torch.from_numpy(found["row"].to_numpy().astype(np.int64)) - num_earlier] = torch.from_numpy(
        found["before"].to_numpy().astype(np.int64)
    )
    return before


def busiest_hours(metadata: pa.RecordBatch, event_time: str, num_hours: int) -> tuple[list[int], Tensor]:
    """The hours of the day (UTC) with the most rows, and which rows lie in them."""
    hour = microseconds(metadata.column(event_time), f"schema.event_time, column {event_time!r}")[0] // (DAY // 24) % 24
    counts = np.bincount(hour, minlength=24)
    hours = sorted(np.argsort(-counts, kind="stable")[:num_hours].tolist())
    return hours, torch.from_numpy(np.isin(hour, hours))


class Corruptions:
    """Makes corrupted copies of rows; what each kind does is in ``MEANINGS``."""

    def __init__(self, schema: Schema, held: HeldRows, seed: int) -> None:
        self._schema, self._held = schema, held
        self._missing = MissingFeatures(schema)
        num_rows = len(held.batch)
        self._others = torch.from_numpy(np.random.default_rng([seed, 1]).integers(0, num_rows, num_rows))
        self._ids = set(entity_columns(schema).values())

    def can(self, kind: Corruption, feature: str) -> bool:
        """Whether a kind means anything for a feature."""
        declared = self._schema.features[feature]
        if kind == "stale":
            return declared.entity in self._held.day_before and (declared.column or feature) not in self._ids
        return kind not in _FACTORS or isinstance(declared, (*_SINGLE, Weighted))

    def of(self, kind: Corruption, features: Collection[str], rows: Tensor) -> tuple[Batch, Tensor]:
        """The rows with these features corrupted, and which rows that reached.

        Args:
            features: each of them one that ``can`` be corrupted so; stale ones of the same entity.
            rows: ``(rows,)`` bool, which ones are hit.
        """
        batch = self._held.batch
        if kind == "missing":
            return self._missing.of(batch, features, rows), rows
        if kind == "other":
            return borrow_features(self._schema, batch, batch, features, torch.where(rows, self._others, -1)), rows
        if kind == "stale":
            entity = self._schema.features[next(iter(features))].entity
            before = torch.where(rows, self._held.day_before[entity], -1)
            return borrow_features(self._schema, batch, self._held.pool, features, before), before >= 0
        return self._multiplied(features, rows, _FACTORS[kind]), rows

    def _multiplied(self, features: Collection[str], rows: Tensor, factor: float) -> Batch:
        batch, schema = self._held.batch, self._schema
        factors = torch.ones(schema.num_dense)
        for column in schema.dense_columns:
            if column.name in features:
                factors[column.start : column.start + column.width] = factor
        dense = torch.where(rows[:, None], batch.dense * factors, batch.dense)
        sparse = batch.sparse
        if sparse.weights is not None:
            hit = torch.cat([rows & (key.feature in features) for key in schema.sparse_keys])
            weights = torch.where(torch.repeat_interleave(hit, sparse.lengths.long()), sparse.weights * factor, sparse.weights)
            sparse = replace(sparse, weights=weights)
        return replace(batch, sparse=sparse, dense=dense)
