"""Corrupted rows against rows whose values were changed one by one."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import torch

from mlenv.batch import START, Batch
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.encoding import encode
from mlenv.robustness.corruptions import DAY, Corruptions, HeldRows, busiest_hours, draw_rows, entity_columns, find_day_before
from mlenv.schema import Categorical, DenseVector, Label, Numeric, Schema, Table, Weighted

SCHEMA = Schema(
    features={
        "age": Numeric(entity="user"),
        "user": Categorical(entity="user"),
        "topics": Weighted(entity="user"),
        "vector": DenseVector(entity="item", dim=2),
        "hour": Categorical(),
    },
    tables={name: Table(num_embeddings=50, embedding_dim=4) for name in ("user", "topics", "hour")},
    labels={"click": Label()},
    event_time="time",
)
NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
HOURS = [-30, -25, -24, -3, 0, 0, 1]
"""When the rows happen, from noon on; the first three are earlier rows."""
USERS = [7, 8, 7, 7, 7, 8, None]


def rows() -> pa.RecordBatch:
    times = [NOON + datetime.timedelta(hours=hours) for hours in HOURS]
    return pa.RecordBatch.from_pydict(
        {
            "age": pa.array([10.0, 11, 12, 13, 14, None, 16]),
            "user": pa.array(USERS, pa.int64()),
            "topics": pa.array([[(row, 0.5), (row + 1, 2.0)] for row in range(7)], pa.map_(pa.int64(), pa.float32())),
            "vector": pa.array([[row, -row] for row in range(7)], pa.list_(pa.float32())),
            "hour": pa.array([time.hour for time in times]),
            "time": pa.array(times, pa.timestamp("ms", "UTC")),
            "click": pa.array([0, 1, 0, 1, 0, 1, 0]),
        }
    )


def held() -> HeldRows:
    pool = to_batch([encode(rows(), SCHEMA, extras=("metadata",))], START)
    batch = to_batch([encode(rows().slice(3), SCHEMA, extras=("metadata",))], START)
    return HeldRows(batch=batch, pool=pool, day_before={"user": find_day_before(rows(), 3, "user", "time")})


def weights_of(batch: Batch) -> list[float]:
    assert batch.sparse.weights is not None
    place = [key.name for key in SCHEMA.sparse_keys].index("topics")
    part = batch.sparse.select(place, place + 1)
    assert part.weights is not None
    return part.weights.tolist()


def test_the_day_before_is_the_last_row_at_least_a_day_earlier():
    # User 7 at -3 h: only -30 h is a day before; at 0 h: -24 h is, exactly. User 8 at 0 h: -25 h. Nobody is without an id.
    assert find_day_before(rows(), 3, "user", "time").tolist() == [0, 2, 1, -1]
    assert DAY == 24 * 3600 * 10**6
    assert entity_columns(SCHEMA) == {"user": "user"}


def test_stale_values_are_those_of_the_day_before():
    corruptions = Corruptions(SCHEMA, held(), seed=0)
    corrupted, reached = corruptions.of("stale", {"age"}, torch.tensor([True, True, False, True]))
    assert reached.tolist() == [True, True, False, False]
    assert corrupted.dense[:, 0].tolist() == [10, 12, 0, 16]  # a null became the default
    assert corrupted.dense[:, 1:].tolist() == held().batch.dense[:, 1:].tolist()
    assert [corruptions.can("stale", feature) for feature in SCHEMA.features] == [True, False, True, False, False]


def test_numbers_are_scaled_and_negated_in_the_rows_that_are_hit():
    corruptions = Corruptions(SCHEMA, held(), seed=0)
    hit = torch.tensor([True, False, True, False])
    scaled, _ = corruptions.of("scaled", {"age", "topics", "vector"}, hit)
    assert scaled.dense.tolist() == [[130, 30, -30], [14, 4, -4], [0, 50, -50], [16, 6, -6]]
    assert weights_of(scaled) == [5, 20, 0.5, 2, 5, 20, 0.5, 2]
    negated, _ = corruptions.of("negated", {"vector"}, hit)
    assert negated.dense.tolist() == [[13, -3, 3], [14, 4, -4], [0, -5, 5], [16, 6, -6]]
    assert weights_of(negated) == weights_of(held().batch)
    assert [corruptions.can("scaled", feature) for feature in SCHEMA.features] == [True, False, True, True, False]


def test_values_of_other_rows_are_seeded():
    others = [
        Corruptions(SCHEMA, held(), seed=seed).of("other", {"age"}, torch.ones(4, dtype=torch.bool))[0].dense[:, 0] for seed in (0, 0, 1, 2)
    ]
    assert torch.equal(others[0], others[1])
    assert any(not torch.equal(others[0], other) for other in others[2:])
    assert all(set(other.tolist()) <= {13, 14, 0, 16} for other in others)
    drawn = draw_rows(10_000, 0.2, 3)
    assert np.array_equal(drawn, np.random.default_rng(3).random(10_000) < 0.2)
    assert abs(drawn.mean() - 0.2) < 0.02


def test_the_busiest_hours_have_the_most_rows():
    assert busiest_hours(rows(), "time", 1)[0] == [12]
    hours, at_peak = busiest_hours(rows(), "time", 3)
    assert hours == [6, 9, 12]  # of hours with one row each the earliest
    assert at_peak.tolist() == [True, False, True, True, True, True, False]
