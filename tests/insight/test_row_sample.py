"""Rows taken from a sample: the same as if their columns had been put together so."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlenv import compose
from mlenv.batch import START, Batch
from mlenv.config import WindowConfig
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.encoding import encode
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.insight.row_sample import RowSample, read_sample
from mlenv.models.missing_features import feature_groups
from mlenv.schema import Schema
from tests.conftest import ROOT


def encoded(columns: dict[str, pa.Array], schema: Schema) -> Batch:
    return to_batch([encode(pa.RecordBatch.from_pydict(columns), schema, extras=("metadata",))], START)


def check_equal(found: Batch, expected: Batch) -> None:
    assert found.sparse.keys == expected.sparse.keys
    assert found.sparse.value_counts == expected.sparse.value_counts
    for name in ("values", "lengths", "weights"):
        torch.testing.assert_close(getattr(found.sparse, name), getattr(expected.sparse, name), rtol=0, atol=0)
    for name in ("dense", "labels", "weights"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert found.metadata is not None
    assert found.metadata.equals(expected.metadata)


def test_features_of_other_rows_are_as_if_their_columns_had_been_exchanged(ads):
    schema = compose(ROOT / "examples/demo/ranker.yaml").schema
    table = pq.read_table(next(ads.rglob("*.parquet"))).slice(0, 40)
    columns = {name: table.column(name).combine_chunks() for name in {*schema.columns, *schema.metadata_columns}}
    batch = encoded(columns, schema)
    sample = RowSample([batch.rows(0, 15), batch.rows(15, 16), batch.rows(16, 40)], schema)
    rows, others = torch.tensor([3, 39, 0, 15, 3]), torch.tensor([7, 2, 2, 38, 16])
    own = encoded({name: values.take(pa.array(rows.numpy())) for name, values in columns.items()}, schema)
    for features in ((), *feature_groups(schema).values()):
        read = {key.column for key in schema.sparse_keys if key.feature in features}
        read |= {column.column for column in schema.dense_columns if column.name in features}
        exchanged = {name: values.take(pa.array((others if name in read else rows).numpy())) for name, values in columns.items()}
        expected = replace(encoded(exchanged, schema), metadata=own.metadata)
        check_equal(sample.take(rows, features, others), expected)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    first, *_, last = sample.batches(16, {"history"}, order)
    check_equal(first, sample.take(torch.arange(16), {"history"}, order[:16]))
    check_equal(last, sample.take(torch.arange(32, 40), {"history"}, order[32:]))


def test_a_sample_of_a_window_has_each_row_once_and_in_order(ads, tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_config)
    config = compose(tmp_path / "config.yaml")
    source = ParquetSource(config.data, WindowConfig(start="2026-01-03"), config.schema, extras=("metadata",))
    keys = pa.concat_tables(pq.read_table(file, columns=["impression_id"]) for file in sorted(ads.glob("date=2026-01-03/*"))).column(0)
    samples = [read_sample(source, rows, seed) for rows, seed in ((10_000, 0), (300, 0), (300, 0), (300, 1))]
    ids = [sample.metadata.column("impression_id").to_pylist() for sample in samples]  # type: ignore[union-attr]
    assert ids[0] == keys.to_pylist()
    assert ids[1] == ids[2] == sorted(set(ids[1]), key=ids[0].index)
    assert len(ids[1]) == 300
    assert ids[3] != ids[1]
    assert sum(place >= 1000 for place in map(ids[0].index, ids[1])) == pytest.approx(150, abs=40)  # from all over the window
