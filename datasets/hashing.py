"""Stable hashes of ids: the same on every machine and with every version of every library."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray


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
