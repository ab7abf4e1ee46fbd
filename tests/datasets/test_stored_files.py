"""Files told by their contents: against hashes of the whole bytes, and what is read again."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import xxhash

from mlenv.datasets.parquet_source import open_folder
from mlenv.datasets.stored_files import describe_files
from mlenv.errors import DataError

LOCAL = pyarrow.fs.LocalFileSystem()


def write(folder: Path, name: str, values: list[int]) -> Path:
    """Without statistics and compression, so that other values of the same width leave size and footer as they are."""
    table = pa.table({"x": pa.array(values, pa.int64())})
    pq.write_table(table, folder / name, row_group_size=4, write_statistics=False, use_dictionary=False, compression="none")
    return folder / name


def test_hashes_are_those_of_the_bytes_and_of_the_footer(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", list(range(10)))
    (found,) = describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes")
    content = file.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    assert (found.path, found.rows, found.row_groups, found.bytes) == ("a.parquet", 10, 3, len(content))
    assert found.modified_ns == file.stat().st_mtime_ns
    assert found.content == xxhash.xxh3_128_hexdigest(content)
    assert found.footer == xxhash.xxh3_128_hexdigest(footer)


def test_files_come_in_the_order_that_was_asked_for_and_larger_ones_than_a_chunk_are_read_whole(tmp_path: Path) -> None:
    large = write(tmp_path, "large.parquet", [7] * 800_000)
    assert large.stat().st_size > 4 << 20
    write(tmp_path, "small.parquet", [1])
    found = describe_files(LOCAL, str(tmp_path), ["small.parquet", "large.parquet"], "bytes")
    assert [file.path for file in found] == ["small.parquet", "large.parquet"]
    assert found[1].content == xxhash.xxh3_128_hexdigest(large.read_bytes())


def test_footers_alone_do_not_see_values_that_bytes_see(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", [1, 2])
    before = {kind: describe_files(LOCAL, str(tmp_path), ["a.parquet"], kind)[0] for kind in ("bytes", "footers")}
    write(tmp_path, "a.parquet", [1, 3])
    after = {kind: describe_files(LOCAL, str(tmp_path), ["a.parquet"], kind)[0] for kind in ("bytes", "footers")}
    assert before["footers"].content is None
    assert before["footers"].holds_the_same(after["footers"])
    assert not before["bytes"].holds_the_same(after["bytes"])
    assert before["bytes"].holds_the_same(after["footers"])  # no further than footers tell
    write(tmp_path, "a.parquet", [1, 2, 3])
    assert not before["footers"].holds_the_same(describe_files(LOCAL, str(tmp_path), ["a.parquet"], "footers")[0])


def test_only_an_untouched_file_is_not_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", [1, 2])
    (first,) = describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes")
    time_ns = file.stat().st_mtime_ns
    write(tmp_path, "a.parquet", [1, 3])
    os.utime(file, ns=(time_ns, time_ns))  # as nobody changes a file: what shows that its bytes were not read
    assert describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes", {"a.parquet": first}) == (first,)
    os.utime(file, ns=(time_ns, time_ns + 1))
    (again,) = describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes", {"a.parquet": first})
    assert again.content == xxhash.xxh3_128_hexdigest(file.read_bytes()) != first.content


def test_files_behind_a_url_are_the_same_files(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", [1, 2])
    (local,) = describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes")
    for url in (f"file://{tmp_path}", f"local://{tmp_path}"):  # Arrow's and fsspec's
        filesystem, folder = open_folder(url)
        (found,) = describe_files(filesystem, folder, ["a.parquet"], "bytes")
        assert found.holds_the_same(local)
        assert found.footer == local.footer


def test_a_file_system_that_knows_no_times_has_its_files_read_again() -> None:
    import fsspec

    class Timeless(fsspec.get_filesystem_class("memory")):
        def info(self, path, **options):
            return {key: value for key, value in super().info(path, **options).items() if key != "created"}

    store = Timeless()
    stored = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2]}), stored)
    store.pipe_file("/log/a.parquet", stored.getvalue().to_pybytes())
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store))
    (found,) = describe_files(filesystem, "/log", ["a.parquet"], "bytes")
    assert found.modified_ns is None
    assert not found.is_untouched(found)
    assert found.content == xxhash.xxh3_128_hexdigest(stored.getvalue().to_pybytes())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet file at all"])
def test_what_is_no_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: expected a whole Parquet file"):
        describe_files(LOCAL, str(tmp_path), ["a.parquet"], "bytes")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet"):
        describe_files(LOCAL, str(tmp_path), ["gone.parquet"], "bytes")
