from __future__ import annotations

import json

import pyarrow as pa
import pytest

from mlenv.schema import Binary, Categorical, DenseVector, Label, MultiCategorical, Numeric, Schema, Table, Weighted
from mlenv.serving.columns import MAX_PROBLEMS, RowsError, describe, from_rows, served_columns

SCHEMA = Schema(
    features={
        "item": Categorical(),
        "city": Categorical(storage="string", column="town"),
        "tags": MultiCategorical(storage="string"),
        "weights": Weighted(),
        "pairs": Weighted(storage="string"),
        "price": Numeric(),
        "is_new": Binary(),
        "vector": DenseVector(dim=2),
    },
    tables={name: Table(num_embeddings=10, embedding_dim=4, ids="hash") for name in ("item", "city", "tags", "weights", "pairs")},
    labels={"click": Label()},
)
STORED = pa.schema(
    {
        "item": pa.int32(),
        "town": pa.dictionary(pa.int8(), pa.string()),
        "tags": pa.large_list(pa.large_string()),
        "weights": pa.map_(pa.int64(), pa.float32()),
        "pairs": pa.list_(pa.struct({"id": pa.string(), "weight": pa.float32()})),
        "price": pa.int16(),
        "is_new": pa.int8(),
        "vector": pa.list_(pa.float32(), 2),
        "day": pa.date32(),
    }
)
COLUMNS = served_columns(SCHEMA, ["day"], STORED)
ROW = {
    "item": 7,
    "town": "Oslo",
    "tags": ["a", "b"],
    "weights": {"3": 0.5, "-4": 1},
    "pairs": [{"id": "a", "weight": 0.5}],
    "price": 1.5,
    "is_new": 1,
    "vector": [1, 0.5],
    "day": "2026-01-01",
}


def test_columns_have_the_types_of_json():
    pairs = pa.list_(pa.struct({"id": pa.string(), "weight": pa.float64()}))
    assert {field.name: field.type for field in COLUMNS} == {
        "item": pa.int64(),
        "town": pa.string(),
        "tags": pa.list_(pa.string()),
        "weights": pa.map_(pa.int64(), pa.float64()),
        "pairs": pairs,
        "price": pa.float64(),
        "is_new": pa.bool_(),
        "vector": pa.list_(pa.float64()),
        "day": pa.string(),
    }
    told = {entry["name"]: entry for entry in describe(COLUMNS, pa.schema([]), SCHEMA)}
    assert told["town"] == {"name": "town", "type": "a string", "features": "city"}
    assert told["day"]["features"] == "(segment)"


def test_rows_of_json_become_columns():
    rows = from_rows([json.loads(json.dumps(ROW)), dict.fromkeys(ROW)], COLUMNS)
    first, second = rows.to_pylist()
    assert first == {**ROW, "weights": [(3, 0.5), (-4, 1.0)], "is_new": True}
    assert second == dict.fromkeys(ROW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("item", value) for value in ("7", 7.0, 7.5, True, [7], 2**63)],
        *[("town", value) for value in (7, ["Oslo"], "\ud800")],
        *[("tags", value) for value in ("ab", [1], {"a": 1})],
        *[("weights", value) for value in ({"x": 1.0}, {"3": "1"}, [3], 3)],
        *[("pairs", value) for value in ([{"id": "a"}], [["a", 1.0]], [{"id": 1, "weight": 1.0}])],
        *[("price", value) for value in ("1.5", True, [1.5])],
        *[("is_new", value) for value in (2, "true", 1.0)],
        *[("vector", value) for value in (["1", 2], 1.0)],
    ],
)
def test_what_is_of_another_type_is_named(field, value):
    with pytest.raises(RowsError) as raised:
        from_rows([ROW, {**ROW, field: value}], COLUMNS)
    (problem,) = raised.value.problems
    assert (problem.row, problem.field) == (1, field)


def test_missing_fields_are_named_and_not_too_many():
    with pytest.raises(RowsError, match=r"row 0, field 'item': expected an integer\. Received: nothing"):
        from_rows([{name: value for name, value in ROW.items() if name != "item"}], COLUMNS)
    with pytest.raises(RowsError) as raised:
        from_rows([{}] * 100, COLUMNS)
    assert len(raised.value.problems) == MAX_PROBLEMS
