"""Features taken away from a batch: the same as if their columns had been null."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mlenv import compose
from mlenv.batch import START
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.encoding import encode
from mlenv.models.missing_features import MissingFeatures, feature_groups
from tests.conftest import ROOT


def test_every_kind_of_feature_is_as_if_its_column_were_null(ads):
    schema = compose(ROOT / "examples/demo/ranker.yaml").schema
    table = pq.read_table(next(ads.rglob("*.parquet"))).slice(0, 40)
    columns = {name: table.column(name).combine_chunks() for name in {*schema.columns, *schema.metadata_columns}}
    rows = torch.arange(40) % 3 == 0
    batch = to_batch([encode(pa.RecordBatch.from_pydict(columns), schema)], START)
    groups = feature_groups(schema)
    assert list(groups) == [
        *(f"{entity} features" for entity in ("user", "item", "context")),
        *(f"core feature {name}" for name in ("user_id", "item_id", "placement")),
    ]
    assert set.union(*map(set, groups.values())) == set(schema.features)
    for features in groups.values():
        read = {key.column for key in schema.sparse_keys if key.feature in features}
        read |= {column.column for column in schema.dense_columns if column.name in features}
        kept = pa.array((~rows).tolist())
        nulled = {
            name: pa.compute.if_else(kept, values, pa.scalar(None, values.type)) if name in read else values
            for name, values in columns.items()
        }
        expected = to_batch([encode(pa.RecordBatch.from_pydict(nulled), schema)], START)
        found = MissingFeatures(schema).of(batch, features, rows)
        torch.testing.assert_close(found.dense, expected.dense, rtol=0, atol=0)
        assert found.sparse.value_counts == expected.sparse.value_counts
        for name in ("values", "lengths", "weights"):
            torch.testing.assert_close(getattr(found.sparse, name), getattr(expected.sparse, name), rtol=0, atol=0)
        assert found.sparse.values.shape != batch.sparse.values.shape or len(features) == 1
