from __future__ import annotations

from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv.datasets.day_partitions import write_day_partitions
from mlenv.errors import DataError

FIRST, SECOND = date(2026, 2, 28), date(2026, 3, 1)


def days():
    yield FIRST, pa.table({"x": [1, 2, 3]})
    yield SECOND, pa.table({"x": [4]})


def unused():
    raise AssertionError("nothing may be computed for an output folder that cannot be used")
    yield


def test_writes_one_file_per_day(tmp_path):
    out = tmp_path / "made here"
    write_day_partitions(days(), out, row_group_rows=2)

    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["date=2026-02-28/part-00000.parquet", "date=2026-03-01/part-00000.parquet"]
    file = pq.ParquetFile(out / files[0])
    assert file.read().to_pydict() == {"x": [1, 2, 3]}
    assert file.metadata.num_row_groups == 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled_and_others_may_read_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_day_partitions(days(), out)
    (tmp_path / "ordinary").mkdir()
    assert len(list(out.iterdir())) == 2
    assert out.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_nothing_is_left_of_a_data_set_that_fails(tmp_path):
    def failing():
        yield from days()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_day_partitions(failing(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"expected a new or an empty folder\. Received: .*mine\.txt.* Fix: name another folder"):
        write_day_partitions(unused(), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(DataError, match="expected a new or an empty folder"):
        write_day_partitions(unused(), tmp_path / "out")


def test_refuses_a_folder_without_a_parent(tmp_path):
    with pytest.raises(DataError, match=r"Fix: mkdir -p '.*missing'"):
        write_day_partitions(unused(), tmp_path / "missing" / "out")
    assert list(tmp_path.iterdir()) == []
