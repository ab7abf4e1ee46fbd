"""Finding the row of a table by key, or by key and time: sorted once in memory, searched for a whole row group at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class DuplicateKeyError(Exception):
    """A key has several rows where it must have one."""

    def __init__(self, key_hash: int) -> None:
        super().__init__(key_hash)
        self.key_hash = key_hash


class Lookup:
    """Rows of a table by the hash of their key.

    With times, a key may have any number of rows: the latest that is known counts, and of equal ones the last in the table.

    Args:
        hashes: of the key of each row, ``(rows,)``.
        values: the columns that are joined, each ``(rows,)``.
        valid: since when each row holds, in microseconds, ``(rows,)``.
        known: since when it is known, ``(rows,)``; never falls where ``valid`` rises.

    Raises:
        DuplicateKeyError: there are no times, and a key has several rows.
    """

    def __init__(self, hashes: Hashes, values: Sequence[pa.Array], valid: Integers | None = None, known: Integers | None = None) -> None:
        self._order = np.argsort(hashes, kind="stable") if valid is None else np.lexsort((valid, hashes))
        in_order = hashes[self._order]
        is_first = np.ones(len(in_order), bool)
        is_first[1:] = in_order[1:] != in_order[:-1]
        if known is None and not is_first.all():
            raise DuplicateKeyError(int(in_order[np.argmin(is_first)]))
        self._hashes, self._values = in_order[is_first], values
        self._starts = np.flatnonzero(is_first)
        self._valid: Integers | None = None
        if known is not None and valid is not None:
            # A row's place among all (key, time) is one number: the place of its key times the number of moments, plus that of its time.
            self._moments, ranks = np.unique(known[self._order], return_inverse=True)
            self._times = (np.cumsum(is_first) - 1) * np.int64(len(self._moments) + 1) + ranks + 1
            self._valid = valid[self._order]

    def find(self, hashes: Hashes, times: Integers | None = None) -> Integers:
        """The place of each key's row, or of its latest row that is known at the time; -1 for none. ``(rows,)``."""
        if not len(self._hashes):
            return np.full(len(hashes), -1, np.int64)
        keys = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found = self._hashes[keys] == hashes
        if times is None:
            return np.where(found, self._starts[keys], -1)
        wanted = keys * np.int64(len(self._moments) + 1) + np.searchsorted(self._moments, times, side="right")
        places = np.searchsorted(self._times, wanted, side="right") - 1
        return np.where(found & (places >= self._starts[keys]), places, -1)

    def valid_since(self, places: Integers) -> Integers:
        """Since when the rows at these places hold; anything where the place is -1."""
        assert self._valid is not None
        return self._valid[places] if len(self._valid) else np.zeros(len(places), np.int64)

    def take(self, places: Integers) -> list[pa.Array]:
        """The values of the rows at these places, column by column; null where the place is -1."""
        missing = places < 0
        if not len(self._order):
            return [pa.nulls(len(places), column.type) for column in self._values]
        rows = pa.array(self._order[places], mask=missing if missing.any() else None)
        return [one_array(column.take(rows)) for column in self._values]


def one_array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Chunks as one array; they stay apart where one of its type cannot hold them."""
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
