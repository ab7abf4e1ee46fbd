"""Logged scores against replayed ones, on a log whose scores come from the same model with values changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from mlenv.cli import main
from mlenv.errors import DONE, GATE, WRONG_INPUT, MlenvError
from mlenv.inference.stored_scorer import HeldOut, StoredScorer, open_scorer, rows_for
from mlenv.robustness.logged_features import encode_logged
from mlenv.robustness.score_replay import PAGE_FILE, REPLAY_FILE, ROWS_FILE, ReplayOptions, replay_scores
from mlenv.serving.served_log import ServedLog


@pytest.fixture(scope="module")
def scorer(stored_ranker: Path) -> StoredScorer:
    return open_scorer(str(stored_ranker))


@pytest.fixture(scope="module")
def rows(ads: Path) -> pl.DataFrame:
    """The test day as it was logged for training."""
    return pl.DataFrame(pl.from_arrow(pq.read_table(ads / "date=2026-01-03", partitioning=None)))


def as_served(scorer: StoredScorer, rows: pl.DataFrame) -> pl.DataFrame:
    """What a server would log of these values: features, segments, and the scores that the model gives them."""
    table = rows.to_arrow()
    predictions = scorer(encode_logged(table, scorer.schema, scorer.schema.segments, "rows"))
    columns = [*scorer.schema.feature_columns, "impression_id"]
    scores = [pl.Series(f"prediction_{task}", predictions[:, place].numpy()) for place, task in enumerate(scorer.schema.tasks)]
    return rows.select(columns).with_columns(pl.Series("served_at", rows["event_time"]), *scores)


@pytest.fixture(scope="module")
def skewed(scorer: StoredScorer, rows: pl.DataFrame) -> pl.DataFrame:
    """Another item in a tenth of the rows, prices halved in another tenth; in other order than the rows."""
    drawn = pl.Series(np.random.default_rng(0).random(len(rows)))
    changed = rows.with_columns(
        pl.when(drawn < 0.1).then(pl.col("item_id").shuffle(seed=1)).otherwise(pl.col("item_id")).alias("item_id"),
        pl.when(drawn > 0.9).then(pl.col("price") * 0.1).otherwise(pl.col("price")).alias("price"),
        (drawn > 0.9).alias("is_cheap"),
    )
    return as_served(scorer, changed).with_columns(changed["is_cheap"]).sample(fraction=0.8, shuffle=True, seed=2)


def test_the_log_of_a_server_agrees_with_its_model(scorer, rows, stored_ranker, tmp_path, capsys):
    served = as_served(scorer, rows)
    table = served.select(scorer.schema.feature_columns).to_arrow().to_batches()[0]  # rows without a row key
    predictions = served.select("prediction_click", "prediction_conversion").to_numpy()
    log = ServedLog(tmp_path / "log", scorer.schema.tasks)
    for request, part in (("a", slice(0, 500)), ("b", slice(500, 2000))):
        log.add(request, table.select([])[part], table[part], predictions[part])
    log.close()
    assert main(["replay", str(stored_ranker), "--logged", str(tmp_path / "log"), "--out", str(tmp_path / "out")]) == DONE
    assert "0.00% of 2,000 rows differ" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out" / REPLAY_FILE).read_text())
    assert [one["task"] for one in plain["overall"]] == ["click", "conversion"]
    assert max(one["largest"] for one in plain["overall"]) < 1e-6
    assert all(set(one["key"]) == {"served_request_id", "served_row"} for one in plain["worst"])
    assert len({one["group"] for one in plain["hours"]}) in (1, 2)  # now, and perhaps the clock struck
    # With a row key it is held against the rows of a data set, which need no labels.
    served.write_parquet(tmp_path / "log.parquet")
    rows.drop("click", "conversion").write_parquet(tmp_path / "rows.parquet")
    found = replay_scores(
        scorer, "ranker", str(tmp_path / "log.parquet"), rows_for(scorer, str(tmp_path / "rows.parquet")), ReplayOptions()
    )
    assert (found.num_common, found.blames, found.is_above) == (2000, [], False)
    assert max(one.largest for one in found.overall) < 1e-6


def test_the_features_behind_a_difference_are_found(scorer, rows, skewed, ads, tmp_path):
    skewed.drop("is_cheap").write_parquet(tmp_path / "log.parquet")
    found = replay_scores(scorer, "ranker", str(tmp_path / "log.parquet"), rows_for(scorer, start="2026-01-03"), ReplayOptions())
    assert (found.num_logged, found.num_replayed, found.num_common) == (1600, 2000, 1600)
    # By hand: the same values, scored as they were logged for training.
    joined = skewed.join(as_served(scorer, rows).select("impression_id", now="prediction_click", placement="placement"), on="impression_id")
    apart = (joined["prediction_click"] - joined["now"]).abs()
    click = found.overall[0]
    assert (click.task, click.num_rows) == ("click", 1600)
    assert click.differs == pytest.approx((apart > 1e-4).mean())
    assert click.apart == pytest.approx(apart.mean(), rel=1e-4)
    assert click.largest == pytest.approx(apart.max(), rel=1e-4)
    assert click.logged - click.replayed == pytest.approx(joined["prediction_click"].mean() - joined["now"].mean(), abs=1e-6)
    by_segment = {one.group: one.num_rows for one in found.segments if one.task == "click"}
    assert by_segment == {f"placement={name}": count for name, count in skewed["placement"].value_counts().iter_rows()}
    assert sum(one.num_rows for one in found.hours if one.task == "click") == 1600
    assert {one.group[:10] for one in found.hours} == {"2026-01-03"}
    together, *each = [one for one in found.blames if one.task == "click"]
    assert (together.feature, together.explained) == ("", pytest.approx(1, abs=1e-3))
    assert {one.feature for one in each[:2]} == {"item_id", "price"}
    shares = {one.feature: one.explained for one in each}
    # The rows of the two features are apart, so that each explains what is in its rows.
    price_part = apart.filter(joined["is_cheap"] & (apart > 1e-4)).sum() / apart.filter(apart > 1e-4).sum()
    assert shares["price"] == pytest.approx(price_part, abs=1e-3)
    assert shares["item_id"] == pytest.approx(1 - price_part, abs=1e-3)
    assert all(abs(one.explained) < 1e-6 and one.changed == 0 for one in each[2:])
    worst = next(one for one in found.worst if one["task"] == "click")
    (row,) = joined.filter(pl.col("impression_id") == worst["key"]["impression_id"]).iter_rows(named=True)
    assert (worst["logged"], worst["replayed"]) == pytest.approx((row["prediction_click"], row["now"]), abs=1e-6)


def test_the_command_names_the_feature_and_says_no(skewed, stored_ranker, tmp_path, capsys):
    other_names = {"impression_id": "served_request_id", "prediction_click": "score", "served_at": "when"}
    skewed.rename(other_names).drop("prediction_conversion").write_parquet(tmp_path / "log.parquet")
    arguments = ["replay", str(stored_ranker), "--logged", str(tmp_path / "log.parquet"), "--start", "2026-01-03"]
    arguments += ["--key", "served_request_id=impression_id", "--score", "click=score", "--time", "when", "--blame-rows", "100"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == GATE
    said = capsys.readouterr().out
    assert "explained by item_id" in said
    assert "conversion" not in said
    plain = json.loads((tmp_path / "out" / REPLAY_FILE).read_text())
    assert plain["num_blamed"] == 100
    by_row = pl.read_parquet(tmp_path / "out" / ROWS_FILE)
    assert by_row.columns == ["served_request_id", "logged_click", "replayed_click"]
    assert by_row["served_request_id"].to_list() == skewed["impression_id"].to_list()  # in the order of the log
    assert by_row["logged_click"].to_list() == pytest.approx(skewed["prediction_click"].to_list())
    assert (by_row["logged_click"] - by_row["replayed_click"]).abs().mean() == pytest.approx(plain["overall"][0]["apart"])
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert "Features behind the difference" in page
    assert "served_request_id" in page
    # A log without features has scores alone to compare.
    pl.read_parquet(tmp_path / "log.parquet").select("served_request_id", "score").write_parquet(tmp_path / "log.parquet")
    assert main([*arguments[:-4], "--limit", "0.5"]) == DONE
    assert "the log has no features of the model" in capsys.readouterr().out


def test_scores_of_another_model_are_no_feature_s_fault(scorer, rows, tmp_path):
    log = as_served(scorer, rows).with_columns(pl.col("prediction_click") * 0.9, pl.lit(None, pl.Float32).alias("prediction_conversion"))
    log = log.with_columns(pl.when(pl.col("impression_id") % 2 == 0).then("prediction_click").alias("prediction_click"))
    log.write_parquet(tmp_path / "log.parquet")
    found = replay_scores(
        scorer, "ranker", str(tmp_path / "log.parquet"), rows_for(scorer, start="2026-01-03"), ReplayOptions(tolerance=1e-3)
    )
    assert found.num_without_score == (rows["impression_id"] % 2 == 1).sum()
    assert found.overall[0].logged == pytest.approx(0.9 * found.overall[0].replayed, rel=1e-4)
    assert [one.task for one in found.overall] == ["click"]
    assert all(abs(one.explained) < 1e-6 for one in found.blames)
    on_itself = replay_scores(scorer, "ranker", str(tmp_path / "log.parquet"), None, ReplayOptions())
    assert on_itself.overall[0].apart == pytest.approx(found.overall[0].apart, rel=1e-4)
    assert on_itself.notes == ["the features are those of the log: what differs is the model, its version, or how the server reads values"]


def test_wrong_input_is_named(scorer, skewed, stored_ranker, tmp_path, capsys):
    day = rows_for(scorer, start="2026-01-03")

    def said(frame: pl.DataFrame, rows: HeldOut | None = day, **options: Any) -> str:
        frame.write_parquet(tmp_path / "log.parquet")
        with pytest.raises(MlenvError) as caught:
            replay_scores(scorer, "ranker", str(tmp_path / "log.parquet"), rows, ReplayOptions(**options))
        return str(caught.value)

    assert "column 'impression_id': expected a column of the row key. Received: 'no such column'" in said(skewed.drop("impression_id"))
    no_scores = said(skewed.drop("prediction_click", "prediction_conversion"))
    assert "expected one of the columns ['prediction_click', 'prediction_conversion']" in no_scores
    assert "--score TASK=COLUMN" in no_scores
    assert "--score: expected a task of the model. Received: 'clik'. Fix: did you mean 'click'" in said(skewed, scores={"clik": "x"})
    elsewhere = skewed.with_columns(pl.col("impression_id") + 10**9)
    assert "expected rows with the same key. Received: 'none; such as impression_id 1" in said(elsewhere)
    assert "row key ['impression_id']: expected each once" in said(pl.concat([skewed, skewed]))
    assert "expected a prediction in [0, 1]" in said(skewed.with_columns(pl.col("prediction_click") - 3))
    assert "expected all features of the model. Received: \"no columns of ['price']\"" in said(skewed.drop("price"), None)
    no_score = skewed.with_columns(pl.lit(None, pl.Float32).alias("prediction_click")).drop("prediction_conversion")
    assert "expected predictions in ['prediction_click']. Received: 'none in any row'" in said(no_score)
    as_text = skewed.with_columns(pl.col("price").cast(pl.String))
    assert "column 'price': expected a number. Received: 'large_string'" in said(as_text)
    assert "column 'clock': expected the time of a row" in said(skewed, time="clock")
    out_of_table = skewed.with_columns(pl.lit(10**6).alias("hour"))
    assert "row 0, column 'hour': expected an id in [0, 24). Received: 1000000" in said(out_of_table, None)
    assert main(["replay", str(tmp_path), "--logged", str(tmp_path / "log.parquet")]) == WRONG_INPUT
    assert "expected a checkpoint" in capsys.readouterr().err
    assert main(["replay", str(stored_ranker), "--logged", str(tmp_path / "no.parquet")]) == WRONG_INPUT
    assert "--logged: expected a Parquet file" in capsys.readouterr().err
    assert main(["replay", "models:/ranker@champion", "--logged", "log", "--uri", "http://127.0.0.1:9"]) == WRONG_INPUT
    assert "models:/ranker@champion" in capsys.readouterr().err
