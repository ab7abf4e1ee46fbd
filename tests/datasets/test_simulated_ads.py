from __future__ import annotations

import dataclasses
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mlenv.composition import from_plain
from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets import simulated_ads
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.simulated_ads import ClickHistory, SimulationConfig, simulate
from mlenv.datasets.simulated_world import CLICK, CONVERSION
from mlenv.errors import ConfigError
from mlenv.schema import Schema

SMALL = SimulationConfig(num_days=3, rows_per_day=3000, num_users=30, num_items=40, num_advertisers=5, history_length=4, null_rate=0.1)
SCHEMA = Path(__file__).parents[2] / "examples" / "demo" / "schema.yaml"


def read(folder):
    return pl.concat([pl.read_parquet(path).with_columns(day=pl.lit(path.parent.name[5:])) for path in sorted(folder.rglob("*.parquet"))])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "ads"
    simulate(SMALL, out)
    return out


@pytest.fixture(scope="module")
def rows(small):
    return read(small)


def test_days_and_times(small, rows):
    assert sorted(path.name for path in small.iterdir()) == ["date=2026-01-01", "date=2026-01-02", "date=2026-01-03"]
    assert rows["event_time"].is_sorted()
    assert (rows["event_time"].dt.strftime("%Y-%m-%d") == rows["day"]).all()
    assert (rows["event_time"].dt.hour() == rows["hour"]).all()
    assert (rows["is_weekend"] == (rows["day"] == "2026-01-03")).all()  # a Saturday


def test_rows_of_a_request_were_shown_together(rows):
    assert rows["impression_id"].to_list() == list(range(9000))
    requests = rows.group_by("request_id").agg(pl.len(), pl.col("event_time", "user_id", "placement", "device", "item_id").n_unique())
    assert requests["len"].min() == 1
    assert requests["len"].max() == 8
    assert (requests["item_id"] == requests["len"]).all()
    assert all((requests[name] == 1).all() for name in ("event_time", "user_id", "placement", "device"))


def test_types(small):
    schema = pq.read_schema(small / "date=2026-01-01" / "part-00000.parquet")
    assert schema.field("event_time").type == pa.timestamp("ms", tz="UTC")
    assert schema.field("interests").type == pa.list_(pa.string())
    assert schema.field("item_vector").type == pa.list_(pa.float32(), 8)
    assert (schema.field("topic_weights").type.key_type, schema.field("topic_weights").type.item_type) == (pa.string(), pa.float32())
    assert schema.field("history_item").type == pa.list_(pa.int64())
    assert schema.field("click").type == schema.field("conversion").type == pa.int8()


def test_nulls_are_where_they_may_be(rows):
    shares = {name: rows[name].null_count() / len(rows) for name in rows.columns if rows[name].null_count()}
    del shares["conversion_time"]
    assert shares == {name: pytest.approx(0.1, abs=0.02) for name in ("user_age_bucket", "user_country", "interests", "price")}


def test_history_is_what_was_known_when_the_hour_began(rows):
    clicks = defaultdict(list)
    for row in rows.iter_rows(named=True):
        begin = row["event_time"].replace(minute=0, second=0, microsecond=0)
        past = [click for click in clicks[row["user_id"]] if click["event_time"] < begin][-SMALL.history_length :]
        arrived = [click["conversion_time"] is not None and click["conversion_time"] < begin for click in past]
        assert row["history_item"] == [click["item_id"] for click in past]
        assert row["history_action"] == ["conversion" if converted else "click" for converted in arrived]
        if row["click"]:
            clicks[row["user_id"]].append(row)
    assert rows["history_action"].explode().n_unique() == 2


def test_a_ring_keeps_the_last_clicks():
    history = ClickHistory(num_users=3, length=2)
    never = np.iinfo(np.int64).max
    history.append(np.array([0, 2, 0, 0]), np.array([10, 11, 12, 13]), np.array([never, 50, 60, never]))
    past = history.at(55, np.array([0, 1, 2]))
    assert past.items[0].tolist() == [12, 13]
    assert past.is_filled.tolist() == [[True, True], [False, False], [True, False]]
    assert past.has_converted[0].tolist() == [False, False]  # the conversion of item 12 arrives at 60
    assert history.at(61, np.array([0])).has_converted[0].tolist() == [True, False]
    assert (past.items[2, 0], past.has_converted[2, 0]) == (11, True)
    history.append(np.array([0]), np.array([14]), np.array([never]))
    assert history.at(61, np.array([0])).items[0].tolist() == [13, 14]


def test_conversions_follow_clicks_late(rows):
    converted = rows.filter(pl.col("conversion") == 1)
    assert (converted["click"] == 1).all()
    assert (rows["conversion_time"].is_not_null() == (rows["conversion"] == 1)).all()
    delays = (converted["conversion_time"] - converted["event_time"]).dt.total_milliseconds() / 3_600_000
    assert delays.min() > 0
    assert delays.mean() == pytest.approx(6, rel=4 / len(converted) ** 0.5)


def test_labels_follow_the_true_probabilities(rows):
    for labels, probabilities in (
        (rows["click"], rows["true_click_probability"]),
        (rows.filter(pl.col("click") == 1)["conversion"], rows.filter(pl.col("click") == 1)["true_conversion_probability"]),
    ):
        deviation = (probabilities * (1 - probabilities)).sum() ** 0.5
        assert abs(labels.sum() - probabilities.sum()) < 4 * deviation


def test_the_default_world_is_neither_trivial_nor_hopeless(tmp_path):
    simulate(SimulationConfig(num_days=1, rows_per_day=60_000), tmp_path / "ads")
    rows = read(tmp_path / "ads")
    clicked = rows.filter(pl.col("click") == 1)
    assert 0.08 < rows["click"].mean() < 0.15
    assert 0.75 < roc_auc_score(rows["click"], rows["true_click_probability"]) < 0.82
    assert 0.08 < clicked["conversion"].mean() < 0.15
    assert 0.70 < roc_auc_score(clicked["conversion"], clicked["true_conversion_probability"]) < 0.80


@pytest.mark.parametrize("task", ["CLICK", "CONVERSION"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CLICK)])
def test_every_feature_matters_to_both_tasks(tmp_path, monkeypatch, task, name):
    def probabilities(folder):
        simulate(dataclasses.replace(SMALL, rows_per_day=500), folder)
        return read(folder)[f"true_{task.lower()}_probability"]

    before = probabilities(tmp_path / "before")
    monkeypatch.setattr(simulated_ads, task, dataclasses.replace({"CLICK": CLICK, "CONVERSION": CONVERSION}[task], **{name: 0.0}))
    after = probabilities(tmp_path / "after")
    assert (before - after).abs().max() > 1e-3


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_the_same_seed_gives_the_same_bytes(small, tmp_path):
    simulate(SMALL, tmp_path / "again")
    assert files(tmp_path / "again") == files(small)
    simulate(dataclasses.replace(SMALL, seed=1), tmp_path / "other")
    assert read(tmp_path / "other")["click"].to_list() != read(small)["click"].to_list()


def test_a_longer_log_begins_like_a_shorter_one(small, tmp_path):
    simulate(dataclasses.replace(SMALL, num_days=2), tmp_path / "shorter")
    assert files(tmp_path / "shorter").items() <= files(small).items()


def test_drift_moves_the_later_days(small, tmp_path):
    simulate(dataclasses.replace(SMALL, drift=0.5), tmp_path / "drifting")
    still, drifting = files(small), files(tmp_path / "drifting")
    first, *later = still
    assert drifting[first] == still[first]
    assert all(drifting[name] != still[name] for name in later)
    logits = read(small).select(pl.col("day"), logit=(pl.col("true_click_probability") / (1 - pl.col("true_click_probability"))).log())
    moved = read(tmp_path / "drifting").select(logit=(pl.col("true_click_probability") / (1 - pl.col("true_click_probability"))).log())
    shifts = logits.with_columns(shift=(moved["logit"] - logits["logit"]).abs()).group_by("day").agg(pl.col("shift").mean()).sort("day")
    assert 0 == shifts["shift"][0] < shifts["shift"][1] < shifts["shift"][2]


def test_the_example_schema_reads_every_row(tmp_path):
    simulate(SimulationConfig(num_days=1, rows_per_day=5000), tmp_path / "ads")
    schema = from_plain(yaml.safe_load(SCHEMA.read_text())["schema"], Schema, "schema")
    reader = ParquetSource(DataConfig(path=str(tmp_path / "ads"), train=WindowConfig()), WindowConfig(), schema, extras=("metadata",))
    assert sum(len(batch) for batch in reader.batches()) == 5000
    never = {"true_click_probability", "true_conversion_probability", "conversion_time", "conversion"}
    inputs = {key.column for key in schema.sparse_keys} | {column.column for column in schema.dense_columns}
    assert not inputs & never


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_days", 0),
        ("rows_per_day", 0),
        ("num_items", 15),
        ("num_placements", 9),
        ("null_rate", 1.0),
        ("drift", -0.1),
        ("drift", float("nan")),
        ("conversion_delay_hours", 0.0),
        ("start_date", "01/02/2026"),
        ("seed", -1),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        SimulationConfig(**{name: value})


def test_start_date(tmp_path):
    simulate(dataclasses.replace(SMALL, num_days=2, rows_per_day=50, start_date="2027-12-31"), tmp_path / "ads")
    first = date(2027, 12, 31)
    assert sorted(path.name for path in (tmp_path / "ads").iterdir()) == [f"date={first}", f"date={first + timedelta(days=1)}"]
