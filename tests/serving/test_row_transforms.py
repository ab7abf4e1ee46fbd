"""Which transforms run on requests, and what a request has to bring."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.python_function import PythonConfig
from mlenv.datasets.transforms.values import ClipConfig, HashConfig
from mlenv.errors import ConfigError
from mlenv.serving.columns import RowsError
from mlenv.serving.row_transforms import ServedTransforms, plan_serving

CLIP = ClipConfig(column="price", upper=10.0)
DOUBLED = DeriveConfig(column="doubled", sql="price * 2")
OWN = PythonConfig(function="math:sqrt", reads=("user",), writes=("age", "price"))


def test_only_what_the_features_need_is_run_and_brought():
    plan = plan_serving(
        [DOUBLED, CLIP, HashConfig(column="town", num_buckets=9), FilterConfig(where="price > 1")], ("doubled", "price", "item")
    )
    assert [*plan.steps] == [0, 1]
    assert set(plan.inputs) == {"price", "item"}
    assert (plan.replaced, plan.read, plan.brought) == ({"price": 1}, ("price",), {})


def test_columns_of_a_transform_that_is_not_served_are_brought():
    plan = plan_serving([CLIP, OWN, DOUBLED], ("age", "doubled"))
    assert plan.brought == {"age": 1, "price": 1}
    assert [*plan.steps] == [2]  # the clipped price is gone by then
    assert set(plan.inputs) == {"age", "price"}
    with pytest.raises(ConfigError, match=r"data\.transforms\[0\]: expected columns that a request can hold beside the others"):
        plan_serving([DOUBLED, OWN], ("doubled", "price"))


def test_steps_see_the_types_of_the_log():
    served = ServedTransforms(
        (HashConfig(column="town", num_buckets=1000), CLIP), pa.schema([("town", pa.int16()), ("price", pa.float32())])
    )
    rows = pa.RecordBatch.from_pydict({"town": [7, None], "price": [20.0, 0.1]})
    made = served.apply(rows)
    assert made.column("price").type == pa.float32()
    stored = pa.RecordBatch.from_arrays([pa.array([7, None], pa.int16())], ["town"])
    assert made.column("town") == HashConfig(column="town", num_buckets=1000).apply(stored, ()).column("town")
    with pytest.raises(RowsError, match=r"row 5, field 'town': expected an integer \(int16\). Received: 70000"):
        served.apply(pa.RecordBatch.from_pydict({"town": [1, 70000], "price": [1.0, 1.0]}), first_row=4)
