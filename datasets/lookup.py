"""Finding the rows of a table by key, or by key and time: sorted once, searched for a whole row group at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]

HASH, TIME = "__hash__", "__time__"
"""Columns of the rows of a table on their way into a lookup, before the values: hash of the key and, where it matters, time."""

_LARGE_BYTES = 2**30
"""A column beyond this is sorted in several chunks: an Arrow array of texts or lists holds 2 GiB at most."""


class DuplicateKeyError(Exception):
    """A key has several rows where it must have one."""

    def __init__(self, key_hash: int) -> None:
        super().__init__(key_hash)
        self.key_hash = key_hash


class Lookup:
    """Rows of a table in the order of the hashes of their keys and, with times, of the time; see ``sort_rows``.

    With times, a key may have any number of rows.

    Args:
        hashes: of the key of each row, ``(rows,)``, in rising order.
        values: the columns that are joined, each ``(rows,)``.
        times: since when each row holds, or when it happened, in microseconds, ``(rows,)``, rising for each hash.
        known: since when it is known, ``(rows,)``; never falls where ``times`` rises.
    """

    def __init__(
        self,
        hashes: Hashes,
        values: Sequence[pa.Array | pa.ChunkedArray],
        times: Integers | None = None,
        known: Integers | None = None,
    ) -> None:
        self.hashes, self.values, self.times, self.known = hashes, values, times, known

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, hashes: Hashes, times: Integers | None = None) -> Integers:
        """The place of each key's row, or of its latest row that is known at the time; -1 for none. ``(rows,)``."""
        start, stop = self._rows_of(hashes)
        if times is not None:
            assert self.known is not None
            stop = _bisect(self.known, start, stop, times, equal_is_before=True)
        return np.where(start < stop, stop - 1, -1)

    def between(self, hashes: Hashes, first: Integers, last: Integers) -> tuple[Integers, Integers]:
        """Start and stop of the places of each key's rows with a time from ``first`` to ``last``, both included."""
        assert self.times is not None
        start, stop = self._rows_of(hashes)
        start = _bisect(self.times, start, stop, first, equal_is_before=False)
        return start, _bisect(self.times, start, stop, last, equal_is_before=True)

    def _rows_of(self, hashes: Hashes) -> tuple[Integers, Integers]:
        """Start and stop of the places of each key. Keys in order are found where the one before was, in memory that is at hand."""
        start, stop = np.empty(len(hashes), np.int64), np.empty(len(hashes), np.int64)
        order = np.argsort(hashes)
        in_order = hashes[order]
        start[order] = np.searchsorted(self.hashes, in_order)
        stop[order] = np.searchsorted(self.hashes, in_order, side="right")
        return start, stop

    def times_at(self, places: Integers) -> Integers:
        """Times of the rows at these places; anything where the place is -1."""
        assert self.times is not None
        return self.times[places] if len(self) else np.zeros(len(places), np.int64)

    def take(self, places: Integers) -> list[pa.Array]:
        """The values of the rows at these places, column by column; null where the place is -1."""
        if not len(self):
            return [pa.nulls(len(places), column.type) for column in self.values]
        missing = places < 0
        rows = pa.array(places, mask=missing if missing.any() else None)
        return [one_array(column.take(rows)) for column in self.values]


def sort_rows(parts: Iterable[pa.RecordBatch], schema: pa.Schema, known: Callable[[Integers], Integers] | None = None) -> Lookup:
    """Rows of a table as they are searched; of those with one key and one time the last in the table is the last.

    Args:
        parts: HASH, TIME if ``known`` is given, and the values.
        schema: of the values.
        known: since when rows are known, given their times; without it times do not matter.

    Raises:
        DuplicateKeyError: times do not matter, and a key has several rows.
    """
    batches, first = list(parts), 1 if known is None else 2
    columns = [pa.chunked_array([rows.column(place) for rows in batches], field.type) for place, field in enumerate(schema, first)]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(rows.column(0).to_numpy() for rows in batches)])
    times = None if known is None else np.concatenate([np.zeros(0, np.int64), *(rows.column(1).to_numpy() for rows in batches)])
    del batches
    order = np.argsort(hashes) if times is None else np.lexsort((times, hashes))
    hashes = hashes[order]
    if known is None or times is None:
        is_same = hashes[1:] == hashes[:-1]
        if is_same.any():
            raise DuplicateKeyError(int(hashes[np.argmax(is_same)]))
    else:
        times = times[order]
    values = [_in_order(columns.pop(0), order) for _ in schema]
    return Lookup(hashes, values, times, None if known is None or times is None else known(times))


def one_array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Chunks as one array; they stay apart where one of its type cannot hold them."""
    if not isinstance(values, pa.ChunkedArray):
        return values
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()  # which would copy the one


def _in_order(column: pa.ChunkedArray, order: Integers) -> pa.Array | pa.ChunkedArray:
    if column.nbytes < _LARGE_BYTES:
        return one_array(column).take(pa.array(order))
    parts = np.array_split(order, column.nbytes // (_LARGE_BYTES // 2))
    return pa.chunked_array([one_array(column.take(pa.array(part))) for part in parts], column.type)


def _bisect(numbers: Integers, start: Integers, stop: Integers, wanted: Integers, *, equal_is_before: bool) -> Integers:
    """Where ``wanted`` belongs among the rising numbers from ``start`` to ``stop``, for all of them at once. ``(rows,)``."""
    low, high = start.copy(), stop.copy()
    while len(left := np.flatnonzero(low < high)):
        middle = (low[left] + high[left]) // 2
        is_before = numbers[middle] <= wanted[left] if equal_is_before else numbers[middle] < wanted[left]
        low[left] = np.where(is_before, middle + 1, low[left])
        high[left] = np.where(is_before, high[left], middle)
    return low
