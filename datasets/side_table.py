"""A table of Parquet files that lies beside the data: its columns, and its rows in the order of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from mlenv.datasets.parquet_source import open_folder
from mlenv.errors import ConfigError, DataError, nearest

_BATCH_ROWS = 131_072


class SideTable:
    """Opened: its files are listed and their footers read, no row yet.

    ``key=value`` in a folder's name acts as a text column. Files whose name, or whose folder's name, begins with ``_`` or ``.``
    do not count.

    Args:
        path: folder or file, local or as a URL that Arrow or fsspec knows.
        columns: those that are read, each with the key of the config that names it.

    Raises:
        ConfigError: a column is in no file, or the URL cannot be opened.
        DataError: nothing is there, a file is no Parquet file, or a column is missing in one of them or has another type.
    """

    def __init__(self, path: str, columns: dict[str, str]) -> None:
        self.path = path
        try:
            self._filesystem, self._root = open_folder(path)
        except ConfigError as error:
            raise ConfigError("table", expected=error.expected, received=error.received, fix=error.fix) from error
        files = self._list_files()
        self._footers = {file: self._read_footer(file) for file in files}
        self.schema = self._common_schema(columns)

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(footer.num_rows for footer in self._footers.values())

    def require_rows(self, fix: str) -> None:
        """
        Raises:
            DataError: no file has rows.
        """
        if not self.num_rows:
            raise DataError(self.path, expected="a table with rows", received=f"{len(self._footers)} files without rows", fix=fix)

    @property
    def modified(self) -> tuple[int | None, ...]:
        """When each file was written last, where the file system knows."""
        return tuple(info.mtime_ns for info in self._filesystem.get_file_info(list(self._footers)))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the files with their rows and compressed bytes; changes when the table does."""
        lines = []
        for file, footer in self._footers.items():
            groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            sizes = [sum(group.column(place).total_compressed_size for place in range(group.num_columns)) for group in groups]
            lines.append(f"{self._name(file)} {footer.num_rows} {sizes}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]

    def batches(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Files and their rows, in order, a bounded number at once.

        Raises:
            DataError: a file cannot be read.
        """
        for file, footer in self._footers.items():
            partitions = self._partitions(file)
            stored = [name for name in self.schema.names if name not in partitions]
            try:
                reader = pq.ParquetFile(file, filesystem=self._filesystem, metadata=footer)
                for rows in reader.iter_batches(_BATCH_ROWS, columns=stored, use_threads=False):
                    arrays = [
                        pa.repeat(pa.scalar(partitions[field.name], pa.string()), rows.num_rows)
                        if field.name in partitions
                        else rows.column(field.name).cast(field.type)
                        for field in self.schema
                    ]
                    yield file, pa.RecordBatch.from_arrays(arrays, schema=self.schema)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(file, error) from error

    def _list_files(self) -> list[str]:
        info = self._filesystem.get_file_info(self._root)
        if info.type == pyarrow.fs.FileType.File:
            return [self._root]
        files: list[str] = []
        if info.type == pyarrow.fs.FileType.Directory:
            entries = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._root, recursive=True))
            files = sorted(entry.path for entry in entries if entry.is_file and entry.path.endswith(".parquet"))
            files = [file for file in files if not any(part.startswith(("_", ".")) for part in PurePosixPath(self._name(file)).parts)]
        if not files:
            fix = "set table to its folder or file; the path begins at the current folder, as data.path does"
            received = "nothing there" if info.type == pyarrow.fs.FileType.NotFound else "none"
            raise DataError(self.path, expected="Parquet files of a table", received=received, fix=fix)
        return files

    def _read_footer(self, file: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(file, filesystem=self._filesystem)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from error

    def _common_schema(self, columns: dict[str, str]) -> pa.Schema:
        common = pa.schema([])
        for file, footer in self._footers.items():
            types = {field.name: _plain(field.type) for field in footer.schema.to_arrow_schema()}
            types |= dict.fromkeys(self._partitions(file), pa.string())
            for name, key in columns.items():
                if name in types:
                    continue
                if not len(common):
                    raise ConfigError(key, expected=f"columns of {self.path}", received=name, fix=nearest(name, types))
                raise DataError(f"{file}, column {name!r}", expected="a column of this name, as in the files before", received="none")
            found = pa.schema([(name, types[name]) for name in columns])
            try:
                common = pa.unify_schemas([common, found], promote_options="permissive") if len(common) else found
            except pa.ArrowException as error:
                fix = "write each column with one type in all files"
                raise DataError(file, expected=f"columns of the types {common}", received=str(error), fix=fix) from error
        return common

    def _partitions(self, file: str) -> dict[str, str]:
        return dict(part.split("=", 1) for part in PurePosixPath(self._name(file)).parts[:-1] if "=" in part)

    def _name(self, file: str) -> str:
        return str(PurePosixPath(file).relative_to(self._root))


def absolute(path: str) -> str:
    """The same table for a process that runs in another folder."""
    return path if "://" in path else str(Path(path).absolute())


def key_kind(kind: pa.DataType) -> str:
    """What a key of two tables must agree in: integers of any width, texts however stored, else the type; "" for what is no key."""
    plain = _plain(kind)
    if pa.types.is_uint64(plain):
        return "uint64"
    if pa.types.is_integer(plain):
        return "integer"
    if pa.types.is_string(plain) or pa.types.is_large_string(plain):
        return "text"
    return str(plain) if pa.types.is_boolean(plain) or pa.types.is_temporal(plain) else ""


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _unreadable(file: str, error: Exception) -> DataError:
    fix = "write the file again, or take it out of the folder"
    return DataError(file, expected="a whole Parquet file", received=" ".join(str(error).split()), fix=fix)
