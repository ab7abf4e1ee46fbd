"""A back-fill that used the future is found and named, one that did not passes; by days and row by row, on KuaiRand and on small rows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mlenv.checks.backfill_checks import DayAuc, LabelAuc
from mlenv.checks.validation_run import validate
from mlenv.cli import main
from mlenv.composition import compose
from mlenv.config import WindowConfig
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.errors import ConfigError, GateError
from mlenv.training import train

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no KuaiRand files in {REAL}: set MLENV_DATA to the folder that holds kuairand/"
)
BACKFILLED = WindowConfig(start="2022-04-29", end="2022-05-02")


@pytest.fixture(scope="module")
def kuairand(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Impressions with the user's click rate on all earlier days, and the same with the rest of the day in it."""
    folder = tmp_path_factory.mktemp("real") / "kuairand"
    convert_kuairand(REAL, folder)
    rows = pl.read_parquet(folder / "**/*.parquet", hive_partitioning=True).with_columns(pl.col("date").cast(pl.String))
    days = rows.group_by("user_id", "date").agg(clicks=pl.col("click").sum(), shown=pl.len()).sort("date")
    days = days.with_columns(
        clicks_then=pl.col("clicks").cum_sum().over("user_id"), shown_then=pl.col("shown").cum_sum().over("user_id")
    ).with_columns(clicks_before=pl.col("clicks_then") - pl.col("clicks"), shown_before=pl.col("shown_then") - pl.col("shown"))
    rates = days.select(
        "user_id",
        "date",
        clean=pl.when(pl.col("shown_before") > 0).then(pl.col("clicks_before") / pl.col("shown_before")).cast(pl.Float32),
        leaking=(pl.col("clicks_then") / pl.col("shown_then")).cast(pl.Float32),
    )
    return rows.join(rates, on=["user_id", "date"], how="left", maintain_order="left")


def write(rows: pl.DataFrame, folder: Path) -> Path:
    for (day,), part in rows.group_by("date", maintain_order=True):
        (folder / f"date={day}").mkdir(parents=True)
        pq.write_table(part.drop("date").to_arrow(), folder / f"date={day}" / "part.parquet")
    return folder


def real(path: Path, *overrides: str):
    windows = ["data.train={start: 2022-04-25, end: 2022-05-06}", "data.validation=null", "loop.evaluate_every_steps=0"]
    feature = "schema.features.user_click_rate={kind: numeric, default: null}"
    return compose(ROOT / "examples/kuairand/dcn_v2.yaml", [f"data.path={path}", *windows, feature, *overrides])


def raised(verdict):
    return {(finding.severity, finding.check, finding.subject) for finding in verdict.raised}


def is_backfilled(days: WindowConfig) -> pl.Expr:
    return pl.col("date").is_between(pl.lit(days.start), pl.lit(days.end))


@needs_real_data
def test_a_backfill_that_holds_the_rest_of_the_day_is_found_and_a_clean_one_passes(kuairand, tmp_path, capsys):
    clean = write(kuairand.with_columns(user_click_rate="clean"), tmp_path / "clean")
    assert raised(validate(real(clean), backfilled=BACKFILLED)) == set()
    mixed = pl.when(is_backfilled(BACKFILLED)).then("leaking").otherwise("clean")
    leaking = write(kuairand.with_columns(user_click_rate=mixed), tmp_path / "leaking")
    verdict = validate(real(leaking), backfilled=BACKFILLED, out=tmp_path / "out")
    tasks = {("fail", "backfill_label_auc", f"user_click_rate for {task}") for task in ("click", "long_view")}
    assert tasks <= raised(verdict)
    assert {subject.split(" ")[0] for *_, subject in raised(verdict)} == {"user_click_rate"}
    page = (tmp_path / "out" / "validation.html").read_text()
    assert "Back-filled days beside logged ones" in page
    assert "backfill label auc" in page


@needs_real_data
def test_the_auc_of_a_side_is_the_mean_of_its_days(kuairand, tmp_path):
    mixed = pl.when(is_backfilled(BACKFILLED)).then("leaking").otherwise("clean")
    data = write(kuairand.with_columns(user_click_rate=mixed), tmp_path / "data")
    verdict = validate(real(data), backfilled=BACKFILLED)
    [finding] = [one for one in verdict.findings if one.subject == "user_click_rate for click" and one.check == "backfill_label_auc"]
    means = {}
    for side, chosen in (("leaking", is_backfilled(BACKFILLED)), ("clean", ~is_backfilled(BACKFILLED))):
        days = kuairand.filter(chosen & pl.col("date").is_between(pl.lit("2022-04-26"), pl.lit("2022-05-06")))
        # Null users are ranked at the base rate, as the check does.
        scored = days.with_columns(score=pl.col(side).fill_null(days["click"].mean()))
        means[side] = np.mean([roc_auc_score(day["click"], day["score"]) for _, day in scored.group_by("date")])
    assert finding.value == pytest.approx(means["leaking"] - means["clean"], abs=0.03)


@needs_real_data
def test_a_leak_shows_row_by_row_beside_the_logged_column(kuairand, tmp_path):
    one_day = pl.when(pl.col("date") == "2022-05-01").then("leaking").otherwise("clean")
    data = write(kuairand.with_columns(logged="clean", user_click_rate=one_day), tmp_path / "data")
    config = real(data, "checks.backfills={user_click_rate: logged}", "data.test=null")
    verdict = validate(config, out=tmp_path / "out")
    differ = kuairand.filter((pl.col("date") == "2022-05-01") & pl.col("clean").is_not_null())
    share = (~np.isclose(differ["clean"], differ["leaking"], rtol=1e-6, atol=0)).mean()
    findings = {finding.subject: finding for finding in verdict.raised if finding.check == "backfill_disagreement"}
    assert set(findings) == {"user_click_rate beside logged", "user_click_rate on 2022-05-01"}
    assert findings["user_click_rate on 2022-05-01"].value == pytest.approx(share)
    assert findings["user_click_rate on 2022-05-01"].severity == "fail"
    assert "Back-filled columns beside logged ones" in (tmp_path / "out" / "validation.html").read_text()
    same = write(kuairand.with_columns(logged="clean", user_click_rate=pl.col("clean").cast(pl.Float64) * (1 + 1e-8)), tmp_path / "same")
    assert raised(validate(real(same, "checks.backfills={user_click_rate: logged}", "data.test=null"))) == set()


CONFIG = """
name: small
output: {folder}/out
schema:
  features: {{rate: {{kind: numeric}}, country: {{kind: categorical, storage: string, table: country}}}}
  tables: {{country: {{num_embeddings: 10, embedding_dim: 4, ids: hash}}}}
  labels: {{click: {{}}}}
data: {{path: {folder}/data, train: {{}}}}
model: {{kind: ranker}}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Four days; the rate of the last two is the label with noise, that of the first two is noise."""
    generator = np.random.default_rng(0)
    for day in range(1, 5):
        click = generator.integers(0, 2, 2000)
        rate = generator.normal(size=2000) + (2 * click if day > 2 else 0)
        country = generator.choice(["no", "de"], 2000)
        rows = {"rate": rate, "country": country, "click": click, "logged_country": country}
        (tmp_path / f"data/date=2026-01-0{day}").mkdir(parents=True)
        pq.write_table(pa.table(rows), tmp_path / f"data/date=2026-01-0{day}/part.parquet", row_group_size=700)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def test_the_command_names_the_leak_and_ends_with_code_3(small, capsys):
    arguments = ["validate", str(small / "config.yaml"), "--backfilled", "2026-01-03:2026-01-04"]
    assert main([*arguments, "--out", str(small / "page")]) == 3
    assert "FAIL  backfill_label_auc     rate for click" in capsys.readouterr().out
    assert main(["validate", str(small / "config.yaml")]) == 0
    assert main([*arguments, "checks.backfill_label_auc={warn: null, fail: null}", "checks.may_drift=[rate]"]) == 0


@pytest.mark.parametrize("days", ["2026-01-03", "2026-01-04:2026-01-03", "yesterday:2026-01-03", ":2026-01-03"])
def test_days_in_another_form_are_refused(small, capsys, days):
    with pytest.raises(SystemExit, match="2"):
        main(["validate", str(small / "config.yaml"), f"--backfilled={days}", "--dry-run"])
    assert "expected START:END, two days as YYYY-MM-DD in order" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(small):
    config = compose(small / "config.yaml", [])
    for start, end in (("2026-01-01", "2026-01-04"), ("2025-01-01", "2025-01-02")):
        with pytest.raises(ConfigError, match="backfilled: expected some of the days of the window, and not all"):
            validate(config, backfilled=WindowConfig(start=start, end=end))
    with pytest.raises(ConfigError, match="baseline: expected none beside backfilled"):
        validate(config, baseline="test", backfilled=WindowConfig(start="2026-01-03", end="2026-01-03"))
    one_day = compose(small / "config.yaml", ["data.train.path=date=2026-01-01/part.parquet"])
    with pytest.raises(ConfigError, match="holds none of the days"):
        validate(one_day, backfilled=WindowConfig(start="2026-01-03", end="2026-01-03"))
    for pairs, message in (
        ("{country: logged_countri}", "expected columns of the data. Received: 'logged_countri'. Fix: did you mean 'logged_country'"),
        ("{rate: country}", r"checks\.backfills\.rate: expected a column of the same kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(compose(small / "config.yaml", [f"checks.backfills={pairs}"]))


def test_pairs_are_judged_before_a_training_and_by_a_dry_run(small, capsys):
    arguments = [str(small / "config.yaml"), "tracking.enabled=false", "checks.before_training=true"]
    assert main(["train", *arguments, "checks.backfills={countri: country}", "--dry-run"]) == 2
    assert "checks.backfills: expected columns of the data. Received: 'countri'" in capsys.readouterr().err
    other = {"kind": "derive", "column": "filled", "sql": "CASE WHEN rate > 0 THEN country ELSE 'xx' END"}
    settings = [*arguments[1:], f"data.transforms=[{other}]", "checks.backfills={filled: logged_country}"]
    with pytest.raises(GateError, match="backfill_disagreement of filled beside logged_country"):
        train(compose(small / "config.yaml", settings))


def test_a_backfill_that_leaves_out_logged_rows_lacks_coverage(small):
    config = compose(small / "config.yaml", ["checks.backfills={filled: logged_country}"])
    part = small / "data/date=2026-01-02/part.parquet"
    for file in small.glob("data/*/part.parquet"):
        table = pq.ParquetFile(file).read()
        filled = pa.nulls(len(table), pa.string()) if file == part else table["country"]
        pq.write_table(table.append_column("filled", filled), file)
    [finding] = [finding for finding in validate(config).raised if finding.subject.startswith("filled")]
    assert (finding.check, finding.severity, finding.value) == ("coverage_drop", "fail", 0.25)


def test_a_column_that_holds_nothing_is_not_compared(small):
    nothing = ["schema.features.tags={kind: multi_categorical, table: country, storage: string}"]
    for file in small.glob("data/*/part.parquet"):
        table = pq.ParquetFile(file).read()
        pq.write_table(table.append_column("tags", pa.array([[None]] * len(table), pa.list_(pa.string()))), file)
    out = small / "page"
    validate(compose(small / "config.yaml", nothing), backfilled=WindowConfig(start="2026-01-03", end="2026-01-04"), out=out)
    assert "NaN" not in (out / "validation.json").read_text()


def test_the_variance_of_an_auc_is_that_of_samples():
    generator = np.random.default_rng(0)
    aucs = [
        roc_auc_score([1] * 40 + [0] * 60, np.concatenate([generator.normal(1.0, 1.0, 40), generator.normal(0.0, 1.0, 60)]))
        for _ in range(1000)
    ]
    day = DayAuc("", float(np.mean(aucs)), 40, 60)
    assert math.sqrt(day.variance) == pytest.approx(np.std(aucs), rel=0.1)
    two = LabelAuc((day, DayAuc("", day.auc, 40, 60)))
    assert (two.mean, two.variance) == (pytest.approx(day.auc), pytest.approx(day.variance / 2))
