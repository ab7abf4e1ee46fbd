"""Stratified sampling: the wanted shares and numbers, as many rows as can be, the same rows whatever the cut."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.sampling import SampleConfig
from mlenv.datasets.transforms.stratify import StratifyConfig
from mlenv.datasets.workers import ThreadsConfig
from mlenv.errors import ConfigError, DataError
from mlenv.schema import Label, Numeric, Schema
from mlenv.transforms import Transforms

SURFACE = ("surface",)


def table(surfaces, **columns):
    return pa.RecordBatch.from_pydict({"key": np.arange(len(surfaces)), "surface": pa.array(surfaces, pa.string()), **columns})


def run(config, *groups, is_training=True):
    """Rows that stay of several row groups, and what was noted."""
    chain = Transforms([config], ("key",), is_training=is_training)
    plan = chain.plan(chain.output_schema(groups[0].schema).names)
    findings = config.conclude([config.survey(rows.select(list(config.reads))) for rows in groups])
    return [chain.apply(plan, rows.select(list(plan.stored)), {0: findings.apply})[0] for rows in groups], findings.notes


def rows_of(groups):
    return pa.Table.from_batches(groups).to_pylist()


def test_the_scarcest_value_stays_whole_and_the_others_follow_their_shares():
    rows = table(["feed"] * 8000 + ["search"] * 1000 + [None] * 500 + ["ads"] * 1500)
    [out], notes = run(StratifyConfig(columns=SURFACE, shares={"feed": 0.5, "search": 0.25}, weight_column="w"), rows)
    counts = {value: out["surface"].to_pylist().count(value) for value in ("feed", "search", None, "ads")}
    assert counts["search"] == 1000
    for value, wanted, stored in (("feed", 2000, 8000), (None, 250, 500), ("ads", 750, 1500)):  # the last two share what is left
        assert abs(counts[value] - wanted) <= 5 * math.sqrt(wanted * (1 - wanted / stored))
    weights = {row["surface"]: row["w"] for row in out.to_pylist()}
    assert weights == {"feed": pytest.approx(4), "search": 1.0, None: pytest.approx(2), "ads": pytest.approx(2)}
    assert notes == ("keeps about 4000 of 11000 rows", "surface=feed: 0.25 of 8000 rows", "surface=search: 1 of 1000 rows")


def test_values_that_are_not_named_go_when_nothing_is_left_for_them():
    rows = table(["feed"] * 60 + ["search"] * 40 + [None] * 20)
    [out], _ = run(StratifyConfig(columns=SURFACE, shares={"feed": 0.6, "search": 0.4}), rows)
    assert out["surface"].to_pylist() == ["feed"] * 60 + ["search"] * 40
    [out], _ = run(StratifyConfig(columns=SURFACE, shares={"feed": 0.0, "null": 1.0}), rows)
    assert out["surface"].to_pylist() == [None] * 20


def test_combinations_of_columns_have_shares_too():
    generator = np.random.default_rng(0)
    surfaces, clicks = generator.choice(["feed", "search"], 20_000, p=[0.9, 0.1]), generator.random(20_000) < 0.1
    config = StratifyConfig(
        columns=("surface", "click"), shares={f"{surface}/{click}": 0.25 for surface in ("feed", "search") for click in (0, 1)}
    )
    [out], _ = run(config, table(surfaces, click=clicks.astype(np.int8)))
    found = [(row["surface"], row["click"]) for row in out.to_pylist()]
    least = int((clicks & (surfaces == "search")).sum())
    assert found.count(("search", 1)) == least
    for pair in (("feed", 0), ("feed", 1), ("search", 0)):
        assert abs(found.count(pair) - least) <= 5 * math.sqrt(least)


def test_no_value_keeps_more_rows_of_a_day_than_wanted():
    days = pa.array(["d1"] * 6000 + ["d2"] * 3000)
    rows = table(["feed"] * 5000 + ["search"] * 1000 + ["feed"] * 2950 + [None] * 50, date=days)
    [out], notes = run(StratifyConfig(columns=SURFACE, max_rows_per_value=500, weight_column="w"), rows)
    found = [(row["date"], row["surface"]) for row in out.to_pylist()]
    assert found.count(("d2", None)) == 50
    for pair in (("d1", "feed"), ("d1", "search"), ("d2", "feed")):
        assert abs(found.count(pair) - 500) <= 5 * math.sqrt(500)
    assert abs(np.sum(out["w"].to_numpy()) - 9000) <= 5 * math.sqrt(500 * (81 + 1 + 25))
    assert notes == ("keeps about 1550 of 9000 rows", "samples 3 of 4 values and days")
    [out], notes = run(StratifyConfig(columns=SURFACE, max_rows_per_value=500, day_column=""), rows)
    assert abs(out.num_rows - 1050) <= 5 * math.sqrt(1000)
    assert notes[1] == "samples 2 of 3 values"


@given(
    st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=60),
    st.lists(st.integers(0, 60), max_size=4),
    st.booleans(),
    st.integers(0, 5),
    st.randoms(),
)
def test_the_same_rows_stay_whatever_the_cut_and_the_order(surfaces, cuts, capped, seed, random):
    surfaces = ["a", "b", *surfaces]
    wanted = {"max_rows_per_value": 5, "day_column": ""} if capped else {"shares": {"a": 0.3, "c": 0.0}}
    config = StratifyConfig(columns=SURFACE, weight_column="w", seed=seed, **wanted)
    whole = table(surfaces)
    expected = {row["key"]: row for row in rows_of(run(config, whole)[0])}
    order = list(range(len(surfaces)))
    random.shuffle(order)
    shuffled = whole.take(pa.array(order))
    bounds = sorted({0, len(surfaces), *(cut for cut in cuts if cut < len(surfaces))})
    groups = [shuffled.slice(start, stop - start) for start, stop in pairwise(bounds)]
    groups.append(whole.slice(0, 0))  # a row group of which an earlier transform left nothing
    out = rows_of(run(config, *groups)[0])
    assert {row["key"]: row for row in out} == expected
    assert [row["key"] for row in out] == [key for key in order if key in expected]


@given(st.integers(0, 2**31), st.sampled_from([0.2, 0.5, 0.8]))
def test_shares_hold_within_the_chance_of_a_sample_and_weights_undo_them(seed, share):
    rows = table(["a"] * 3000 + ["b"] * 1000)
    [out], _ = run(StratifyConfig(columns=SURFACE, shares={"a": share, "b": 1 - share}, weight_column="w", seed=seed), rows)
    found = out["surface"].to_pylist()
    total = min(3000 / share, 1000 / (1 - share))
    for value, stored, wanted in (("a", 3000, total * share), ("b", 1000, total * (1 - share))):
        error = 5 * math.sqrt(wanted * (1 - wanted / stored)) + 1e-6
        assert abs(found.count(value) - wanted) <= error
        weights = out["w"].to_numpy()[np.array(found) == value]
        assert abs(weights.sum() - stored) <= error * stored / wanted + 1e-6


def test_another_sampler_draws_independently():
    rows = table(["a"] * 20_000 + ["b"] * 10_000)
    config = StratifyConfig(columns=SURFACE, shares={"a": 0.5, "b": 0.5})
    for other, expected in (
        (SampleConfig(column="surface", rates={"a": 0.5}), 5000),
        (StratifyConfig(columns=SURFACE, shares=config.shares, seed=1), 5000),
    ):
        kept = [set(run_one(one, rows)) for one in (config, other)]
        assert abs(len({key for key in kept[0] & kept[1] if key < 20_000}) - expected) < 350


def run_one(config, rows):
    if isinstance(config, StratifyConfig):
        return run(config, rows)[0][0]["key"].to_pylist()
    return (
        Transforms([config], ("key",), is_training=True)
        .apply(Transforms([config], ("key",), is_training=True).plan(["key", "surface"]), rows.select(["surface", "key"]))[0]["key"]
        .to_pylist()
    )


def test_held_out_rows_stay_and_have_the_weight_1():
    config = StratifyConfig(columns=SURFACE, shares={"a": 0.5, "b": 0.5}, weight_column="w", base_weight="v")
    rows = table(["a"] * 9 + ["b"], v=np.full(10, 3.0))
    chain = Transforms([config], ("key",), is_training=False)
    out, kept = chain.apply(chain.plan(["key", "w"]), rows)
    assert (out["w"].to_pylist(), kept) == ([3.0] * 10, None)
    assert StratifyConfig(columns=SURFACE, shares={"a": 1.0}).held_out() is None
    assert StratifyConfig(columns=SURFACE, shares={"a": 1.0}, when="always").held_out() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ()}, "columns: expected at least one column"),
        ({}, "shares: expected either shares or max_rows_per_value. Received: 'neither'"),
        ({"shares": {"a": 1.0}, "max_rows_per_value": 1}, "Received: 'both'"),
        ({"shares": {"a": 1.2}}, r"shares\.a: expected a number in \[0, 1\]"),
        ({"shares": {"a": 0.7, "b": 0.7}}, "shares: expected shares that add up to at most 1"),
        ({"shares": {"a": 0.0}}, "shares: expected shares that add up to at most 1, and not to 0"),
        ({"shares": {"a": 1.0}, "base_weight": "v"}, "weight_column: expected a column to write"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        StratifyConfig(**({"columns": SURFACE} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": ("surfase",), "shares": {"a": 1.0}},
            "columns: expected columns of the data. Received: 'surfase'. Fix: did you mean 'surface'",
        ),
        ({"columns": ("tags",), "shares": {"a": 1.0}}, "columns: expected columns of plain values"),
        ({"max_rows_per_value": 5}, "day_column: expected columns of the data. Received: 'date'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(options, message):
    config = StratifyConfig(**({"columns": SURFACE} | options))
    with pytest.raises(ConfigError, match=message):
        config.output_schema(pa.schema({"surface": pa.string(), "tags": pa.list_(pa.int64())}))


def test_shares_of_values_that_no_row_has_are_refused():
    rows = table(["feed"] * 3 + ["search"])
    for shares, message in (
        (
            {"feed": 0.5, "searc": 0.5},
            r"shares\.searc: expected rows with this value of surface\. Received: 'none'\. Fix: did you mean 'search'",
        ),
        ({"feed": 0.5, "search": 0.3}, "shares: expected shares that add up to 1, because no row has another value"),
    ):
        config = StratifyConfig(columns=SURFACE, shares=shares)
        with pytest.raises(DataError, match=message):
            config.conclude([config.survey(rows)])


SCHEMA = Schema(features={"x": Numeric()}, labels={"click": Label(weight="w")}, row_key=("key",))
STRATIFIED = (FilterConfig(where="x >= 10"), StratifyConfig(columns=SURFACE, shares={"feed": 0.5, "search": 0.5}, weight_column="w"))


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for day in range(3):
        rows = {"key": np.arange(300) + 300 * day, "x": np.arange(300.0), "click": generator.integers(0, 2, 300)}
        rows["surface"] = generator.choice(["feed", "search"], 300, p=[0.9, 0.1] if day else [0.5, 0.5])
        (tmp_path / f"date=2026-01-0{day + 1}").mkdir()
        pq.write_table(pa.table(rows), tmp_path / f"date=2026-01-0{day + 1}/part.parquet", row_group_size=70)
    return tmp_path


def source(folder, *, data=None, **options):
    config = DataConfig(
        path=str(folder), train=WindowConfig(), transforms=STRATIFIED, **({"batch_size": 32, "shuffle_rows": 50} | (data or {}))
    )
    return ParquetSource(config, WindowConfig(), SCHEMA, extras=("metadata",), is_training=True, **options)


def keys(batches):
    return [key for batch in batches for key in batch.metadata.column("key").to_pylist()]


def test_the_window_is_balanced_on_any_number_of_ranks_and_threads_and_after_a_resume(folder):
    reader = source(folder)
    whole = list(reader.batches())
    table = pa.concat_tables(pq.read_table(file, partitioning=None) for file in sorted(folder.rglob("*.parquet")))
    surface = dict(zip(table["key"].to_pylist(), table["surface"].to_pylist(), strict=True))
    stays = [surface[key] for key in keys(whole)]
    searches = [key for key, value in surface.items() if value == "search" and key % 300 >= 10]
    assert {key for key in keys(whole) if surface[key] == "search"} == set(searches)
    assert abs(stays.count("feed") - len(searches)) <= 5 * math.sqrt(len(searches))
    assert (reader.num_rows, reader.num_batches) == (len(stays), len(whole))
    assert reader.findings[0].startswith("data.transforms[1]: keeps about")
    for world_size in (2, 3):
        readers = [
            source(folder, shuffle=True, rank=rank, world_size=world_size, data={"workers": ThreadsConfig(num_threads=3)})
            for rank in range(world_size)
        ]
        assert sorted(key for reader in readers for key in keys(reader.batches())) == sorted(keys(whole))
    options = {"shuffle": True, "num_epochs": 2}
    batches = list(source(folder, **options).batches())
    for place, batch in enumerate(batches):
        assert keys(source(folder, **options).batches(batch.position)) == keys(batches[place + 1 :])
