from __future__ import annotations

import gzip

import polars as pl
import pytest

from mlenv.datasets.csv_table import Cells, read_csv
from mlenv.errors import DataError

WHOLE = Cells("an integer", lambda text: text.cast(pl.Int64, strict=False), may_be_empty=False)
MAYBE = Cells("an integer or nothing", lambda text: text.cast(pl.Int64, strict=False))
COLUMNS = {"b": MAYBE, "a": WHOLE}


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_reads_the_named_columns(tmp_path):
    rows = read_csv(write(tmp_path / "x.csv.gz", 'a,ignored,b\n1,"q,r",2\n3,,\n'), COLUMNS)
    assert rows.to_dict(as_series=False) == {"b": [2, None], "a": [1, 3]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", r"x\.csv\.gz, line 3, column 'b': expected an integer or nothing\. Received: 'x'\. Fix: "),
        ("a,b\n,2\n", r"line 2, column 'a': expected an integer\. Received: ''\. Fix: "),
        ("a,bb\n1,2\n", r"column 'b': expected a column of this name\. Received: 'none'\. Fix: "),
        ("a,b\n1,2,3\n", r"expected a CSV file\. Received: "),
        ("", r"expected a CSV file\. Received: "),
    ],
)
def test_names_what_cannot_be_read(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_csv(write(tmp_path / "x.csv.gz", text), COLUMNS)


def test_names_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"absent\.csv\.gz: expected a CSV file\. Received: 'no such file'"):
        read_csv(tmp_path / "absent.csv.gz", COLUMNS)


def test_refuses_a_cut_archive(tmp_path):
    path = write(tmp_path / "x.csv.gz", "a,b\n" + "".join(f"{row},{row * 7919 % 10007}\n" for row in range(5000)))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"x\.csv\.gz: expected a CSV file"):
        read_csv(path, COLUMNS)
