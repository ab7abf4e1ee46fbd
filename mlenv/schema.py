"""The unified feature representation: what every column is, and how it becomes tensors. Pure data, no tensors here.

A feature's *storage* is what the column holds (an id is an int64 or a string; the list around it follows from
the kind); its *kind* is how the column is read. Embedding tables stand on their own, so that features share them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from mlenv.errors import ConfigError, MlenvError, Problems, check_at_least, nearest
from mlenv.kinds import kind_field, kind_of

Entity = Literal["user", "item", "context", "request"]
IdStorage = Literal["int64", "string"]
SparseGroup = Literal["single", "bag", "weighted_bag", "sequence"]
Lookup = Literal["pooled", "pooled_weighted", "unpooled"]

WIDEST_BY_RULE = 64
"""Widest row that ``Table.embedding_dim: 0`` gives; the rule would go on, to 190 for a million rows."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table and the way ids reach its rows."""

    num_embeddings: int
    """Rows of the table."""
    embedding_dim: int = 0
    """Width of a row; 0 takes ``6 * num_embeddings ** 0.25``, rounded to a multiple of 4, at most 64.

    Source: Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017, arXiv:1708.05123.
    """
    ids: Literal["index", "hash", "vocabulary"] = "index"
    """index: the id is the row; hash: the stable hash of the id picks the row; vocabulary: its place in the list does."""
    vocabulary: tuple[str, ...] = ()
    """Known ids in row order, as text; for ids: vocabulary."""
    out_of_range: Literal["error", "hash"] = "error"
    """An id outside the table: refused, or hashed (over all rows; under a vocabulary, over the rows that it leaves spare)."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of one bag become one vector; an empty bag is zeros."""

    def __post_init__(self) -> None:
        check_at_least("num_embeddings", self.num_embeddings, 1)
        check_at_least("embedding_dim", self.embedding_dim, 0)
        if not self.embedding_dim:
            by_rule = min(4 * round(6 * self.num_embeddings**0.25 / 4), WIDEST_BY_RULE)
            object.__setattr__(self, "embedding_dim", by_rule)  # here, so that a composed config says the width
        if (self.ids == "vocabulary") != bool(self.vocabulary):
            raise ConfigError("vocabulary", expected="a list of ids exactly when ids is 'vocabulary'", received=self.vocabulary)
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ConfigError(
                "vocabulary",
                expected="each id once",
                received=len(self.vocabulary) - len(set(self.vocabulary)),
                fix="remove the repeated ids",
            )
        spare = self.num_embeddings - len(self.vocabulary)
        if self.vocabulary and spare < (1 if self.out_of_range == "hash" else 0):
            raise ConfigError(
                "num_embeddings",
                expected=f"at least the {len(self.vocabulary)} ids of the vocabulary"
                + (" and one spare row to hash into" if self.out_of_range == "hash" else ""),
                received=self.num_embeddings,
            )


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What all kinds of features have."""

    entity: Entity = "context"
    """Whom the feature describes."""
    owner: str = ""
    """Team or person to ask about it."""
    core: bool = False
    """Validated strictly: the model cannot do without it."""
    column: str = ""
    """Column of the data; the feature's own name when empty."""


@dataclass(frozen=True, kw_only=True)
class Numeric(Feature):
    """One number. Any Arrow integer, float or boolean column."""

    default: float | None = 0.0
    """Stands in for null and NaN; null keeps them, and the model learns what stands in."""
    log1p: bool = False
    """Compress heavy tails: sign(x) * log(1 + |x|), before normalization."""

    def __post_init__(self) -> None:
        if self.default is not None and not math.isfinite(self.default):
            raise ConfigError("default", expected="a finite number or null", received=self.default)


@dataclass(frozen=True, kw_only=True)
class Binary(Feature):
    """Yes or no: a boolean column, or an integer column of 0 and 1. Enters the model as 0.0 or 1.0."""

    default: bool = False
    """Stands in for null."""


@dataclass(frozen=True, kw_only=True)
class DenseVector(Feature):
    """A vector of fixed size, such as a pretrained embedding: list or fixed-size list of numbers. Null is all zeros."""

    dim: int
    """Length of every vector."""

    def __post_init__(self) -> None:
        check_at_least("dim", self.dim, 1)


@dataclass(frozen=True, kw_only=True)
class Categorical(Feature):
    """One id. Null without a default is an empty bag."""

    storage: IdStorage = "int64"
    """What the column holds."""
    table: str = ""
    """Embedding table; the feature's own name when empty."""
    default: str | None = None
    """Id that stands in for null."""


@dataclass(frozen=True, kw_only=True)
class MultiCategorical(Feature):
    """A bag of ids: a list column. Null is an empty bag; null elements are dropped."""

    storage: IdStorage = "int64"
    """What the elements of the list are."""
    table: str = ""
    """Embedding table; the feature's own name when empty."""
    max_length: int = 0
    """Keep the first ids only; 0 keeps all."""

    def __post_init__(self) -> None:
        check_at_least("max_length", self.max_length, 0)


@dataclass(frozen=True, kw_only=True)
class Weighted(Feature):
    """A bag of ids, each with a weight: an Arrow map, or a list of (id, weight) structs. A null weight is 0."""

    storage: IdStorage = "int64"
    """What the ids are."""
    table: str = ""
    """Embedding table; the feature's own name when empty."""
    max_length: int = 0
    """Keep the first pairs only; 0 keeps all."""

    def __post_init__(self) -> None:
        check_at_least("max_length", self.max_length, 0)


@dataclass(frozen=True, kw_only=True)
class SequenceField:
    """One of the aligned lists of a sequence."""

    storage: IdStorage = "int64"
    """What the elements are."""
    table: str = ""
    """Embedding table; ``feature_field`` when empty."""
    column: str = ""
    """Column of the data; ``feature_field`` when empty."""


@dataclass(frozen=True, kw_only=True)
class Sequence(Feature):
    """Past events, oldest first: several list columns of equal length in every row. Null is an empty sequence."""

    fields: dict[str, SequenceField]
    """Lists by name, such as item, action and placement."""
    max_length: int = 50
    """Keep at most this many events."""
    keep: Literal["last", "first"] = "last"
    """Which end of a longer sequence stays."""

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError("fields", expected="at least one field", received=self.fields)
        check_at_least("max_length", self.max_length, 1)
        if self.column:
            raise ConfigError(
                "column", expected="no column for the whole sequence", received=self.column, fix="name the column of each field"
            )


FEATURES: dict[str, type | str] = {
    "numeric": Numeric,
    "binary": Binary,
    "dense_vector": DenseVector,
    "categorical": Categorical,
    "multi_categorical": MultiCategorical,
    "weighted": Weighted,
    "sequence": Sequence,
}


@dataclass(frozen=True, kw_only=True)
class Label:
    """A binary target; its name in the schema is the name of the task."""

    column: str = ""
    """Column of 0 and 1, or of booleans; the task's own name when empty."""
    mask: str = ""
    """Boolean column: where it is false or null the example does not count for this task, and its label may be null."""
    weight: str = ""
    """Column of non-negative numbers; 1 when empty."""
    truth: str = ""
    """Column of the true probability, which only simulated data know; evaluation reports its metrics as the best reachable."""
    teacher: str = ""
    """Column of a teacher's predictions, for distillation; null where it has none."""


@dataclass(frozen=True)
class SparseKey:
    """One key of ``SparseFeatures``: a list of ids that is looked up in one table."""

    name: str
    """Feature name; ``feature.field`` for a field of a sequence."""
    column: str
    storage: IdStorage
    table: str
    group: SparseGroup
    lookup: Lookup
    """unpooled: the table also serves a sequence, or both plain and weighted bags, so that its rows are fetched one by one."""
    feature: str
    max_length: int
    """0: no limit."""
    keep: Literal["last", "first"]
    default: str | None


@dataclass(frozen=True)
class DenseColumn:
    """One column of ``Batch.dense``, or several for a vector."""

    name: str
    column: str
    start: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Features, tables, labels and the columns that pass through. Checked as a whole when it is made.

    Raises:
        Problems: names every feature without a table, table without a feature, and name used twice.
    """

    features: dict[str, Feature] = kind_field(FEATURES)
    """Inputs of the model, by name."""
    tables: dict[str, Table] = field(default_factory=dict)
    """Embedding tables, by name; several features may share one."""
    labels: dict[str, Label]
    """Targets by task, in the order of the model's outputs."""
    row_key: tuple[str, ...] = ()
    """Columns that identify a row; carried into predictions."""
    request: str = ""
    """Column that groups rows shown together; grouped AUC is computed within it."""
    event_time: str = ""
    """Timestamp column."""
    segments: tuple[str, ...] = ()
    """Columns by whose values every metric is also reported."""

    def __post_init__(self) -> None:
        problems = [*self._label_problems(), *self._table_problems()]
        if not self.features:
            problems.append(ConfigError("features", expected="at least one feature", received={}))
        if problems:
            raise Problems("schema", problems)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the columns of logits, labels and weights."""
        return tuple(self.labels)

    @property
    def table_dims(self) -> dict[str, int]:
        """``embedding_dim`` of each table."""
        return {name: table.embedding_dim for name, table in self.tables.items()}

    @cached_property
    def sparse_keys(self) -> tuple[SparseKey, ...]:
        """Keys of ``SparseFeatures``, ordered by lookup, so that the keys of each lookup are contiguous in memory."""
        groups: dict[str, set[SparseGroup]] = {}
        for key in self._sparse_keys():
            groups.setdefault(key.table, set()).add(key.group)
        order = typing.get_args(Lookup)
        keys = (dataclasses.replace(key, lookup=_lookup(groups[key.table])) for key in self._sparse_keys())
        # Rows that are fetched one by one lie in tables of one width each, because TorchRec's collections want it so.
        width = self.table_dims
        return tuple(sorted(keys, key=lambda key: (order.index(key.lookup), width[key.table] if key.lookup == "unpooled" else 0)))

    @cached_property
    def dense_columns(self) -> tuple[DenseColumn, ...]:
        """Columns of ``Batch.dense``, in schema order."""
        columns: list[DenseColumn] = []
        for name, feature in self.features.items():
            if isinstance(feature, (Numeric, Binary, DenseVector)):
                start = columns[-1].start + columns[-1].width if columns else 0
                columns.append(DenseColumn(name, feature.column or name, start, feature.dim if isinstance(feature, DenseVector) else 1))
        return tuple(columns)

    @property
    def num_dense(self) -> int:
        """Width of ``Batch.dense``."""
        columns = self.dense_columns
        return columns[-1].start + columns[-1].width if columns else 0

    @property
    def metadata_columns(self) -> tuple[str, ...]:
        """Columns that pass through to metrics and predictions, each once."""
        truths = (label.truth for label in self.labels.values())
        return tuple(dict.fromkeys(name for name in (*self.row_key, self.request, self.event_time, *self.segments, *truths) if name))

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that labels read and no feature does, with their masks, weights, truths and teachers, each once."""
        parts = ((label.column or task, label.mask, label.weight, label.truth, label.teacher) for task, label in self.labels.items())
        apart = {"", *self.feature_columns}
        return tuple(dict.fromkeys(name for names in parts for name in names if name not in apart))

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Columns that features read, each once."""
        return tuple(dict.fromkeys([*(key.column for key in self.sparse_keys), *(dense.column for dense in self.dense_columns)]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that training reads, each once."""
        labels = [name for task, label in self.labels.items() for name in (label.column or task, label.mask, label.weight) if name]
        return tuple(dict.fromkeys([*self.feature_columns, *labels]))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever the model's inputs or outputs do; owners and pass-through columns do not count."""
        description = {**self._description(), "order": [list(self.features), list(self.labels)]}
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Schema) -> list[str]:
        """What ``other`` has that this schema has not, by feature, table and label; empty when the fingerprints agree."""
        mine, theirs = self._description(), other._description()
        lines = []
        for section in mine:
            before, after = mine[section], theirs[section]
            lines += [f"{section}.{name}: removed" for name in before if name not in after]
            lines += [f"{section}.{name}: added" for name in after if name not in before]
            for name in (name for name in before if name in after and before[name] != after[name]):
                keys = [key for key in {**before[name], **after[name]} if before[name].get(key) != after[name].get(key)]
                lines += [f"{section}.{name}.{key}: {before[name].get(key)!r} became {after[name].get(key)!r}" for key in keys]
        for section in ("features", "labels"):
            if not lines and list(mine[section]) != list(theirs[section]):
                lines.append(f"{section}: the order {list(mine[section])} became {list(theirs[section])}")
        return lines

    def _description(self) -> dict[str, dict[str, dict[str, object]]]:
        """All that decides tensors and parameters, by section and name."""
        ignored = {"owner", "entity", "core", "truth", "teacher"}

        def describe(entry: Feature | Table | Label) -> dict[str, object]:
            return {key: value for key, value in dataclasses.asdict(entry).items() if key not in ignored}

        return {
            "features": {name: {"kind": kind_of(feature, FEATURES), **describe(feature)} for name, feature in self.features.items()},
            "tables": {name: describe(table) for name, table in self.tables.items()},
            "labels": {name: describe(label) for name, label in self.labels.items()},
        }

    def _sparse_keys(self) -> Iterator[SparseKey]:
        """Keys in schema order; how they are looked up depends on all users of a table and is set by ``sparse_keys``."""
        for name, feature in self.features.items():
            if isinstance(feature, Categorical):
                yield _sparse_key(name, feature, "single", max_length=1, default=feature.default)
            elif isinstance(feature, MultiCategorical):
                yield _sparse_key(name, feature, "bag", max_length=feature.max_length)
            elif isinstance(feature, Weighted):
                yield _sparse_key(name, feature, "weighted_bag", max_length=feature.max_length)
            elif isinstance(feature, Sequence):
                for part, entry in feature.fields.items():
                    key = _sparse_key(f"{name}_{part}", entry, "sequence", max_length=feature.max_length)
                    yield dataclasses.replace(key, name=f"{name}.{part}", feature=name, keep=feature.keep)

    def _table_problems(self) -> Iterator[MlenvError]:
        used = set()
        names = [key.name for key in self._sparse_keys()]
        for name in {name for name in names if names.count(name) > 1}:
            yield ConfigError(
                f"features.{name}", expected="a name of its own", received=name, fix="rename the feature or the field of the sequence"
            )
        for key in self._sparse_keys():
            used.add(key.table)
            if key.table not in self.tables:
                yield ConfigError(
                    f"features.{key.name}.table",
                    expected="a table of the schema",
                    received=key.table,
                    fix=f"add tables.{key.table}; {nearest(key.table, self.tables)}",
                )
                continue
            texts = [*self.tables[key.table].vocabulary, *([key.default] if key.default is not None else [])]
            if key.storage == "int64" and (wrong := [text for text in texts if not _is_int64(text)]):
                yield ConfigError(
                    f"features.{key.name}", expected="a default and a vocabulary of integers, as its ids are", received=wrong[0]
                )
            if key.storage == "string" and self.tables[key.table].ids == "index":
                yield ConfigError(
                    f"tables.{key.table}.ids", expected=f"hash or vocabulary, because feature {key.name} holds strings", received="index"
                )
        for name in (name for name in self.tables if "." in name):
            yield ConfigError(
                f"tables.{name}", expected="a name without dots, because it becomes part of a parameter's name", received=name
            )
        for name in self.tables.keys() - used:
            yield ConfigError(
                f"tables.{name}", expected="a feature that uses it", received="none", fix="remove the table, or name it in a feature"
            )

    def _label_problems(self) -> Iterator[MlenvError]:
        if not self.labels:
            yield ConfigError("labels", expected="at least one task", received={})
        inputs = {key.column for key in self._sparse_keys()} | {dense.column for dense in self.dense_columns}
        for task, label in self.labels.items():
            if not task or "." in task or "@" in task:
                yield ConfigError(
                    f"labels.{task}", expected="a name without '.' and '@', which parameters and metrics put after it", received=task
                )
            column = label.column or task
            if column in inputs:
                yield ConfigError(
                    f"labels.{task}", expected="a column that no feature reads", received=column, fix="a model must not see its own target"
                )


def _is_int64(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None and -(2**63) <= int(text) < 2**63


def _sparse_key(
    name: str,
    source: Categorical | MultiCategorical | Weighted | SequenceField,
    group: SparseGroup,
    *,
    max_length: int,
    default: str | None = None,
) -> SparseKey:
    return SparseKey(
        name=name,
        column=source.column or name,
        storage=source.storage,
        table=source.table or name,
        group=group,
        lookup="pooled",
        feature=name,
        max_length=max_length,
        keep="first",
        default=default,
    )


def _lookup(groups: set[SparseGroup]) -> Lookup:
    """How a table that serves these groups of keys is looked up."""
    if groups <= {"single", "bag"}:
        return "pooled"
    return "pooled_weighted" if groups == {"weighted_bag"} else "unpooled"
