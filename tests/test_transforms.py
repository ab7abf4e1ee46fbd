"""Transforms as a list: what is read, what comes out, the same as row by row in plain Python, whatever the cut of the rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.config import TransformConfig
from mlenv.datasets.hashing import hash_ids
from mlenv.datasets.transforms.deduplicate import DeduplicateConfig
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.sampling import SampleConfig, SampleNegativesConfig, draw
from mlenv.datasets.transforms.values import BucketConfig, ClipConfig, HashConfig, TruncateConfig
from mlenv.errors import ConfigError, DataError
from mlenv.transforms import Transforms

COLUMNS = pa.schema(
    [
        ("key", pa.int64()),
        ("click", pa.int8()),
        ("x", pa.float64()),
        ("country", pa.string()),
        ("tags", pa.list_(pa.int64())),
        ("unused", pa.string()),
    ]
)
ROW = st.fixed_dictionaries(
    {
        "click": st.sampled_from([0, 1, None]),
        "x": st.one_of(st.none(), st.floats(-5, 5)),
        "country": st.sampled_from(["NO", "DE", "a b", None]),
        "tags": st.one_of(st.none(), st.lists(st.integers(0, 5), max_size=4)),
        "unused": st.just("u"),
    }
)


def batch(rows):
    return pa.RecordBatch.from_pylist([{"key": key, **row} for key, row in enumerate(rows)], schema=COLUMNS)


def run(transforms, rows, wanted=None, *, is_training=True):
    chain = Transforms(transforms, ("key",), is_training=is_training)
    plan = chain.plan(wanted or chain.output_schema(rows.schema).names)
    return chain.apply(plan, rows.select(list(plan.stored)))


def by_hand(transforms, rows):
    """One row after the other, in plain Python."""
    kept = []
    for row in rows.to_pylist():
        row = apply_by_hand(transforms, row)
        if row is not None:
            kept.append(row)
    return kept


def chance(key, name, seed):
    column = pa.RecordBatch.from_pydict({"key": pa.array([key], pa.int64())})
    return draw(column, ("key",), name, seed)[0]


def apply_by_hand(transforms, row):
    for one in transforms:
        if isinstance(one, FilterConfig):
            if row["x"] is None or not row["x"] > -1:
                return None
        elif isinstance(one, DeriveConfig):
            row = row | {"score": None if None in (row["click"], row["x"]) else row["click"] + row["x"] * 2}
        elif isinstance(one, SampleNegativesConfig):
            negative = row["click"] == 0
            if negative and chance(row["key"], "SampleNegativesConfig", one.seed) >= one.rate:
                return None
            row = row | {"weight": 1 / one.rate if negative else 1.0}
        elif isinstance(one, SampleConfig):
            rate = one.rates.get(row["country"], one.default_rate)
            if chance(row["key"], "SampleConfig", one.seed) >= rate:
                return None
        elif isinstance(one, HashConfig):
            code = None if row["country"] is None else int(hash_ids(pa.array([row["country"]]))[0]) % one.num_buckets
            row = row | {"country_code": code}
        elif isinstance(one, BucketConfig):
            row = row | {"x_bucket": None if row["x"] is None else sum(bound <= row["x"] for bound in one.boundaries)}
        elif isinstance(one, ClipConfig):
            row = row | {"x": None if row["x"] is None else min(max(row["x"], one.lower), one.upper)}
        elif isinstance(one, TruncateConfig):
            row = row | {"tags": None if row["tags"] is None else row["tags"][-one.max_length :]}
    return row


EVERY = [
    FilterConfig(where="x > -1"),
    DeriveConfig(column="score", sql="click + x * 2"),
    SampleNegativesConfig(negative="click = 0", rate=0.5, weight_column="weight", seed=3),
    SampleConfig(column="country", rates={"NO": 0.4, "DE": 0.0}, default_rate=0.8),
    HashConfig(column="country", num_buckets=7, into="country_code"),
    BucketConfig(column="x", boundaries=(-0.5, 0.0, 2.0), into="x_bucket"),
    ClipConfig(column="x", lower=-0.25, upper=1.0),
    TruncateConfig(columns=("tags",), max_length=2),
]


@given(st.lists(ROW, max_size=30), st.lists(st.sampled_from(range(len(EVERY))), max_size=8, unique=True))
def test_any_list_equals_the_same_row_by_row(rows, order):
    transforms = [EVERY[place] for place in order]
    out, kept = run(transforms, batch(rows))
    expected = by_hand(transforms, batch(rows))
    assert [row["key"] for row in out.to_pylist()] == [row["key"] for row in expected]
    for row, other in zip(out.to_pylist(), expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            same = row[name] == other[name] or (isinstance(row[name], float) and math.isclose(row[name], other[name], rel_tol=1e-12))
            assert same, name
    assert (list(range(len(rows))) if kept is None else kept.tolist()) == out.column("key").to_pylist()


@given(st.lists(ROW, min_size=1, max_size=30), st.data())
def test_the_cut_and_the_order_of_the_rows_do_not_matter(rows, data):
    whole = batch(rows)
    expected = {row["key"]: row for row in run(EVERY, whole)[0].to_pylist()}
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    shuffled = whole.take(pa.array(order, pa.int64()))
    parts = [run(EVERY, part)[0] for part in (shuffled.slice(0, cut), shuffled.slice(cut))]
    seen = [row for part in parts for row in part.to_pylist()]
    assert {row["key"]: row for row in seen} == expected
    assert [row["key"] for row in seen] == [key for key in order if key in expected]


@given(st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_rates_hold_and_weights_undo_them(rate, seed):
    size = 4000
    rows = pa.RecordBatch.from_pydict({"key": np.arange(size), "click": np.arange(size) % 4 == 0, "w": np.full(size, 3.0)})
    config = SampleNegativesConfig(negative="NOT click", rate=rate, weight_column="weight", base_weight="w", seed=seed)
    out, _ = run([config], rows)
    clicks = out.column("click").to_numpy(zero_copy_only=False)
    assert clicks.sum() == size / 4
    negatives = len(clicks) - clicks.sum()
    assert abs(negatives - 3000 * rate) <= 5 * math.sqrt(3000 * rate * (1 - rate)) + 1
    np.testing.assert_allclose(out.column("weight").to_numpy(), np.where(clicks, 3.0, 3.0 / rate))


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.sampled_from(["SampleConfig", "StratifyConfig"]))
def test_draws_of_two_seeds_are_uniform_and_independent(seed, other, name):
    rows = pa.RecordBatch.from_pydict({"key": np.arange(4000), "day": ["d"] * 4000})
    first, second = draw(rows, ("key", "day"), "SampleConfig", seed), draw(rows, ("key", "day"), name, other)
    for drawn in (first, second):
        counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 45  # chi-squared of 9 degrees: one in a million
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(4000) or (name == "SampleConfig" and seed == other and correlation == pytest.approx(1))


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(column="country", rates={"a": 0.25, "b": 0.6}, default_rate=0.5),
        SampleNegativesConfig(negative="country = 'a'", rate=0.25),
    ],
)
def test_weights_add_up_to_the_stored_rows_on_average(config):
    rows = pa.RecordBatch.from_pydict({"key": np.arange(300), "country": np.array(list("abc"))[np.arange(300) % 3]})
    sums = [np.sum(run([replace(config, weight_column="w", seed=seed)], rows)[0]["w"].to_numpy()) for seed in range(200)]
    rates = np.array(
        [{"a": 0.25, "b": 0.6, "c": 0.5}[name] if isinstance(config, SampleConfig) else {"a": 0.25}.get(name, 1) for name in "abc"]
    )
    error = math.sqrt((100 * (1 - rates) / rates).sum() / len(sums))
    assert abs(np.mean(sums) - 300) <= 4 * error


def test_two_samplers_draw_independently():
    rows = pa.RecordBatch.from_pydict({"key": np.arange(20_000)})
    one, two, three = (
        SampleConfig(default_rate=0.5),
        SampleConfig(default_rate=0.5, seed=1),
        SampleNegativesConfig(negative="1 = 1", rate=0.5),
    )
    for other in (two, three):
        assert abs(run([one, other], rows)[0].num_rows - 5000) < 400
    assert run([one, one], rows)[0].num_rows == run([one], rows)[0].num_rows


def test_fates_do_not_hang_on_how_the_key_is_stored():
    config, plain = SampleConfig(default_rate=0.5), np.arange(500)
    expected = run([config], pa.RecordBatch.from_pydict({"key": plain}))[1].tolist()
    assert run([config], pa.RecordBatch.from_pydict({"key": plain.astype(np.int16)}))[1].tolist() == expected
    texts = pa.array([f"k{row}" for row in plain])
    as_texts = run([config], pa.RecordBatch.from_pydict({"key": texts}))[1].tolist()
    assert run([config], pa.RecordBatch.from_pydict({"key": texts.dictionary_encode()}))[1].tolist() == as_texts


def test_held_out_rows_are_not_sampled_but_have_their_weight():
    rows = batch([{"click": 0, "x": 1.0, "country": "NO", "tags": [], "unused": ""}] * 50)
    assert run(EVERY, rows)[0].num_rows < 30
    out, kept = run([*EVERY, FilterConfig(where="x > 9", when="train")], rows, is_training=False)
    assert (out.num_rows, kept) == (50, None)
    assert out.column("weight").to_pylist() == [1.0] * 50
    always = SampleNegativesConfig(negative="click = 0", rate=0.5, when="always")
    assert run([always], rows, is_training=False)[0].num_rows < 50


def test_only_what_is_needed_is_read_and_computed():
    chain = Transforms(EVERY, ("key",), is_training=True)
    plan = chain.plan(["tags"])
    assert set(plan.stored) == {"tags", "x", "click", "country", "key"}
    assert [place for place, _ in plan.steps] == [0, 2, 3, 7]
    assert chain.plan(["x_bucket"]).wanted == ("x_bucket",)
    assert set(Transforms(EVERY[4:], ("key",), is_training=True).plan(["country_code", "unused"]).stored) == {"country", "unused"}
    nothing = Transforms([], ("key",), is_training=True).plan(["a", "b", "a"])
    assert (nothing.stored, nothing.steps, nothing.drops_rows) == (("a", "b"), (), False)


def test_columns_that_nobody_touches_are_not_copied():
    rows = batch([{"click": 1, "x": 1.0, "country": "NO", "tags": [1], "unused": "u"}] * 4)
    out, _ = run([DeriveConfig(column="score", sql="x * 2"), FilterConfig(where="x > 0")], rows)
    for name in ("tags", "unused"):
        assert out.column(name).buffers()[-1].address == rows.column(name).buffers()[-1].address


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            FilterConfig(where="clik = 1"),
            r"data\.transforms\[1\]\.where: expected columns of the data\. Received: 'clik'\. Fix: did you mean 'click'",
        ),
        (FilterConfig(where="click"), r"\.where: expected an expression that is true or false\. Received: 'click, which is int8'"),
        (FilterConfig(where="x > 'a'"), r"\.where: expected an expression of matching types"),
        (FilterConfig(where="x > AVG(x)"), r"\.where: expected an expression over one row"),
        (DeriveConfig(column="n", sql="ROW_NUMBER() OVER (ORDER BY x)"), r"\.sql: expected an expression over one row"),
        (DeriveConfig(column="n", sql="UNNEST(tags)"), r"\.sql: expected an expression over one row"),
        (DeriveConfig(column="n", sql="country + 1"), r"\.sql: expected an expression of matching types"),
        (SampleConfig(column="tags", rates={"1": 0.5}), r"\.column: expected a column of plain values"),
        (SampleConfig(column="city", rates={"a": 0.5}), r"\.column: expected columns of the data"),
        (SampleNegativesConfig(negative="click = 0", rate=0.5, weight_column="w", base_weight="v"), r"\.base_weight: expected columns"),
        (HashConfig(column="x", num_buckets=3), r"\.column: expected a column of integers or texts. Received: 'x, which is double'"),
        (BucketConfig(column="country", boundaries=(1.0,)), r"\.column: expected a column of numbers"),
        (ClipConfig(column="click", lower=0.5), r"\.lower: expected a number that int8, the type of click, can hold"),
        (TruncateConfig(columns=("x",), max_length=2), r"\.columns: expected columns of lists"),
        (DeduplicateConfig(columns=("key", "clik")), r"\.columns: expected columns of the data"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_any_row(transform, message):
    chain = Transforms([DeriveConfig(column="ok", sql="x"), transform], ("key",), is_training=True)
    with pytest.raises(ConfigError, match=message):
        chain.output_schema(COLUMNS)


def test_a_sampler_needs_the_columns_of_the_key():
    chain = Transforms([SampleConfig(default_rate=0.5)], ("kee",), is_training=True)
    with pytest.raises(ConfigError, match=r"schema\.row_key: expected columns of the data\. Received: 'kee'.*did you mean 'key'"):
        chain.output_schema(COLUMNS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FilterConfig(where="x >"), r"where: expected an SQL expression"),
        (lambda: FilterConfig(where="day < CURRENT_DATE"), r"where: expected an expression that gives the same tomorrow"),
        (lambda: FilterConfig(where="1 = 1"), r"where: expected an expression that reads a column"),
        (lambda: DeriveConfig(column="", sql="1"), r"column: expected a name"),
        (lambda: SampleNegativesConfig(negative="x = 0", rate=0.0), r"rate: expected a number in \(0, 1\]"),
        (lambda: SampleNegativesConfig(negative="x = 0", rate=0.5, base_weight="w"), r"weight_column: expected a column to write"),
        (lambda: SampleConfig(column="c", rates={"a": 2.0}), r"rates\.a: expected a number in \[0, 1\]"),
        (lambda: SampleConfig(rates={"a": 0.5}), r"column: expected the column whose values have rates"),
        (lambda: HashConfig(column="c", num_buckets=0), r"num_buckets: expected a number >= 1"),
        (lambda: BucketConfig(column="c", boundaries=(1.0, 1.0)), r"boundaries: expected numbers in rising order"),
        (lambda: ClipConfig(column="c"), r"lower: expected a bound"),
        (lambda: ClipConfig(column="c", lower=2.0, upper=1.0), r"lower: expected a number not above upper"),
        (lambda: ClipConfig(column="c", lower=math.nan), r"lower: expected a finite number"),
        (lambda: TruncateConfig(columns=(), max_length=1), r"columns: expected at least one column"),
        (lambda: DeduplicateConfig(columns=()), r"columns: expected at least one column"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_value_that_cannot_be_computed_is_named():
    rows = batch([{"click": 1, "x": 1.0, "country": "NO", "tags": [1], "unused": "u"}])
    with pytest.raises(DataError, match=r"data\.transforms\[0\]\.sql: expected rows on which 'CAST\(country AS INT\)' can be computed"):
        run([DeriveConfig(column="n", sql="CAST(country AS INT)")], rows)


def test_literals_and_no_rows():
    rows = batch([{"click": 1, "x": 1.0, "country": "NO", "tags": [1], "unused": "u"}] * 3)
    transforms: list[TransformConfig] = [DeriveConfig(column="one", sql="1"), FilterConfig(where="click = 1")]
    assert run(transforms, rows)[0].column("one").to_pylist() == [1, 1, 1]
    assert run([*EVERY, *transforms], rows.slice(0, 0))[0].num_rows == 0


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", None])), max_size=8), min_size=1, max_size=4))
def test_of_equal_rows_the_first_stays(groups):
    config = DeduplicateConfig(columns=("a", "b"))
    batches = [
        pa.RecordBatch.from_pydict({"a": pa.array([a for a, _ in group], pa.int64()), "b": pa.array([b for _, b in group], pa.string())})
        for group in groups
    ]
    seen, expected = set(), []
    for group in groups:
        expected.append([place for place, row in enumerate(group) if row in seen or seen.add(row)])
    assert [rows.tolist() for rows in config.conclude([config.survey(rows) for rows in batches]).dropped] == expected


def test_bounds_keep_the_type_of_integers():
    rows = pa.RecordBatch.from_pydict({"n": pa.array([1, None, 9], pa.int8())})
    out, _ = run([ClipConfig(column="n", lower=2.0, upper=5.0)], rows)
    assert out.column("n").to_pylist() == [2, None, 5]
    assert out.schema == rows.schema
    floats = pa.RecordBatch.from_pydict({"n": pa.array([1.0, None, math.nan], pa.float32())})
    clipped = run([ClipConfig(column="n", lower=2.0)], floats)[0].column("n")
    assert clipped.is_valid().to_pylist() == [True, False, True]
    assert clipped[0].as_py() == 2.0
    assert math.isnan(clipped[2].as_py())


def test_values_of_a_dictionary_and_of_numbers_have_rates():
    rates = {"1": 0.0, "a": 0.0}
    for values in (pa.array([1, 2, None]), pa.array(["a", "b", None]), pa.array(["a", "b", None]).dictionary_encode()):
        rows = pa.RecordBatch.from_arrays([pa.array([0, 1, 2]), values], names=["key", "c"])
        assert run([SampleConfig(column="c", rates=rates)], rows)[1].tolist() == [1, 2]


def test_a_column_may_be_made_of_nothing():
    rows = batch([{"click": 1, "x": 1.0, "country": "NO", "tags": [1], "unused": "u"}] * 3)
    out, kept = run([DeriveConfig(column="one", sql="1")], rows, wanted=["one", "unused"])
    assert out.to_pydict() == {"one": [1, 1, 1], "unused": ["u"] * 3}
    assert kept is None
