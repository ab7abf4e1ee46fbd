"""What a Parquet file holds, told by hashes: of its bytes, or of its footer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import xxhash

from mlenv.errors import DataError

ContentHash = Literal["bytes", "footers"]

_THREADS: Final = 8
_CHUNK: Final = 4 << 20
"""Bytes that a thread holds at once."""
_TAIL: Final = 8
"""Bytes at the end of a Parquet file: the length of the footer, then a magic word."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as it was when it was recorded."""

    path: str
    """Under ``data.path``."""
    rows: int
    row_groups: int
    bytes: int
    modified_ns: int | None
    """Nanoseconds since 1970; None where the file system does not say."""
    footer: str
    """xxh3-128 of the footer: the columns, and size, place and statistics of each of their parts."""
    content: str | None
    """xxh3-128 of all bytes; None when the footer alone was read."""

    def holds_the_same(self, other: StoredFile) -> bool:
        """Whether both hold the same bytes; as far as footers tell, when one of them was read no further."""
        if self.content is None or other.content is None:
            return (self.bytes, self.footer) == (other.bytes, other.footer)
        return self.content == other.content

    def is_untouched(self, other: StoredFile) -> bool:
        """Whether size, time of the last change and footer are the same, so that the bytes need not be read to be known."""
        return self.modified_ns is not None and (self.bytes, self.modified_ns, self.footer) == (
            other.bytes,
            other.modified_ns,
            other.footer,
        )


def describe_files(
    filesystem: pyarrow.fs.FileSystem,
    folder: str,
    paths: Sequence[str],
    content_hash: ContentHash,
    known: Mapping[str, StoredFile] | None = None,
) -> tuple[StoredFile, ...]:
    """Reads files in threads, a few MiB of each at once.

    Args:
        paths: under the folder.
        known: what was recorded earlier, by path; an untouched file is not read again.

    Raises:
        DataError: a file cannot be read, or is no Parquet file.
    """

    def describe(path: str) -> StoredFile:
        return _describe(filesystem, folder, path, content_hash, (known or {}).get(path))

    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(describe, paths))


def _describe(filesystem: pyarrow.fs.FileSystem, folder: str, path: str, content_hash: ContentHash, known: StoredFile | None) -> StoredFile:
    place = str(PurePosixPath(folder, path))
    try:
        info = filesystem.get_file_info(place)  # before the bytes: what is written meanwhile is newer than the record says
        with filesystem.open_input_file(place) as file:
            footer = _read_footer(file)
        metadata = pq.read_metadata(pa.BufferReader(footer))
        found = StoredFile(
            path=path,
            rows=metadata.num_rows,
            row_groups=metadata.num_row_groups,
            bytes=info.size,
            modified_ns=info.mtime_ns,
            footer=xxhash.xxh3_128(footer).hexdigest(),
            content=None,
        )
        if content_hash == "footers":
            return found
        if known is not None and known.content is not None and found.is_untouched(known):
            return known
        return StoredFile(**{**vars(found), "content": _hash_bytes(filesystem, place)})
    except (OSError, pa.ArrowException) as error:
        fix = "write the file again, or take it out of the folder"
        raise DataError(place, expected="a whole Parquet file", received=" ".join(str(error).split()), fix=fix) from error


def _read_footer(file: pa.NativeFile) -> bytes:
    """The end of the file from its footer on; a Parquet file by itself, with all that can be read without rows."""
    size = file.size()
    file.seek(max(size - _TAIL, 0))
    length = int.from_bytes(file.read(_TAIL)[:4], "little") + _TAIL
    file.seek(max(size - length, 0))
    footer: bytes = file.read(length)
    return footer


def _hash_bytes(filesystem: pyarrow.fs.FileSystem, place: str) -> str:
    hasher = xxhash.xxh3_128()
    with filesystem.open_input_stream(place) as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
