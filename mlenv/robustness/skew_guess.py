"""What has probably happened to a feature between two logs, from the rows that differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.robustness.value_distance import Codes, Flags, Floats, ValueKind, as_numbers, is_nothing

Ints = NDArray[np.int64]

LEAST_EXPLAINED: Final = 0.5
"""Share of the rows that differ which a guess has to explain."""
_LEAST_ROWS: Final = 5
_CONSTANT: Final = 1e-3
"""How far ratios and differences may be from their median to be called the same, relative."""
_DAY: Final = 86_400_000_000


@dataclass(frozen=True)
class Guess:
    """An explanation, and the share of the rows that differ which it holds for."""

    words: str
    share: float


@dataclass(frozen=True)
class History:
    """What a log has had for every entity, and when."""

    entity: str
    """Column."""
    entities: pl.Series
    """Of all rows of the log, as text."""
    times: Ints
    """Microseconds since 1970."""
    rows: Ints
    """Rows of the log that are compared, in the order in which they are."""


def guess(served: pa.ChunkedArray, logged: pa.ChunkedArray, differs: Flags, kind: ValueKind, old: Guess | None = None) -> Guess:
    """The simplest explanation that holds for at least half of the rows that differ; otherwise ``no pattern``.

    Args:
        old: what ``guess_stale`` says.
    """
    places = pa.array(np.flatnonzero(differs))
    if not len(places):
        return Guess("", 1.0)
    guesses = [*_guesses(served.take(places), logged.take(places), kind), *([old] if old is not None else [])]
    good = [one for one in guesses if one.share >= LEAST_EXPLAINED]
    return max(good, key=lambda one: one.share) if good else Guess("no pattern", 0.0)


def _guesses(served: pa.ChunkedArray, logged: pa.ChunkedArray, kind: ValueKind) -> Iterator[Guess]:
    no_served, no_logged = is_nothing(served), is_nothing(logged)
    yield Guess("missing when served", float((no_served & ~no_logged).mean()))
    yield Guess("missing in the log", float((no_logged & ~no_served).mean()))
    if kind in ("number", "id"):
        yield from _constants(served, logged)
    if kind == "number" or (kind == "id" and pa.types.is_integer(served.type) and pa.types.is_integer(logged.type)):
        yield from _arithmetic(as_numbers(served), as_numbers(logged))
    if kind == "bag" and not any(pa.types.is_map(side.type) or pa.types.is_struct(side.type.value_type) for side in (served, logged)):
        yield from _parts(served, logged)


def _constants(served: pa.ChunkedArray, logged: pa.ChunkedArray) -> Iterator[Guess]:
    """One value in place of many."""
    if pc.count_distinct(logged).as_py() < 2:
        return
    counts = pl.Series("value", pl.from_arrow(served)).drop_nulls().value_counts(sort=True)
    if len(counts):
        yield Guess(f"always {counts['value'][0]} when served", float(counts["count"][0] / len(served)))


def _arithmetic(served: Floats, logged: Floats) -> Iterator[Guess]:
    """The same factor, or the same difference, for different values."""
    if len(np.unique(logged[~np.isnan(logged)])) < 3:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, shifts = served / logged, served - logged
    if np.isfinite(ratios).any():
        factor = float(np.median(ratios[np.isfinite(ratios)]))
        words = "the other sign" if abs(factor + 1) < _CONSTANT else f"scaled by {factor:.4g}"
        if factor:
            yield Guess(words, float((np.abs(ratios / factor - 1) < _CONSTANT).mean()))
    if np.isfinite(shifts).any():
        shift = float(np.median(shifts[np.isfinite(shifts)]))
        yield Guess(f"shifted by {shift:+.4g}", float((np.abs(shifts - shift) <= _CONSTANT * abs(shift)).mean()))


def _parts(served: pa.ChunkedArray, logged: pa.ChunkedArray) -> Iterator[Guess]:
    """Lists that hold a part of the ids, or more."""
    sides = pl.DataFrame({"served": pl.from_arrow(served), "logged": pl.from_arrow(logged)})
    sides = sides.select(pl.all().cast(pl.List(pl.String)).fill_null([]).list.unique())
    common = sides.select(pl.col("served").list.set_intersection("logged").list.len()).to_series()
    lengths = [sides[name].list.len() for name in ("served", "logged")]
    is_part, has_more = (common == lengths[0]) & (lengths[0] > 0), (common == lengths[1]) & (lengths[1] > 0)
    yield Guess("a part of the logged ids", float((is_part & ~has_more).mean()))  # type: ignore[arg-type]
    yield Guess("the logged ids and more", float((has_more & ~is_part).mean()))  # type: ignore[arg-type]


def guess_stale(served: Codes, logged: Codes, differs: Flags, history: History, seed: int = 0) -> Guess | None:
    """Whether what was served is what the log has had for the same entity before.

    Held against the same question with the served values dealt out anew: a feature of few values is often what it was.

    Args:
        served: of the rows that are compared.
        logged: of all rows of the log.
    """
    past = pl.DataFrame({"entity": history.entities, "value": logged, "time": history.times}).drop_nulls("entity").sort("time")
    places, values = history.rows[differs], served[differs]
    asked = pl.DataFrame({"entity": history.entities.gather(places), "value": values, "time": history.times[places]})
    asked = asked.with_columns(pl.Series("dealt", np.random.default_rng(seed).permutation(values))).drop_nulls("entity").sort("time")
    has_past = _earlier(asked.select("entity", "time"), past.select("entity", "time"), ["entity"])
    checked = asked.filter(has_past.is_not_null())
    if len(checked) < _LEAST_ROWS:
        return None
    found = _earlier(checked.select("entity", "value", "time"), past, ["entity", "value"])
    by_chance = _earlier(checked.select("entity", pl.col("dealt").alias("value"), "time"), past, ["entity", "value"])
    share, chance = found.is_not_null().mean(), by_chance.is_not_null().mean()
    assert isinstance(share, float)
    assert isinstance(chance, float)
    if share - chance < LEAST_EXPLAINED / 2:
        return None
    age = (checked["time"] - found).drop_nulls().median()
    assert isinstance(age, float)
    return Guess(f"stale: the same {history.entity} last had it {_ago(age)} before", share)


def _earlier(asked: pl.DataFrame, past: pl.DataFrame, by: list[str]) -> pl.Series:
    """The last earlier time of the same thing; null without one."""
    found = asked.join_asof(
        past.with_columns(pl.col("time").alias("before")),
        on="time",
        by=by,
        strategy="backward",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    return found["before"]


def _ago(microseconds: float) -> str:
    days = microseconds / _DAY
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{1440 * days:.0f} minutes"
