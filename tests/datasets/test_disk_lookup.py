"""Lookups on the disk answer as those in memory do, leave nothing behind, and say so when there is no room."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlenv.datasets.disk_lookup import DiskLookup, open_lookup
from mlenv.datasets.hashing import splitmix64
from mlenv.datasets.lookup import HASH, TIME, DuplicateKeyError, Lookup
from mlenv.errors import DataError

VALUES = pa.schema([("number", pa.int64()), ("text", pa.string()), ("tags", pa.list_(pa.int32()))])


def parts_of(keys, times=None, size=7):
    """The rows of a table a few at once."""
    numbers = np.arange(len(keys))
    columns = {HASH: splitmix64(np.asarray(keys, np.uint64))} | ({} if times is None else {TIME: times})
    columns |= {"number": numbers, "text": [f"row {one}" for one in numbers], "tags": [[one] * (one % 3) for one in numbers]}
    batch = pa.record_batch(
        {name: pa.array(values, VALUES.field(name).type if name in VALUES.names else None) for name, values in columns.items()}
    )
    return [batch.slice(first, size) for first in range(0, len(keys), size)]


def both(keys, times, memory_rows, known=None):
    known = known or (None if times is None else (lambda times: times + 2))
    sizes = {"num_rows": len(keys)}
    memory = open_lookup(parts_of(keys, times), VALUES, known, **sizes, memory_rows=len(keys))
    disk = open_lookup(parts_of(keys, times), VALUES, known, **sizes, memory_rows=memory_rows)
    assert (type(memory), type(disk)) == (Lookup, DiskLookup)
    return memory, disk


def assert_same(memory, disk, places):
    """Places are the same too: the buckets are the table in the order of the hashes."""
    expected, found = places
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(memory.take(expected), disk.take(found), strict=True):
        assert type(other) is type(one)
        assert other.equals(one)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("memory_rows", [1, 13, 150])
def test_the_same_rows_are_found_by_key(seed, memory_rows):
    rng = np.random.default_rng(seed)
    memory, disk = both(rng.permutation(400)[:200], None, memory_rows)
    hashes = splitmix64(rng.integers(0, 400, 300).astype(np.uint64))
    assert_same(memory, disk, (memory.find(hashes), disk.find(hashes)))
    assert_same(memory, disk, (memory.find(hashes[:0]), disk.find(hashes[:0])))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("memory_rows", [1, 13, 150])
def test_the_same_rows_are_found_by_time(seed, memory_rows):
    rng = np.random.default_rng(seed)
    keys, times = rng.integers(0, 40, 200), rng.integers(0, 30, 200)
    memory, disk = both(keys, times, memory_rows)
    asked = rng.integers(0, 45, 300)
    hashes, first = splitmix64(asked.astype(np.uint64)), rng.integers(-2, 34, 300)
    places = memory.find(hashes, first), disk.find(hashes, first)
    assert_same(memory, disk, places)
    np.testing.assert_array_equal(*(one.times_at(found)[found >= 0] for one, found in zip((memory, disk), places, strict=True)))
    last = first + rng.integers(0, 9, 300)
    for one in (memory, disk):
        start, stop = one.between(hashes, first, last)
        expected = [
            sum(k == key and a <= time <= b for k, time in zip(keys, times, strict=True))
            for key, a, b in zip(asked, first, last, strict=True)
        ]
        assert (stop - start).tolist() == expected
        found = np.flatnonzero(stop > start)
        assert ((one.times_at(start[found]) >= first[found]) & (one.times_at(stop[found] - 1) <= last[found])).all()


def test_columns_beyond_what_an_array_can_hold_stay_in_chunks(monkeypatch):
    keys, asked = np.random.default_rng(0).permutation(400)[:200], splitmix64(np.arange(400, dtype=np.uint64))
    expected, _ = both(keys, None, 70)
    monkeypatch.setattr("mlenv.datasets.lookup._LARGE_BYTES", 500)
    memory, disk = both(keys, None, 70)
    assert memory.values[1].num_chunks > 1
    for lookup in (memory, disk):
        assert_same(expected, lookup, (expected.find(asked), lookup.find(asked)))


def test_both_name_the_same_key_that_has_several_rows():
    keys = [*range(50), 17, 3, 29]
    found = set()
    for memory_rows in (1, 10, 100):
        with pytest.raises(DuplicateKeyError) as error:
            open_lookup(parts_of(keys), VALUES, num_rows=len(keys), memory_rows=memory_rows)
        found.add(error.value.key_hash)
    assert len(found) == 1


def test_a_table_of_which_no_row_can_be_found():
    lookup = open_lookup([], VALUES, num_rows=10, memory_rows=2)
    assert lookup.find(np.array([1, 2], np.uint64)).tolist() == [-1, -1]
    assert [column.to_pylist() for column in lookup.take(np.array([-1, -1]))] == [[None, None]] * 3


def test_what_is_looked_up_lies_in_files_without_names(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    _, disk = both(np.arange(200), None, 10)
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) >= 40  # 20 buckets of an index and of values
    assert all(line.endswith("(deleted)") for line in mapped)
    del disk
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_process_that_is_killed_leaves_nothing(tmp_path):
    code = """
        import itertools, numpy as np, pyarrow as pa
        from mlenv.datasets.disk_lookup import open_lookup
        def parts():
            for number in itertools.count():
                if number == 3:
                    print("writing", flush=True)
                yield pa.record_batch({"__hash__": np.arange(9, dtype=np.uint64) << np.uint64(60), "value": np.zeros(9)})
        open_lookup(parts(), pa.schema([("value", pa.float64())]), num_rows=10, memory_rows=2)
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    open_files = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert any(name.startswith(str(tmp_path)) for name in open_files)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            DataError, match=rf"{tmp_path}: expected a temporary folder with room for 5000 rows.*File too large.*set TMPDIR"
        ):
            open_lookup(parts_of(np.arange(5000), size=1000), VALUES, num_rows=5000, memory_rows=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
