"""Frappe: ids counted per field, unknown ids, the parts. The rows are invented."""

from __future__ import annotations

import gzip

import polars as pl
import pytest

from mlenv.cli import main
from mlenv.datasets.frappe import FIELDS, convert_frappe
from mlenv.errors import DONE, DataError

HEADER = ",".join(("label", *FIELDS))
REST = "5046,5053,5055,5058,5060,5073,5183"
TRAIN = (f"0,204,4798,5041,{REST}", f"1,42,1572,5042,{REST}", f"0,204,1572,5042,{REST}")
VALIDATION = (f"1,42,4798,5041,{REST}", f"0,77,1572,5043,{REST}")
TEST = (f"1,500,4798,5041,{REST}",)


@pytest.fixture
def source(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, lines in (("train", TRAIN), ("valid", VALIDATION), ("test", TEST)):
        write(source, name, *lines)
    return source


def write(source, name, *lines):
    (source / f"{name}.csv.gz").write_bytes(gzip.compress(("\n".join((HEADER, *lines)) + "\n").encode()))


def columns(path):
    rows = pl.read_parquet(path)
    return {name: rows[name].to_list() for name in ("row_id", "label", "user", "item", "daytime", "city")}


def test_ids_count_within_their_field_and_unknown_ones_are_zero(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "convert", "frappe", "--source", str(source), "--out", str(out)]) == DONE
    assert capsys.readouterr().out == f"wrote {out}\n"
    train, validation, test = (columns(out / part / "part-00000.parquet") for part in ("train", "validation", "test"))
    assert train == {
        "row_id": [0, 1, 2],
        "label": [0, 1, 0],
        "user": [2, 1, 2],
        "item": [2, 1, 1],
        "daytime": [1, 2, 2],
        "city": [1, 1, 1],
    }
    assert (validation["user"], validation["item"], validation["daytime"]) == ([1, 0], [2, 1], [1, 0])
    assert (test["user"], test["label"]) == ([0], [1])
    assert sorted(path.name for path in out.iterdir()) == ["test", "train", "validation"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"2,204,4798,5041,{REST}", r"valid\.csv\.gz, line 2, column 'label': expected 0 or 1\. Received: '2'"),
        (f"1,user,4798,5041,{REST}", r"valid\.csv\.gz, line 2, column 'user': expected an integer\. Received: 'user'"),
        (f"1,,4798,5041,{REST}", r"valid\.csv\.gz, line 2, column 'user': expected an integer\. Received: ''"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named_and_nothing_is_left(source, tmp_path, line, message):
    write(source, "valid", line)
    with pytest.raises(DataError, match=message):
        convert_frappe(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_file_is_named(source, tmp_path):
    (source / "test.csv.gz").unlink()
    with pytest.raises(DataError, match=r"test\.csv\.gz: expected a CSV file\. Received: 'no such file'"):
        convert_frappe(source, tmp_path / "out")
