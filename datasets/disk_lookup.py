"""Lookups in tables of any size: cut by the hash of the key into buckets, which are sorted one by one and kept in mapped files.

The memory that this takes of its own is about that of one bucket. What is looked up lies in the system's cache of files, which it
takes back when memory is short.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.datasets.lookup import HASH, TIME, Hashes, Integers, Lookup, one_array, sort_rows
from mlenv.errors import DataError

logger = logging.getLogger(__name__)

MAX_BUCKETS = 512
"""Files that are open at once; a table of more than this many times ``memory_rows`` has larger buckets."""

_KNOWN = "__known__"


def open_lookup(
    parts: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    known: Callable[[Integers], Integers] | None = None,
    *,
    num_rows: int,
    memory_rows: int,
) -> Lookup | DiskLookup:
    """Rows of a table as they are searched: in memory, or on the disk where there are more than ``memory_rows``.

    Args:
        parts, schema, known: see ``sort_rows``; both give the same answers and the same errors.
        num_rows: of the table, about.

    Raises:
        DuplicateKeyError: see ``sort_rows``.
        DataError: there is no room on the disk.
    """
    if num_rows <= memory_rows:
        return sort_rows(parts, schema, known)
    num_buckets = min(-(-num_rows // memory_rows), MAX_BUCKETS)
    logger.info("%d rows of a table are sorted in %d buckets on the disk, in %s", num_rows, num_buckets, tempfile.gettempdir())
    try:
        return DiskLookup(list(_sorted_buckets(parts, num_buckets, schema, known)))
    except OSError as error:
        fix = "set TMPDIR to a folder with room for the joined columns of the table twice, or raise memory_rows"
        expected = f"a temporary folder with room for {num_rows} rows of a table"
        raise DataError(tempfile.gettempdir(), expected=expected, received=str(error), fix=fix) from error


class DiskLookup:
    """See ``Lookup``. The hashes of a bucket are greater than those of the one before.

    Args:
        buckets: at least one.
    """

    def __init__(self, buckets: Sequence[Lookup]) -> None:
        self._buckets = buckets
        self._first = np.array([0, *accumulate(map(len, buckets))])

    def __len__(self) -> int:
        return int(self._first[-1])

    def find(self, hashes: Hashes, times: Integers | None = None) -> Integers:
        """See ``Lookup``."""
        return self._search(hashes, lambda bucket, rows: (bucket.find(hashes[rows], None if times is None else times[rows]),))[0]

    def between(self, hashes: Hashes, first: Integers, last: Integers) -> tuple[Integers, Integers]:
        """See ``Lookup``."""
        start, stop = self._search(hashes, lambda bucket, rows: bucket.between(hashes[rows], first[rows], last[rows]), 2)
        return start, stop

    def times_at(self, places: Integers) -> Integers:
        """See ``Lookup``."""
        times = np.zeros(len(places), np.int64)
        for bucket, first, rows in self._by_bucket(places):
            times[rows] = bucket.times_at(places[rows] - first)
        return times

    def take(self, places: Integers) -> list[pa.Array]:
        """See ``Lookup``."""
        nothing = np.flatnonzero(places < 0)
        rows_of_parts, parts = [nothing], [self._buckets[0].take(np.full(len(nothing), -1))]
        for bucket, first, rows in self._by_bucket(places):
            rows_of_parts.append(rows)
            parts.append(bucket.take(places[rows] - first))
        order = np.empty(len(places), np.int64)
        order[np.concatenate(rows_of_parts)] = np.arange(len(places))
        columns = (pa.chunked_array(column) for column in zip(*parts, strict=True))
        return [one_array(one_array(column).take(pa.array(order))) for column in columns]

    def _search(
        self, hashes: Hashes, search: Callable[[Lookup, Integers], tuple[Integers, ...]], num_results: int = 1
    ) -> tuple[Integers, ...]:
        """Asks each bucket for the rows whose hashes it holds, in their order, so that its pages are read one after the other."""
        found = np.empty((num_results, len(hashes)), np.int64)
        order = np.argsort(hashes)
        cuts = np.searchsorted(_bucket_of(hashes[order], len(self._buckets)), np.arange(len(self._buckets) + 1))
        for bucket, first, (start, stop) in zip(self._buckets, self._first[:-1], pairwise(cuts), strict=True):
            if start < stop:
                rows = order[start:stop]
                places = np.stack(search(bucket, rows))
                found[:, rows] = np.where(places < 0, places, places + first)
        return tuple(found)

    def _by_bucket(self, places: Integers) -> Iterator[tuple[Lookup, Integers, Integers]]:
        """Buckets that hold some of the places, the first place of each, and which of ``places`` they are, in rising order."""
        order = np.argsort(places)
        cuts = np.searchsorted(places[order], self._first)
        for bucket, first, (start, stop) in zip(self._buckets, self._first[:-1], pairwise(cuts), strict=True):
            if start < stop:
                yield bucket, first, order[start:stop]


def _sorted_buckets(
    parts: Iterable[pa.RecordBatch], num_buckets: int, schema: pa.Schema, known: Callable[[Integers], Integers] | None
) -> Iterator[Lookup]:
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_buckets)]
        _scatter(parts, files)
        for file in files:
            bucket = sort_rows(_mapped(file).to_batches(), schema, known)
            file.close()
            index = {HASH: bucket.hashes} | ({} if bucket.times is None else {TIME: bucket.times, _KNOWN: bucket.known})
            kept, values = _keep(pa.table(index)), _keep(pa.Table.from_arrays(bucket.values, schema=schema))
            del bucket
            hashes, *times = (one_array(column).to_numpy() for column in kept.columns)
            yield Lookup(hashes, [one_array(column) if column.num_chunks < 2 else column for column in values.columns], *times)


def _scatter(parts: Iterable[pa.RecordBatch], files: Sequence[IO[bytes]]) -> None:
    """Writes rows to the file of their bucket; their order stays."""
    with ExitStack() as stack:
        writers: list[pa.ipc.RecordBatchStreamWriter] = []
        for rows in parts:
            writers = writers or [stack.enter_context(pa.ipc.new_stream(file, rows.schema)) for file in files]
            buckets = _bucket_of(rows.column(HASH).to_numpy(), len(files))
            order = np.argsort(buckets, kind="stable")
            in_order, cuts = rows.take(pa.array(order)), np.searchsorted(buckets[order], np.arange(len(files) + 1))
            for writer, (start, stop) in zip(writers, pairwise(cuts), strict=True):
                if start < stop:
                    writer.write_batch(in_order.slice(start, stop - start))


def _bucket_of(hashes: Hashes, num_buckets: int) -> NDArray[np.int16]:
    """Equal ranges of hashes: the buckets in their order hold the table in the order in which a lookup in memory has it, so that
    both find the same key first that has several rows."""
    return ((hashes >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int16)  # which NumPy sorts by radix


def _keep(rows: pa.Table) -> pa.Table:
    """The same rows in a file instead of in memory."""
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
        return _mapped(file)


def _mapped(file: IO[bytes]) -> pa.Table:
    """What was written to a file, as a view of it.

    The file has no name, so that it is gone with the last view of it, however the process ends: it is opened by its number.
    """
    file.flush()
    if not file.tell():
        return pa.table({})
    with pa.memory_map(f"/proc/self/fd/{file.fileno()}") as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()
