"""Stable hashes of ids: the same on every machine and with every version of every library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

_NULL = np.uint64(0x6A09E667F3BCC909)
"""Hash of a null."""


def hash_ids(ids: pa.Array) -> NDArray[np.uint64]:
    """Hashes ids without nulls to 64 bits: integers by splitmix64, strings by xxhash64 of their UTF-8 bytes.

    Strings are hashed once per distinct value.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (splitmix64).
    """
    if pa.types.is_integer(ids.type):
        return splitmix64(as_int64(ids).view(np.uint64))
    encoded = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
    texts = encoded.dictionary.cast(pa.large_binary()).to_pylist()
    distinct = np.fromiter(map(xxhash.xxh64_intdigest, texts), np.uint64, len(texts))
    hashed: NDArray[np.uint64] = distinct[encoded.indices.to_numpy()]
    return hashed


def hash_rows(columns: Sequence[pa.Array]) -> NDArray[np.uint64]:
    """Hashes what several columns hold in a row to 64 bits; nulls are a value like any other, and lists may be nested.

    The width of an integer or of a float, and whether texts are stored as a dictionary, do not matter.
    """
    combined = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        combined = splitmix64(combined ^ _hash_values(column))
    return combined


def _hash_values(values: pa.Array) -> NDArray[np.uint64]:
    if values.null_count:
        known = values.is_valid().to_numpy(zero_copy_only=False)
        hashed = np.full(len(values), _NULL, np.uint64)
        hashed[known] = _hash_values(values.drop_null())
        return hashed
    kind = values.type
    if pa.types.is_dictionary(kind) and not _is_text(kind.value_type):
        return _hash_values(values.dictionary_decode())
    if pa.types.is_boolean(kind):
        return hash_ids(values.cast(pa.int8()))
    if pa.types.is_floating(kind):
        floats = values.cast(pa.float64()).to_numpy() + 0.0  # -0.0 is 0.0
        return splitmix64(np.where(np.isnan(floats), np.nan, floats).view(np.uint64))
    if pa.types.is_temporal(kind):
        return hash_ids(values.cast(pa.int64() if values.type.bit_width == 64 else pa.int32()))
    if pa.types.is_struct(kind):
        return hash_rows(values.flatten())
    if pa.types.is_map(kind):
        return _hash_values(values.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(values).cast(pa.int64()).to_numpy()
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        mixed = splitmix64(_hash_values(values.flatten()) + splitmix64(places.view(np.uint64)))
        sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed)])
        return splitmix64(sums[ends] - sums[ends - lengths] + lengths.view(np.uint64))
    return hash_ids(values if pa.types.is_integer(kind) or pa.types.is_dictionary(kind) else values.cast(pa.large_string()))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def as_int64(ids: pa.Array) -> NDArray[np.int64]:
    """Integers of any width in 64 bits; an unsigned one of 2^63 or more becomes the negative number of the same bits."""
    if pa.types.is_uint64(ids.type):
        unsigned: NDArray[np.uint64] = ids.to_numpy()
        return unsigned.view(np.int64)
    signed: NDArray[np.int64] = ids.cast(pa.int64()).to_numpy()
    return signed


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes 64-bit integers so that every output bit depends on every input bit; a bijection."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
