"""Writing a data set as one folder per day, or per part, whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.errors import DataError

ROW_GROUP_ROWS = 32_768


def write_day_partitions(days: Iterable[tuple[date, pa.Table]], out: Path, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Writes each day's rows to ``out/date=YYYY-MM-DD/part-00000.parquet``; ``days`` yields each day once.

    Raises:
        DataError: see ``write_parts``.
    """
    write_parts(((f"date={day.isoformat()}", rows) for day, rows in days), out, row_group_rows=row_group_rows)


def write_parts(parts: Iterable[tuple[str, pa.Table]], out: Path, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Writes the rows of each part to ``out/PART/part-00000.parquet``.

    ``out`` appears at the end, complete. ``parts`` yields each part once; it is not started when ``out`` cannot be written.

    Raises:
        DataError: see ``new_folder``.
    """
    with new_folder(out) as unfinished:
        for name, rows in parts:
            folder = unfinished / name
            folder.mkdir()
            pq.write_table(rows, folder / "part-00000.parquet", row_group_size=row_group_rows)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when all is done; until then it lies beside it, and goes away on any failure.

    Raises:
        DataError: ``out`` exists and is not an empty folder, or the folder that it lies in does not exist.
    """
    out = out.resolve()
    _check_can_create(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        unfinished = Path(temporary, out.name)  # one level down: the temporary folder itself is closed to other users
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(out)


def _check_can_create(out: Path) -> None:
    if not out.parent.is_dir():
        raise DataError(
            str(out), expected="an output folder inside an existing one", received=str(out.parent), fix=f"mkdir -p '{out.parent}'"
        )
    if out.exists() and not out.is_dir():
        raise DataError(str(out), expected="a new or an empty folder", received="a file", fix="name another folder")
    if out.is_dir() and any(out.iterdir()):
        found = f"a folder that holds {min(path.name for path in out.iterdir())!r}"
        raise DataError(str(out), expected="a new or an empty folder", received=found, fix="name another folder, or remove this one")
