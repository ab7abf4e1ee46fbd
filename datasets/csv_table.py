"""Reading CSV files of known columns, with an error that names the line of a cell that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mlenv.errors import DataError, nearest


@dataclass(frozen=True)
class Cells:
    """How the cells of a column are read."""

    expected: str
    """What every cell must be, in words."""
    parse: Callable[[pl.Expr], pl.Expr]
    """From text to the value; null where the text is not what is expected."""
    may_be_empty: bool = True
    """An empty cell is null."""


ID = Cells("an integer", lambda text: text.cast(pl.Int64, strict=False), may_be_empty=False)
LABEL = Cells("0 or 1", lambda text: text.replace_strict({"0": 0, "1": 1}, default=None, return_dtype=pl.Int8), may_be_empty=False)


def read_csv(path: Path, columns: Mapping[str, Cells]) -> pl.DataFrame:
    """The named columns of a CSV file with a header, plain or compressed.

    Raises:
        DataError: the file or a column is missing, or a cell is not what is expected.
    """
    if not path.is_file():
        raise DataError(str(path), expected="a CSV file", received="no such file", fix="name the folder that holds the downloaded files")
    try:
        texts = pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(str(path), expected="a CSV file", received=str(error).splitlines()[0], fix="download it again") from error
    for name in columns:
        if name not in texts.columns:
            raise DataError(f"{path}, column {name!r}", expected="a column of this name", received="none", fix=nearest(name, texts.columns))
    values = texts.select(cells.parse(pl.col(name)).alias(name) for name, cells in columns.items())
    for name, cells in columns.items():
        _check(path, name, cells, texts[name], values[name])
    return values


def _check(path: Path, name: str, cells: Cells, texts: pl.Series, values: pl.Series) -> None:
    is_bad = values.is_null() & texts.is_not_null() if cells.may_be_empty else values.is_null()
    if is_bad.any():
        row = is_bad.arg_max()
        assert row is not None
        place = f"{path}, line {row + 2}, column {name!r}"  # the header is line 1
        raise DataError(place, expected=cells.expected, received=texts[row] or "", fix="correct the line or remove it")
