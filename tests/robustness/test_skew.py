"""Skew that was put into a log is found, named and ranked first; noise is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlenv.cli import main
from mlenv.errors import DONE, GATE, WRONG_INPUT, ConfigError
from mlenv.robustness.parquet_log import key_from
from mlenv.robustness.skew import PAGE_FILE, SKEW_FILE, SkewOptions, find_skew, wilson

NUM_ROWS, NUM_USERS, DAYS = 4000, 100, 4
OPTIONS = SkewOptions(key=key_from(["row"]), entities=("user_id",), time="time")
DAY_MICROSECONDS = 86_400 * 10**6


def logged_rows() -> pl.DataFrame:
    """Values of users that change from day to day, of items that do not, and of the row."""
    random = np.random.default_rng(0)
    user, day = random.integers(0, NUM_USERS, NUM_ROWS), np.sort(random.integers(0, DAYS, NUM_ROWS))
    seconds = random.integers(0, 86_400, NUM_ROWS)
    history = [[int(one * 10 + past) for past in range(max(0, today - 2), today + 3)] for one, today in zip(user, day, strict=True)]
    return pl.DataFrame(
        {
            "row": np.arange(NUM_ROWS),
            "time": pl.Series(1_767_225_600 * 10**6 + day * DAY_MICROSECONDS + seconds * 10**6).cast(pl.Datetime("us", "UTC")),
            "day": day,
            "user_id": user,
            "history": history,
            "clicks": random.random((NUM_USERS, DAYS))[user, day],
            "price": random.lognormal(3, 1, NUM_ROWS),
            "score": random.normal(0, 1, NUM_ROWS),
            "device": random.choice(["phone", "desktop"], NUM_ROWS),
            "count": random.integers(0, 50, NUM_ROWS),
        }
    )


def stale(rows: pl.DataFrame, feature: str) -> pl.Series:
    """What the same user had the day before; as it is on the first day."""
    by_day = rows.group_by("user_id", "day").agg(pl.col(feature).first().alias("old")).with_columns(pl.col("day") + 1)
    joined = rows.join(by_day, on=["user_id", "day"], how="left", maintain_order="left")
    return joined.select(pl.coalesce("old", feature)).to_series()


def hit(share: float, seed: int) -> pl.Series:
    return pl.Series(np.random.default_rng(seed).random(NUM_ROWS) < share)


def served_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Served with the noise that any two systems have: float32, and one row in 500 with another value."""
    noise = [pl.when(hit(0.002, 10)).then(pl.lit("tablet")).otherwise(pl.col("device")).alias("device")]
    noise += [pl.col(name).cast(pl.Float32) for name in ("price", "score", "clicks")]
    return rows.drop("time", "day").with_columns(noise).sample(fraction=0.9, shuffle=True, seed=1)


@pytest.fixture
def logged(tmp_path: Path) -> pl.DataFrame:
    rows = logged_rows()
    for day in range(DAYS):
        (tmp_path / "logged" / f"date=2026-01-0{day + 1}").mkdir(parents=True)
        rows.filter(pl.col("day") == day).write_parquet(tmp_path / "logged" / f"date=2026-01-0{day + 1}" / "part.parquet")
    return rows


def test_injected_skew_is_found_and_ranked_first(logged, tmp_path):
    old, halved = hit(0.05, 2), hit(1, 3)
    skewed = logged.with_columns(
        pl.when(old).then(stale(logged, "history")).otherwise(pl.col("history")).alias("history"),
        pl.when(halved).then(pl.col("price") * 0.5).otherwise(pl.col("price")).alias("price"),
    )
    served_rows(skewed).write_parquet(tmp_path / "served.parquet")
    found = find_skew(str(tmp_path / "served.parquet"), str(tmp_path / "logged"), OPTIONS)
    first, second, third, *rest = found.features
    assert (found.num_common, found.num_served, found.num_logged) == (3600, 3600, 4000)
    assert (first.feature, first.guess, first.is_above) == ("price", "scaled by 0.5", True)
    assert first.differs > 0.99
    assert first.relative == pytest.approx(0.5, rel=1e-3)
    assert (second.feature, second.is_above) == ("history", True)
    assert second.guess.startswith("stale: the same user_id last had it ")
    assert "hours before" in second.guess  # on the day before, in the last row of the user
    differs = (logged["history"] != skewed["history"]).mean()
    assert second.low < differs < second.high
    assert second.explained > 0.9
    assert (third.feature, third.is_above, third.guess) == ("device", False, "always tablet when served")
    assert 0 < third.differs < 0.005
    assert {one.differs for one in rest} == {0}
    assert {one.feature for one in rest} == {"clicks", "count", "score", "user_id"}
    assert [one.feature for one in found.above] == ["price", "history"]
    assert set(found.not_compared) == {"day", "date"}


@pytest.mark.parametrize(
    ("feature", "values", "guess"),
    [
        ("clicks", lambda rows: stale(rows, "clicks"), "stale: the same user_id last had it "),
        ("score", lambda rows: -rows["score"], "the other sign"),
        ("price", lambda rows: rows["price"] + 3, "shifted by +3"),
        ("count", lambda rows: rows["count"] * 10, "scaled by 10"),
        ("count", lambda rows: pl.Series([0] * NUM_ROWS), "always 0 when served"),
        ("price", lambda rows: pl.Series([None] * NUM_ROWS, dtype=pl.Float64), "missing when served"),
        ("history", lambda rows: rows["history"].list.head(2), "a part of the logged ids"),
        ("count", lambda rows: rows["count"].shuffle(seed=4), "no pattern"),
    ],
)
def test_what_has_happened_is_guessed(logged, tmp_path, feature, values, guess):
    mixed = pl.when(hit(0.1, 5)).then(values(logged)).otherwise(pl.col(feature)).alias(feature)
    served_rows(logged.with_columns(mixed)).write_parquet(tmp_path / "served.parquet")
    options = SkewOptions(key=OPTIONS.key, entities=OPTIONS.entities, time=OPTIONS.time, features=(feature,))
    (found,) = find_skew(str(tmp_path / "served.parquet"), str(tmp_path / "logged"), options).features
    assert found.guess.startswith(guess)
    assert found.is_above


def test_the_command_writes_a_page_and_says_no(logged, tmp_path, capsys):
    served = tmp_path / "served.parquet"
    served_rows(logged).rename({"row": "served_row"}).write_parquet(served)
    arguments = ["skew", str(served), str(tmp_path / "logged"), "--key", "served_row=row", "--out", str(tmp_path / "out")]
    assert main(arguments) == DONE  # noise alone
    assert "0 of 7 features differ in more than 1.00% of 3,600 common rows" in capsys.readouterr().out
    assert main([*arguments, "--limit", "0.0001"]) == GATE
    assert "SKEW  device" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out" / SKEW_FILE).read_text())
    assert plain["features"][0]["feature"] == "device"
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert "skewed" in page
    assert "always tablet when served" in page


def test_wrong_input_is_named(logged, tmp_path, capsys):
    served = tmp_path / "served.parquet"
    served_rows(logged).write_parquet(served)
    log = str(tmp_path / "logged")

    def said(*arguments: str) -> str:
        assert main(["skew", *arguments]) == WRONG_INPUT
        return capsys.readouterr().err

    assert "--key: expected columns that tell rows apart" in said(str(served), log)
    assert "column 'rwo': expected a column of the row key" in said(str(served), log, "--key", "rwo")
    assert "did you mean 'row'" in said(str(served), log, "--key", "rwo")
    assert "row key ['user_id']: expected each once" in said(str(served), log, "--key", "user_id")
    assert "SERVED: expected a Parquet file" in said(str(tmp_path / "no"), log, "--key", "row")
    assert "lacks one. Received: 'prize'. Fix: did you mean 'price'" in said(str(served), log, "--key", "row", "--features", "prize")
    assert "both --entity and --time" in said(str(served), log, "--key", "row", "--entity", "user_id")
    served_rows(logged.with_columns(pl.col("row") + 10_000)).write_parquet(served)
    assert "expected rows with the same key. Received: 'none; such as row 1" in said(str(served), log, "--key", "row")
    (tmp_path / "text.parquet").write_text("no Parquet")
    assert "expected a whole Parquet file" in said(str(tmp_path / "text.parquet"), log, "--key", "row")
    with pytest.raises(ConfigError, match="--tolerance"):
        SkewOptions(key=OPTIONS.key, tolerance=0)


def test_the_interval_of_a_share():
    # By hand, z = 1.959964: 5 of 100 gives 0.02154 to 0.11175.
    assert wilson(5, 100) == pytest.approx((0.021543, 0.111750), abs=1e-5)
    low, high = wilson(0, 1000)
    assert low == 0
    assert 0 < high < 0.004
