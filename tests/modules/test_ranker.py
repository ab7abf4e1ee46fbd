"""The whole ranker where there is nothing to see."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv import compose
from mlenv.experiment import Experiment
from mlenv.modules import CROSSINGS
from mlenv.modules.losses import weighted_binary_cross_entropy

EVERY_CROSSING = {"kind": "ensemble", "crossings": [{"kind": kind} for kind in CROSSINGS if kind not in ("ensemble", "stack")]}
NO_FEATURES = {"impression_id", "request_id", "event_time", "click", "conversion", "conversion_time"}


@pytest.fixture(scope="module")
def nulls(ads, tmp_path_factory):
    """Rows of a day of the simulated log, in which every feature is null."""
    source = min(ads.rglob("*.parquet"))
    table = pq.ParquetFile(source).read().slice(0, 200)
    for place, column in enumerate(table.schema):
        if column.name not in NO_FEATURES and not column.name.startswith("true_"):
            # Arrow writes lists of a fixed size that are null, but cannot read them.
            data_type = pa.list_(column.type.value_type) if pa.types.is_fixed_size_list(column.type) else column.type
            table = table.set_column(place, column.name, pa.nulls(len(table), data_type))
    folder = tmp_path_factory.mktemp("nulls")
    (folder / source.parent.name).mkdir()
    pq.write_table(table, folder / source.parent.name / source.name)
    return folder


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
@pytest.mark.parametrize(
    ("sequence", "experts"),
    [
        ("{kind: din, candidate: [item_id]}", "mmoe"),
        ("{kind: hstu, head_dim: 4}", "ple"),
        ("{kind: mean}", "shared_bottom"),
        ("{kind: trans_act, candidate: [item_id]}", "ple"),
    ],
)
def test_all_null_columns_and_empty_bags_leave_all_finite(nulls, demo_arguments, sequence, experts, engine):
    model = [f"model.sequences.history={sequence}", f"model.experts.kind={experts}", f"model.crossing={json.dumps(EVERY_CROSSING)}"]
    file, *overrides = demo_arguments(
        *model, f"embeddings.engine={engine}", f"data.path={nulls}", "data.test=null", "data.allow_missing_days=true"
    )
    with Experiment(compose(file, overrides)) as experiment:
        for batch in experiment.source("train").batches():
            logits = experiment.model(batch)
            assert logits.isfinite().all()
            weighted_binary_cross_entropy(logits, batch.labels, batch.weights).sum().backward()
        gradients = [parameter.grad for parameter in experiment.model.parameters() if parameter.grad is not None]
    assert len(gradients) > 100
    assert all((gradient.coalesce().values() if gradient.is_sparse else gradient).isfinite().all() for gradient in gradients)
