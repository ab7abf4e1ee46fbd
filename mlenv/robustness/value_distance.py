"""How far two values of a feature are apart, from 0 for the same to 1 for as far as any two rows, whatever the feature holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_rows
from mlenv.datasets.lists import as_list

ValueKind = Literal["number", "id", "vector", "bag"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.uint64]

ROUNDING: Final = 1e-6
"""Relative; float32 keeps seven digits."""
_CHUNK: Final = 100_000
"""Rows whose lists are taken apart at once."""


@dataclass(frozen=True)
class Compared:
    """Row by row, what a feature holds on two sides."""

    kind: ValueKind
    distances: Floats
    """In [0, 1]; 0 where the values are the same but for noise."""

    @property
    def differs(self) -> Flags:
        return self.distances > 0


def kind_of_values(first: pa.DataType, second: pa.DataType) -> ValueKind | None:
    """What values of these types are compared as; None when they have nothing in common."""
    if _is_list(first) and _is_list(second):
        return "vector" if all(_is_vector(kind) for kind in (first, second)) else "bag"
    if _is_list(first) or _is_list(second) or pa.types.is_struct(first) or pa.types.is_struct(second):
        return None
    numeric = [_is_number(kind) for kind in (first, second)]
    if all(numeric) and any(pa.types.is_floating(kind) or pa.types.is_decimal(kind) for kind in (first, second)):
        return "number"
    return "id"


def compare_values(first: pa.ChunkedArray, second: pa.ChunkedArray, tolerance: float, seed: int = 0) -> Compared:
    """
    Numbers and vectors: the distance over that of two random rows (the median of those that differ). Ids: 0 or 1. Lists of ids: 1 -
    Jaccard, of pairs by weight. Null against a value is 1; a null list is empty.

    Args:
        first, second: of types that ``kind_of_values`` has a kind for, of equal length.
        tolerance: share of the distance of two random rows that does not count, beside the rounding of float32.
        seed: of the random rows.
    """
    kind = kind_of_values(first.type, second.type)
    assert kind is not None
    if kind == "bag":
        return Compared(kind, _of_bags(first, second, tolerance))
    if kind == "id":
        left, right = comparable_ids(first, second)
        return Compared(kind, left.ne_missing(right).to_numpy().astype(np.float64))
    if kind == "number":
        left_number, right_number = as_numbers(first), as_numbers(second)
        return Compared(kind, _of_vectors(left_number[:, None], right_number[:, None], tolerance, seed))
    vectors = _as_vectors(first, second)
    distances = _of_vectors(*vectors, tolerance, seed)
    neither = _has_nan(vectors[0]) & _has_nan(vectors[1])  # null, or of another length on both sides
    distances[neither] = (codes_of_values(first, kind) != codes_of_values(second, kind))[neither]
    return Compared(kind, distances)


def codes_of_values(values: pa.ChunkedArray, kind: ValueKind) -> Codes:
    """Equal for equal values, whatever the width of their numbers."""
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if kind == "number":
        return hash_rows([pa.array(as_numbers(values).astype(np.float32), from_pandas=True)])
    if kind == "vector":
        return hash_rows([whole.cast(pa.list_(pa.float32()))])
    if pa.types.is_map(whole.type) and pa.types.is_floating(whole.type.item_type):
        return hash_rows([whole.cast(pa.map_(whole.type.key_type, pa.float32()))])
    return hash_rows([whole])


def comparable_ids(first: pa.ChunkedArray, second: pa.ChunkedArray) -> tuple[pl.Series, pl.Series]:
    """Integers and flags as numbers, times as microseconds, anything else as text."""
    sides = [column.cast(pa.timestamp("us")) if pa.types.is_timestamp(column.type) else column for column in (first, second)]
    are_numbers = all(pa.types.is_timestamp(side.type) or _is_number(side.type) for side in sides)
    kind = pl.Int64 if are_numbers else pl.String
    left, right = (pl.Series(pl.from_arrow(side)).cast(kind, wrap_numerical=True) for side in sides)
    return left, right


def as_numbers(values: pa.ChunkedArray) -> Floats:
    """Null is NaN."""
    numbers: Floats = pl.Series(pl.from_arrow(values)).cast(pl.Float64).to_numpy().copy()
    return numbers


def is_nothing(values: pa.ChunkedArray) -> Flags:
    """Null, NaN or an empty list."""
    if _is_list(values.type):
        lists = values.combine_chunks()
        found: Flags = pc.fill_null(pc.equal(pc.list_value_length(as_list(lists)), 0), True).to_numpy(zero_copy_only=False)
        return found
    missing: Flags = np.asarray(values.is_null(nan_is_null=True))
    return missing


def _of_vectors(first: Floats, second: Floats, tolerance: float, seed: int) -> Floats:
    """Of ``(rows, width)``; a row with a NaN has no value."""
    has_first, has_second = ~_has_nan(first), ~_has_nan(second)
    far = np.linalg.norm(np.where(has_first[:, None] & has_second[:, None], first - second, 0.0), axis=1)
    size = np.maximum(np.linalg.norm(np.nan_to_num(first), axis=1), np.linalg.norm(np.nan_to_num(second), axis=1))
    usual = _usual_distance(second[has_second], seed)
    noise = np.maximum(ROUNDING * size, tolerance * usual)
    distances: Floats = np.where(far > noise, np.minimum(far / usual, 1.0), 0.0)
    distances[has_first != has_second] = 1.0
    return distances


def _has_nan(vectors: Floats) -> Flags:
    found: Flags = np.isnan(vectors).sum(axis=1) > 0
    return found


def _usual_distance(vectors: Floats, seed: int) -> float:
    """Median distance of two random rows, of those that differ; of equal rows their size."""
    if not len(vectors):
        return 1.0
    far = np.linalg.norm(vectors - vectors[np.random.default_rng(seed).permutation(len(vectors))], axis=1)
    if (far > 0).any():
        return float(np.median(far[far > 0]))
    return float(np.linalg.norm(vectors[0])) or 1.0


def _as_vectors(first: pa.ChunkedArray, second: pa.ChunkedArray) -> tuple[Floats, Floats]:
    """As wide as the widest; a null list is NaN, and so is one of another length than the most common of both sides."""
    sides = [pl.Series(pl.from_arrow(column.cast(pa.list_(pa.float64())))) for column in (first, second)]
    lengths = np.concatenate([side.list.len().fill_null(0).to_numpy() for side in sides]).astype(np.int64)
    width = int(np.bincount(lengths[lengths > 0]).argmax()) if (lengths > 0).any() else 1
    vectors = []
    for side in sides:
        fits = (side.list.len() == width).fill_null(False).to_numpy()
        numbers = np.full((len(side), width), np.nan)
        numbers[fits] = side.filter(pl.Series(fits)).explode().to_numpy().reshape(-1, width)
        vectors.append(numbers)
    return vectors[0], vectors[1]


def _of_bags(first: pa.ChunkedArray, second: pa.ChunkedArray, tolerance: float) -> Floats:
    """1 - the sum of the smaller weights over that of the larger ones; ids without weights count as often as they occur.

    Source: Ioffe, "Improved consistent sampling, weighted minhash and L1 sketching", ICDM 2010 (weighted Jaccard similarity).
    """
    parts = []
    for start in range(0, len(first), _CHUNK):
        sides = [_weights(column.slice(start, _CHUNK)) for column in (first, second)]
        joined = sides[0].join(sides[1], on=["row", "id"], how="full", coalesce=True, suffix="_second")
        joined = joined.with_columns(pl.col("weight", "weight_second").fill_null(0.0))
        sums = joined.group_by("row").agg(
            (pl.col("weight") - pl.col("weight_second")).abs().sum().alias("apart"),
            pl.max_horizontal(pl.col("weight").abs(), pl.col("weight_second").abs()).sum().alias("all"),
        )
        distances = np.zeros(min(_CHUNK, len(first) - start))
        shares = (sums["apart"] / sums["all"]).fill_nan(0.0).clip(0.0, 1.0).to_numpy()
        distances[sums["row"].to_numpy()] = np.where(shares > max(tolerance, ROUNDING), shares, 0.0)
        parts.append(distances)
    return np.concatenate(parts) if parts else np.zeros(0)


def _weights(column: pa.ChunkedArray) -> pl.DataFrame:
    """Row, id as text and weight of what lists hold."""
    lists = pl.Series("id", pl.from_arrow(pa.chunked_array([as_list(chunk) for chunk in column.chunks], type=_list_type(column.type))))
    frame = pl.DataFrame({"row": np.arange(len(lists)), "id": lists}).filter(pl.col("id").list.len() > 0).explode("id")
    inner = frame.schema["id"]
    if isinstance(inner, pl.Struct):
        identity, weight = (field.name for field in inner.fields)
        frame = frame.with_columns(
            pl.col("id").struct.field(identity).alias("id"),
            pl.col("id").struct.field(weight).fill_null(0.0).cast(pl.Float64).alias("weight"),
        )
    else:
        frame = frame.with_columns(pl.lit(1.0).alias("weight"))
    return frame.with_columns(pl.col("id").cast(pl.String)).drop_nulls("id").group_by("row", "id").agg(pl.col("weight").sum())


def _list_type(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])) if pa.types.is_map(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_map(kind))


def _is_vector(kind: pa.DataType) -> bool:
    return not pa.types.is_map(kind) and bool(pa.types.is_floating(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return any(is_type(kind) for is_type in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal))
