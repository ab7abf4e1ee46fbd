"""Faults that are put into data, and the findings that must name them; and clean data, in which nothing may be found."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.stats import ks_2samp

from mlenv.checks.findings import Verdict
from mlenv.checks.validation import validate_statistics
from mlenv.checks.validation_run import validate
from mlenv.composition import compose
from mlenv.config import ChecksConfig, Limits, WindowConfig
from mlenv.datasets.kuairand import convert_kuairand, convert_kuairand_log
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.datasets.statistics import Statistics, collect, read_statistics
from mlenv.errors import ConfigError, GateError, Problems
from mlenv.schema import Categorical, Label, Numeric, Schema, Table

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no KuaiRand files in {REAL}: set MLENV_DATA to the folder that holds kuairand/"
)

Change = Callable[[pa.Table, np.random.Generator], pa.Table]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "ads"
    simulate(SimulationConfig(num_days=5, rows_per_day=5000), folder)
    return folder


@pytest.fixture(scope="module")
def kuairand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "kuairand"
    convert_kuairand(REAL, folder)
    return folder


def changed(source: Path, folder: Path, changes: dict[str, Change | None]) -> Path:
    """The data set with some days changed, or left out."""
    folder.mkdir()
    for day in source.iterdir():
        name = day.name.removeprefix("date=")
        if name not in changes:
            (folder / day.name).symlink_to(day)
        elif (change := changes[name]) is not None:
            (folder / day.name).mkdir()
            table = pq.ParquetFile(day / "part-00000.parquet").read()
            pq.write_table(change(table, np.random.default_rng(0)), folder / day.name / "part-00000.parquet")
    return folder


def replaced(table: pa.Table, column: str, values) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


def nulls_doubled(column: str, share: float) -> Change:
    return lambda table, generator: replaced(
        table,
        column,
        pc.if_else(pa.array(generator.random(len(table)) < share), pa.scalar(None, table[column].type), table[column]),
    )


def renamed(column: str, before: str, after: str) -> Change:
    return lambda table, _: replaced(table, column, pc.if_else(pc.equal(table[column], before), after, table[column]))


def times_thousand(column: str) -> Change:
    return lambda table, _: replaced(table, column, pc.multiply(table[column], 1000.0).cast(table[column].type))


def labels_late(column: str) -> Change:
    return lambda table, generator: replaced(
        table, column, pc.if_else(pa.array(generator.random(len(table)) < 0.6), pa.scalar(0, table[column].type), table[column])
    )


def rows_repeated(table: pa.Table, generator: np.random.Generator) -> pa.Table:
    return pa.concat_tables([table, table.take(generator.integers(0, len(table), len(table) // 50))])


def last_hours_missing(table: pa.Table, _: np.random.Generator) -> pa.Table:
    return table.filter(pc.less(pc.hour(table["event_time"]), 12))


def demo(path: Path, *overrides: str, train_end: str = "2026-01-02", test_end: str = "2026-01-05"):
    days = [f"data.train.end={train_end}", "data.test.start=2026-01-03", f"data.test.end={test_end}"]
    return compose(ROOT / "examples/demo/ranker.yaml", [f"data.path={path}", "embeddings.engine=torch", *days, *overrides])


def real(path: Path, *overrides: str, baseline: str = "2022-05-06", window: str = "2022-05-07"):
    days = [f"data.train={{start: {baseline}, end: {baseline}}}", f"data.test={{start: {window}, end: {window}}}"]
    none = ["data.validation=null", "loop.evaluate_every_steps=0"]
    return compose(ROOT / "examples/kuairand/dcn_v2.yaml", [f"data.path={path}", *days, *none, *overrides])


def found(verdict: Verdict) -> set[tuple[str, str, str]]:
    return {(finding.severity, finding.check, finding.subject) for finding in verdict.raised}


def test_clean_simulated_days_give_no_finding(simulated):
    assert found(validate(demo(simulated))) == set()
    assert found(validate(demo(simulated), window="train")) == set()


LAST = "2026-01-05"
EVERY_TEST_DAY = ("2026-01-03", "2026-01-04", LAST)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict.fromkeys(EVERY_TEST_DAY, nulls_doubled("price", 0.03)), {("warn", "coverage_drop", "price")}),
        (dict.fromkeys(EVERY_TEST_DAY, nulls_doubled("placement", 0.03)), {("fail", "coverage_drop", "placement")}),  # it is core
        ({"2026-01-04": None}, {("fail", "missing_days", "2026-01-04")}),
        (
            dict.fromkeys(EVERY_TEST_DAY, renamed("device", "desktop", "Desktop")),
            {("fail", "new_value", "device"), ("fail", "lost_value", "device")},
        ),
        (dict.fromkeys(EVERY_TEST_DAY, times_thousand("price")), {("fail", "out_of_range", "price"), ("fail", "psi", "price")}),
        ({LAST: labels_late("click")}, {("fail", "label_rate", f"click on {LAST}")}),
        (dict.fromkeys(EVERY_TEST_DAY, rows_repeated), {("fail", "repeated_rows", "rows"), ("fail", "repeated_keys", "rows")}),
        ({LAST: last_hours_missing}, {("fail", "late_hours", LAST)}),
    ],
    ids=["nulls", "nulls of a core feature", "missing day", "renamed", "units", "late labels", "repeated rows", "half a day"],
)
def test_faults_in_simulated_data_are_found_and_named(simulated, tmp_path, changes, expected):
    verdict = validate(demo(changed(simulated, tmp_path / "ads", changes)))
    assert expected <= found(verdict)
    subjects = {subject.split(" ")[0] for _, _, subject in expected}
    blamed = {finding.subject.split(" ")[0] for finding in verdict.raised if finding.severity == "fail"}
    assert blamed <= subjects | {"rows", "hour"}  # nobody else is blamed; half a day has no evening


def test_a_leaking_column_is_found_without_a_baseline(simulated):
    leaks = "schema.features.true_click_probability={kind: numeric}"
    assert found(validate(demo(simulated, leaks), window="train")) == set()  # it says what can be known, and that is not too much
    schema = Schema(features={"later": Numeric()}, labels={"click": Label()})
    click = np.random.default_rng(0).integers(0, 2, 500)
    statistics = collect([pa.RecordBatch.from_pydict({"later": click * 3.5, "click": click})], schema)
    verdict = validate_statistics(statistics, None, schema, ChecksConfig())
    assert found(verdict) == {("fail", "leakage_auc", "later for click")}
    with pytest.raises(
        GateError, match=r"data\.train failed 1 of its checks.\n  - leakage_auc of later for click: .* Fix: take the feature out"
    ):
        verdict.require("data.train")


@needs_real_data
@pytest.mark.parametrize("days", [("2022-04-25", "2022-04-26"), ("2022-04-29", "2022-04-30"), ("2022-05-07", "2022-05-08")])
def test_clean_adjacent_days_of_kuairand_give_no_failure(kuairand, days):
    assert found(validate(real(kuairand, baseline=days[0], window=days[1]))) == set()


WINDOW = "2022-05-07"


@needs_real_data
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nulls_doubled("user_id", 0.1), {("fail", "coverage_drop", "user_id")}),
        (
            renamed("upload_type", "LongImport", "long_import"),
            {("fail", "new_value", "upload_type"), ("fail", "lost_value", "upload_type")},
        ),
        (times_thousand("duration_s"), {("fail", "out_of_range", "duration_s")}),
        (labels_late("click"), {("fail", "label_rate", "click")}),
        (rows_repeated, {("fail", "repeated_rows", "rows")}),
    ],
    ids=["nulls", "renamed", "units", "late labels", "repeated rows"],
)
def test_faults_in_kuairand_are_found_and_named(kuairand, tmp_path, change, expected):
    verdict = validate(real(changed(kuairand, tmp_path / "changed", {WINDOW: change})))
    assert expected <= found(verdict)
    assert {finding.subject for finding in verdict.raised if finding.severity == "fail"} <= {subject for *_, subject in expected} | {"rows"}


@needs_real_data
def test_play_time_as_a_feature_is_a_leak(kuairand):
    verdict = validate(real(kuairand, "schema.features.play_s={kind: numeric}"))
    assert found(verdict) == {("fail", "leakage_auc", "play_s for click"), ("fail", "leakage_auc", "play_s for long_view")}


@needs_real_data
@pytest.mark.slow
def test_the_repeated_rows_of_the_whole_log_are_found(tmp_path):
    convert_kuairand_log(REAL, tmp_path / "log")
    verdict = validate(real(tmp_path / "log", baseline="2022-04-25", window="2022-04-26"))
    assert found(verdict) == {("fail", "repeated_rows", "rows")}
    table = pq.ParquetFile(tmp_path / "log" / "date=2022-04-26" / "part-00000.parquet").read().drop_columns("impression_id")
    exact = 1 - len({repr(row) for row in table.to_pylist()}) / len(table)
    assert verdict.raised[0].value == pytest.approx(exact, abs=0.005)


def of_rows(columns: dict, schema: Schema) -> Statistics:
    return collect([pa.RecordBatch.from_pydict(columns)], schema)


TINY = Schema(
    features={"x": Numeric(), "id": Categorical(storage="string")},
    tables={"id": Table(num_embeddings=9, ids="hash")},
    labels={"click": Label()},
)


def drawn(rows: int, seed: int) -> dict:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.normal(size=rows),
        "id": generator.choice(list("abcd"), rows, p=[0.4, 0.3, 0.2, 0.1]),
        "click": generator.integers(0, 2, rows),
    }


@pytest.mark.parametrize("rows", [1, 5, 30, 200])
def test_small_samples_do_not_fail_by_noise(rows):
    for seed in range(20):
        now, before = of_rows(drawn(rows, seed), TINY), of_rows(drawn(2 * rows, 100 + seed), TINY)
        assert found(validate_statistics(now, before, TINY, ChecksConfig())) == set()
    nothing = {"x": pa.nulls(rows, pa.float64()), "id": pa.nulls(rows, pa.string()), "click": np.zeros(rows)}
    verdict = validate_statistics(of_rows(nothing, TINY), of_rows(nothing, TINY), TINY, ChecksConfig())
    assert verdict.severity == "pass"


def test_the_population_stability_index_is_that_of_its_formula():
    before = of_rows({"x": np.ones(1000), "id": ["a"] * 600 + ["b"] * 400, "click": np.zeros(1000)}, TINY)
    now = of_rows({"x": np.ones(1000), "id": ["a"] * 300 + ["b"] * 700, "click": np.zeros(1000)}, TINY)
    values = {
        (finding.check, finding.subject): finding.value for finding in validate_statistics(now, before, TINY, ChecksConfig()).findings
    }
    assert values["psi", "id"] == pytest.approx(0.3 * np.log(2) + 0.3 * np.log(7 / 4), rel=0.01)
    left, right = np.array([0.3, 0.7]), np.array([0.6, 0.4])
    middle = (left + right) / 2
    divergence = ((left * np.log2(left / middle)).sum() + (right * np.log2(right / middle)).sum()) / 2
    assert values["jensen_shannon", "id"] == pytest.approx(divergence, rel=0.01)
    assert values["kolmogorov_smirnov", "x"] == values["out_of_range", "x"] == 0


def test_the_distance_of_kolmogorov_and_smirnov_is_that_of_the_samples():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=3000), generator.normal(0.5, size=2000)
    sides = [of_rows({"x": x, "id": ["a"] * len(x), "click": np.zeros(len(x))}, TINY) for x in (first, second)]
    [finding] = [found for found in validate_statistics(*sides, TINY, ChecksConfig()).findings if found.check == "kolmogorov_smirnov"]
    assert finding.value == pytest.approx(ks_2samp(first, second).statistic, abs=0.01)


def test_a_limit_of_null_never_judges_and_a_free_feature_may_drift():
    before, now = drawn(2000, 0), drawn(2000, 1)
    now["x"] = now["x"] + 5
    sides = of_rows(now, TINY), of_rows(before, TINY)
    assert {check for _, check, _ in found(validate_statistics(*sides, TINY, ChecksConfig()))} == {
        "psi",
        "jensen_shannon",
        "kolmogorov_smirnov",
        "out_of_range",
    }
    never = Limits(warn=None, fail=None)
    checks = ChecksConfig(psi=never, jensen_shannon=never, kolmogorov_smirnov=Limits(warn=0.1, fail=None), out_of_range=never)
    assert found(validate_statistics(*sides, TINY, checks)) == {("warn", "kolmogorov_smirnov", "x")}
    assert found(validate_statistics(*sides, TINY, ChecksConfig(may_drift=("x",)))) == set()
    core = replace(TINY, features=TINY.features | {"x": Numeric(core=True)})
    assert found(validate_statistics(*sides, core, checks)) == {("fail", "kolmogorov_smirnov", "x")}


def test_days_that_the_window_names_are_missed_too(simulated):
    verdict = validate(demo(simulated, test_end="2026-01-07"))
    assert ("fail", "missing_days", "2026-01-06, 2026-01-07") in found(verdict)
    span = WindowConfig(start="2026-01-01", end="2026-01-02")
    assert validate_statistics(of_rows(drawn(9, 0), TINY), None, TINY, ChecksConfig(), span).severity == "pass"  # rows without days


def test_the_page_and_the_files_say_the_same(simulated, tmp_path):
    data = changed(simulated, tmp_path / "ads", dict.fromkeys(EVERY_TEST_DAY, times_thousand("price")))
    verdict = validate(demo(data), out=tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert (plain["severity"], len(plain["findings"])) == ("fail", len(verdict.findings))
    assert plain["findings"][0]["subject"] == "price"
    page = (tmp_path / "out" / "validation.html").read_text()
    assert len(re.findall(r'<td><span class="mark fail">fail</span></td>\n<th scope="row">price</th>', page)) == len(verdict.raised)
    assert "price: share of the values" in page
    assert "click by day" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    again = validate(demo(data), window="train", baseline=str(tmp_path / "out"))  # the statistics of the page are a baseline
    assert ("fail", "psi", "price") in found(again)


def test_the_page_shows_what_the_window_holds(simulated, tmp_path):
    nulls = changed(simulated, tmp_path / "ads", {LAST: nulls_doubled("price", 0.2)})
    validate(demo(nulls, "schema.segments=[device]", "schema.tables.item.ids=hash"), out=tmp_path / "out")
    page = (tmp_path / "out/validation.html").read_text()
    statistics = read_statistics(tmp_path / "out")
    rows = pl.read_parquet(nulls / "date=2026-01-0[345]/*.parquet")

    def cells(name: str) -> list[str]:
        row = re.search(rf'<th scope="row">{re.escape(name)}</th>\n((?:<td.*</td>\n)+)</tr>', page.split("Features of the window")[1])
        return re.findall(r"<td[^>]*>(.*)</td>", row[1])

    price = cells("price")
    assert f"{rows['price'].null_count():,} null" in price[0]
    found = [float(cell) for cell in price[2:9]]
    prices = rows["price"].drop_nulls().sort()
    quantiles = [prices[max(math.ceil(share * len(prices)) - 1, 0)] for share in (0, 0.05, 0.5, 0.95, 1)]
    assert found == pytest.approx([*quantiles, rows["price"].mean(), rows["price"].std(ddof=0)], rel=0.011)
    lists = rows["interests"].list.len()
    assert float(cells("interests")[9].split("<")[0]) == pytest.approx(lists.filter(lists > 0).mean(), abs=0.006)
    assert f"at most {lists.max()}" in cells("interests")[9]
    device, share = rows["device"].value_counts(sort=True).row(0)
    assert cells("device")[10].startswith(f"{device}: {share / len(rows):.1%}")
    last = pl.read_parquet(nulls / f"date={LAST}/*.parquet")
    newest = last["event_time"].max()
    assert cells(LAST)[:2] == [f"{len(last):,}", f"{last['click'].mean():.2%}"]
    assert cells(LAST)[-2:] == [f"{newest:%Y-%m-%d %H:%M:%S}", f"{hours_before_midnight(newest):.1f}"]
    of_device = rows.filter(pl.col("device") == device)
    assert cells(f"device={device}")[1].startswith(f"{of_device['click'].mean():.2%}<small>before ")
    assert "Ids that share a row" in page
    assert statistics.rows == len(rows)


def hours_before_midnight(newest: datetime.datetime) -> float:
    midnight = datetime.datetime.combine(newest.date() + datetime.timedelta(days=1), datetime.time(), datetime.UTC)
    return (midnight - newest).total_seconds() / 3600


def test_what_cannot_be_compared_is_refused(simulated, tmp_path):
    with pytest.raises(ConfigError, match="baseline: expected something else than the window 'train'"):
        validate(demo(simulated), window="train", baseline="train")
    with pytest.raises(ConfigError, match=r"data\.validation: expected a window"):
        validate(demo(simulated), window="validation")
    with pytest.raises(ConfigError, match="expected a folder whose parent exists"):
        validate(demo(simulated), out=tmp_path / "no" / "folder")
    with pytest.raises(Problems, match=r"checks\.may_drift: expected features of the schema. Received: 'prize'. Fix: did you mean 'price'"):
        demo(simulated, "checks.may_drift=[prize]")
    with pytest.raises(Problems, match=r"checks\.psi\.warn: expected at most the limit of a failure, 0\.1"):
        demo(simulated, "checks.psi={warn: 0.3, fail: 0.1}")
    with pytest.raises(Problems, match=r"checks\.psi\.fail: expected a value, it has no default"):
        demo(simulated, "checks.psi={warn: 0.3}")
