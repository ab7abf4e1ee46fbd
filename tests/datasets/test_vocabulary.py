from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mlenv.datasets.encoding import encode
from mlenv.datasets.statistics import collect
from mlenv.datasets.vocabulary import build_vocabulary, collision_shares
from mlenv.errors import ConfigError
from mlenv.schema import Categorical, Label, MultiCategorical, Schema, SequenceField, Table, Weighted
from mlenv.schema import Sequence as EventSequence

SCHEMA = Schema(
    features={
        "item": Categorical(storage="string", default="unknown"),
        "liked": Weighted(storage="string", table="item"),
        "history": EventSequence(fields={"item": SequenceField(storage="string", table="item")}),
        "tags": MultiCategorical(),
    },
    tables={"item": Table(num_embeddings=50, ids="hash"), "tags": Table(num_embeddings=4, ids="hash")},
    labels={"click": Label()},
)
ROWS = pa.RecordBatch.from_pydict(
    {
        "item": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "liked": pa.array([[("a", 1.0)], None, [("c", 2.0), ("b", 0.5)], []], pa.map_(pa.string(), pa.float32())),
        "history_item": [["a", "d"], [], None, ["b", None]],
        "tags": [[10, 3], [3], [10, 10], None],
        "click": [0, 1, 0, 1],
    }
)


def test_ids_of_all_features_of_the_table_count():
    found = build_vocabulary([ROWS, ROWS], SCHEMA, "item", min_count=3)
    assert found.table == "item"
    assert found.ids == ("a", "b", "unknown")  # 8 and 6 times; the default, which stands in for null, always
    assert (found.num_distinct, found.occurrence_share) == (4, pytest.approx(14 / 18))
    assert build_vocabulary([ROWS], SCHEMA, "history.item", min_count=1).ids == ("a", "b", "c", "d", "unknown")
    assert build_vocabulary([ROWS], SCHEMA, "tags", min_count=1).ids == ("10", "3")


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ConfigError, match=r"FEATURE: expected a feature of the schema with a table. Received: 'itm'. Fix: did you mean 'item'"
    ):
        build_vocabulary([ROWS], SCHEMA, "itm", min_count=1)
    with pytest.raises(ConfigError, match=r"min_count: expected at most 4, how often the most frequent id occurs. Received: 9"):
        build_vocabulary([ROWS], SCHEMA, "item", min_count=9)


def test_ids_that_share_a_row_are_those_that_the_encoding_gives_the_same_row():
    schema = Schema(features={"x": Categorical()}, tables={"x": Table(num_embeddings=64, ids="hash")}, labels={"click": Label()})
    for ids in (1, 20, 30_000):  # of more ids than are counted the share is what uniform hashing gives
        rows = pa.RecordBatch.from_pydict({"x": np.arange(ids), "click": np.zeros(ids)})
        distinct, share = collision_shares(collect([rows], schema), schema)["x"]
        assert distinct == pytest.approx(ids, rel=0.05)
        if ids <= 20:
            places = encode(rows, schema).sparse[0].values
            assert share == pytest.approx(np.mean([np.sum(places == place) > 1 for place in places]))
        else:
            assert share == pytest.approx(1.0)
