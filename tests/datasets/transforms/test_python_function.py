from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mlenv.datasets.transforms.python_function import PythonConfig
from mlenv.errors import ConfigError, DataError

ROWS = pa.RecordBatch.from_pydict({"a": [1, 2], "b": [1.0, None], "c": ["x", "y"]})

SOURCE = """
import pyarrow as pa
import pyarrow.compute as pc

def double(rows):
    return pa.RecordBatch.from_pydict({"twice": pc.multiply(rows.column("a"), 2), "a": pc.negate(rows.column("a"))})

def shorter(rows):
    return double(rows).slice(1)

def broken(rows):
    raise RuntimeError("no")

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def team_module(tmp_path, monkeypatch):
    (tmp_path / "team_rows.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def config(name="double", **changes):
    return PythonConfig(**({"function": f"team_rows:{name}", "reads": ("a",), "writes": ("twice", "a")} | changes))


def test_it_writes_the_columns_that_it_says():
    columns = config().output_schema(ROWS.schema)
    assert columns.names == ["a", "b", "c", "twice"]
    out = config().apply(ROWS, ())
    assert out.schema == columns
    assert (out.column("twice").to_pylist(), out.column("a").to_pylist()) == ([2, 4], [-1, -2])
    assert pc.all(out.column("c").is_valid()).as_py()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shorter", "function: expected team_rows:shorter to give a RecordBatch of 2 rows with the columns .* Received: .1 rows"),
        ("broken", "function: expected team_rows:broken to take 2 rows. Received: 'RuntimeError: no'"),
    ],
)
def test_what_it_may_not_do(name, message):
    with pytest.raises(DataError, match=message):
        config(name).apply(ROWS, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": "team_rows.double"}, "function: expected an import path"),
        ({"function": "team_rows:missing"}, "function: expected an importable function"),
        ({"function": "team_rows:NUMBER"}, "function: expected a function"),
        ({"writes": ()}, "writes: expected at least one column"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_its_columns_are_checked():
    with pytest.raises(ConfigError, match="reads: expected columns of the data"):
        config(reads=("aa",)).output_schema(ROWS.schema)
    with pytest.raises(DataError, match="with the columns"):
        config(writes=("other",)).output_schema(ROWS.schema)
