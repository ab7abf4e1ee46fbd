"""Which ids a table should know, and how many share a row when they are hashed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlenv.datasets.counts import Counts
from mlenv.datasets.lists import as_list
from mlenv.datasets.statistics import Statistics
from mlenv.errors import ConfigError, check_at_least, nearest
from mlenv.schema import Schema


@dataclass(frozen=True)
class Vocabulary:
    """Ids of one table, the most frequent first, equally frequent ones in their own order."""

    table: str
    ids: tuple[str, ...]
    """As text, as ``Table.vocabulary`` takes them."""
    num_distinct: int
    """Ids that occur at all."""
    occurrence_share: float
    """Share of all occurrences that are of the chosen ids."""


def table_columns(schema: Schema, feature: str) -> tuple[str, tuple[str, ...]]:
    """The table of a feature, or of ``feature.field``, and the columns of all features that look it up.

    Raises:
        ConfigError: there is no such feature with a table.
    """
    tables = {key.name: key.table for key in schema.sparse_keys}
    if feature not in tables:
        raise ConfigError("FEATURE", expected="a feature of the schema with a table", received=feature, fix=nearest(feature, tables))
    table = tables[feature]
    return table, tuple(dict.fromkeys(key.column for key in schema.sparse_keys if key.table == table))


def build_vocabulary(batches: Iterable[pa.RecordBatch], schema: Schema, feature: str, min_count: int) -> Vocabulary:
    """Counts every id of a feature's table exactly, whichever feature it is in, and keeps those that occur often enough.

    Defaults of features are kept however rare, because they stand in for null. Memory grows with the distinct ids.

    Raises:
        ConfigError: there is no such feature with a table; or no id is frequent enough.
    """
    check_at_least("min_count", min_count, 1)
    table, columns = table_columns(schema, feature)
    counts: Counter[int | str] = Counter()
    for batch in batches:
        for column in columns:
            ids = _ids(batch.column(column))
            found = pc.value_counts(ids.cast(ids.type.value_type) if pa.types.is_dictionary(ids.type) else ids)
            for value, count in zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True):
                counts[value] += count
    chosen = [value for value in sorted(counts, key=lambda value: (-counts[value], value)) if counts[value] >= min_count]
    if not chosen:
        most = max(counts.values(), default=0)
        raise ConfigError("min_count", expected=f"at most {most}, how often the most frequent id occurs", received=min_count)
    defaults = [key.default for key in schema.sparse_keys if key.table == table and key.default is not None]
    texts = dict.fromkeys([*map(str, chosen), *defaults])
    share = sum(counts[value] for value in chosen) / counts.total()
    return Vocabulary(table, tuple(texts), len(counts), share)


def _ids(column: pa.Array) -> pa.Array:
    """All ids of a column, of lists their elements, without nulls."""
    if pa.types.is_nested(column.type):
        column = as_list(column).flatten()
        if pa.types.is_struct(column.type):
            column = column.flatten()[0]
    return column.drop_null()


def collision_shares(statistics: Statistics, schema: Schema) -> dict[str, tuple[int, float]]:
    """For each table whose ids are hashed: its distinct ids, and the share of them that share their row with another one.

    Exact while the statistics hold every id; beyond that what uniform hashing of as many ids gives.
    """
    shares = {}
    for name, table in schema.tables.items():
        if table.ids == "hash":
            columns = (statistics.columns[key.name] for key in schema.sparse_keys if key.table == name)
            counts = [column.values for column in columns if column.values is not None]
            shares[name] = _collisions(functools.reduce(Counts.merged, counts), table.num_embeddings)
    return shares


def _collisions(ids: Counts, num_embeddings: int) -> tuple[int, float]:
    if not ids.num_distinct:
        return 0, 0.0
    if ids.level:
        return ids.num_distinct, float(-np.expm1((ids.num_distinct - 1) * np.log1p(-1 / num_embeddings))) if num_embeddings > 1 else 1.0
    _, sharing = np.unique(ids.keys % np.uint64(num_embeddings), return_counts=True)
    return ids.num_distinct, float(sharing[sharing > 1].sum() / ids.num_distinct)
