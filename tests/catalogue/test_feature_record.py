"""What a run records of its features, against values by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from mlenv.catalogue.feature_record import FeatureRecord, record_features
from mlenv.datasets.statistics import collect, collect_days
from mlenv.schema import Categorical, Label, Numeric, Schema, Sequence, SequenceField, Table

SCHEMA = Schema(
    features={"price": Numeric(), "city": Categorical(storage="string"), "seen": Sequence(fields={"item": SequenceField()})},
    tables={name: Table(num_embeddings=10, embedding_dim=4, ids="hash") for name in ("city", "seen_item")},
    labels={"click": Label()},
)


def batch(days: list[str | None], price: list[float | None], city: list[str | None], click: list[int]) -> pa.RecordBatch:
    seen = pa.array([[1, 2], None] * (len(days) // 2) + [[3]] * (len(days) % 2), pa.list_(pa.int64()))
    columns = {"price": pa.array(price, pa.float64()), "city": pa.array(city, pa.string()), "seen_item": seen}
    return pa.RecordBatch.from_pydict(columns | {"click": pa.array(click, pa.int64()), "date": pa.array(days, pa.string())})


def batches() -> Iterator[pa.RecordBatch]:
    """Two days, mixed within the first batch; a batch that the transforms left nothing of."""
    yield batch(["d1", "d2", "d1", "d2"], [1.0, None, 3.0, 10.0], ["a", "b", "a", None], [1, 0, 0, 1])
    yield batch([], [], [], [])
    yield batch(["d2", "d2", "d1"], [20.0, math.nan, 5.0], ["b", "c", "z"], [1, 0, 0])


def recorded() -> FeatureRecord:
    return record_features(collect(batches(), SCHEMA), collect_days(batches(), SCHEMA), significance=4.0)


def test_the_days_merged_are_the_window() -> None:
    days = collect_days(batches(), SCHEMA)
    assert [*days] == ["", "d1", "d2"]  # the empty batch has no day
    whole, merged = collect(batches(), SCHEMA), days[""].merged(days["d1"]).merged(days["d2"])
    plain, other = json.loads(whole.to_json()), json.loads(merged.to_json())
    for part in (plain, other):
        for numbers in (part["columns"]["price"]["numbers"], part["columns"]["seen.item"]["lengths"]):
            numbers["mean"], numbers["squares"] = round(numbers["mean"], 9), round(numbers["squares"], 9)
    assert plain == other
    assert sum(day.rows for day in days.values()) == whole.rows == 7


def test_coverage_mean_distinct_and_label_rates_by_hand() -> None:
    features = recorded().features
    assert [*features] == ["price", "city", "seen"]
    first, second = features["price"]["d1"], features["price"]["d2"]
    assert (first.rows, first.coverage, first.mean, first.distinct) == (3, 1.0, 3.0, None)
    assert (second.rows, second.coverage, second.mean) == (4, 0.5, 15.0)
    assert first.label_rates == {"click": pytest.approx(1 / 3)}
    assert second.label_rates == {"click": 1.0}  # both rows with a price were clicked
    city = features["city"]["d2"]
    assert (city.coverage, city.mean, city.distinct) == (0.75, None, 2)
    assert features["seen"]["d1"].coverage == 1.0
    assert features["seen"]["d1"].distinct == 3
    assert recorded().covered("price") == (pytest.approx(5 / 7), 7)


def test_drift_of_a_day_is_its_stability_index_against_the_other_days() -> None:
    city = recorded().features["city"]
    # Of all values a, b and c, z (one of six each) are at least 2 %, so the parts are a, b, c, z and the rest.
    now, others = np.array([2, 0, 0, 1, 0]) + 0.5, np.array([0, 2, 1, 0, 0]) + 0.5
    shares, usual = now / now.sum(), others / others.sum()
    assert city["d1"].drift == pytest.approx(((shares - usual) * np.log(shares / usual)).sum())
    assert city["d1"].drift_by_chance is not None
    assert city["d1"].drift < city["d1"].drift_by_chance  # three values say nothing
    alone = record_features(collect([next(batches())], SCHEMA), {"": collect([next(batches())], SCHEMA)}, 4.0)
    assert alone.features["city"][""].drift is None


def test_a_changed_day_drifts_beyond_chance_and_the_others_hardly() -> None:
    random = np.random.default_rng(0)
    parts = {
        day: batch([day] * 2000, [*random.normal(mean, 1, 2000)], [*random.choice(["a", "b"], 2000)], [0, 1] * 1000)
        for day, mean in (("d1", 0), ("d2", 0), ("d3", 0), ("d4", 2))
    }
    record = record_features(collect(parts.values(), SCHEMA), collect_days(parts.values(), SCHEMA), 4.0)
    drifts = {day: (entry.drift or 0) / (entry.drift_by_chance or 1) for day, entry in record.features["price"].items()}
    assert max(drifts, key=lambda day: drifts[day]) == "d4"
    assert drifts["d4"] > 20
    assert all((entry.drift or 0) < (entry.drift_by_chance or 0) for entry in record.features["city"].values())


def test_the_file_is_read_back_and_another_format_refused() -> None:
    record = recorded()
    assert FeatureRecord.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="format 9"):
        FeatureRecord.from_json('{"format": 9}')
