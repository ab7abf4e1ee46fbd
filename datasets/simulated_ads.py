"""A multi-day ads log with known truth: who saw what, who clicked, who converted, and how likely both were.

The columns ``true_click_probability`` and ``true_conversion_probability`` (given a click) tell how well the best possible
model would do. They are never features, and neither is ``conversion_time``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mlenv.datasets.day_partitions import write_day_partitions
from mlenv.datasets.simulated_world import (
    AGES,
    CLICK,
    CONVERSION,
    COUNTRIES,
    DEVICES,
    PLACEMENTS,
    TOPICS,
    VECTOR_DIM,
    Bools,
    Effects,
    Floats,
    Impressions,
    Ints,
    PastClicks,
    draw_world,
)
from mlenv.errors import ConfigError, check_above, check_at_least

ACTIONS = ("click", "conversion")
HOUR_MS = 3_600_000
MAX_ITEMS_PER_REQUEST = 8
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Size and nature of a simulated ads log."""

    num_days: int = 7
    """Days in the log."""
    start_date: str = "2026-01-01"
    """First day, YYYY-MM-DD, UTC."""
    rows_per_day: int = 200_000
    """Impressions per day; one request shows 1 to 8 items."""
    num_users: int = 2_000
    """User ids are 0 to num_users - 1."""
    num_items: int = 500
    """Item ids are 0 to num_items - 1."""
    num_advertisers: int = 50
    """Advertiser ids are 0 to num_advertisers - 1."""
    num_placements: int = 6
    """Places where ads are shown, at most 8."""
    history_length: int = 10
    """Past clicks of the user in each row, at most."""
    null_rate: float = 0.03
    """Share of the rows in which a column that may be null is null."""
    drift: float = 0.0
    """Random walks of the base rate and of every item's quality, for both tasks: deviation per day, in logits. 0 is stationary."""
    conversion_delay_hours: float = 6.0
    """Mean of the exponential time between click and conversion."""
    seed: int = 0
    """The same seed gives the same data."""

    def __post_init__(self) -> None:
        minima = {
            "num_days": 1,
            "rows_per_day": 1,
            "num_users": 1,
            "num_items": 2 * MAX_ITEMS_PER_REQUEST,
            "num_advertisers": 1,
            "history_length": 1,
            "seed": 0,
        }
        for name, minimum in minima.items():
            check_at_least(name, getattr(self, name), minimum)
        if not 1 <= self.num_placements <= len(PLACEMENTS):
            raise ConfigError("num_placements", expected=f"an integer in [1, {len(PLACEMENTS)}]", received=self.num_placements)
        if not 0 <= self.null_rate < 1:
            raise ConfigError("null_rate", expected="a number in [0, 1)", received=self.null_rate)
        check_at_least("drift", self.drift, 0)
        check_above("conversion_delay_hours", self.conversion_delay_hours, 0)
        try:
            date.fromisoformat(self.start_date)
        except ValueError as error:
            raise ConfigError("start_date", expected="a date YYYY-MM-DD", received=self.start_date) from error


def simulate(config: SimulationConfig, out: Path) -> None:
    """Writes the log to ``out/date=YYYY-MM-DD/``.

    Raises:
        DataError: ``out`` exists and is not empty, or has no parent folder.
    """
    write_day_partitions(AdsLog(config).days(), out)


class ClickHistory:
    """The last clicks of every user, in rings."""

    def __init__(self, num_users: int, length: int) -> None:
        self.length = length
        self.num_clicks = np.zeros(num_users, np.int64)
        self.items = np.zeros((num_users, length), np.int64)
        self.converted_at = np.full((num_users, length), NEVER)

    def append(self, users: Ints, items: Ints, converted_at: Ints) -> None:
        """Adds clicks, oldest first."""
        order = np.argsort(users, kind="stable")
        user = users[order]
        rank = np.arange(len(user)) - np.searchsorted(user, user)
        # Where one user's clicks go around the ring, numpy keeps the last value written, which is the latest click.
        place = (self.num_clicks[user] + rank) % self.length
        self.items[user, place], self.converted_at[user, place] = items[order], converted_at[order]
        np.add.at(self.num_clicks, users, 1)

    def at(self, time_ms: int, users: Ints) -> PastClicks:
        """What is known about the users; a conversion counts once it has arrived."""
        num_filled = np.minimum(self.num_clicks[users], self.length)[:, None]
        steps = np.arange(self.length)
        place = (self.num_clicks[users, None] - num_filled + steps) % self.length
        return PastClicks(self.items[users[:, None], place], self.converted_at[users[:, None], place] < time_ms, steps < num_filled)


class Outcomes(NamedTuple):
    """What came of the impressions, by row."""

    click_probability: Floats
    conversion_probability: Floats
    """Given a click."""
    is_clicked: Bools
    is_converted: Bools
    converted_at: Ints
    """Milliseconds since the epoch; NEVER when not converted."""


class AdsLog:
    """Plays one day after the other: the clicks of one hour are history in the next."""

    def __init__(self, config: SimulationConfig) -> None:
        rng = np.random.default_rng((config.seed, 0))
        self.config = config
        self.world = draw_world(
            rng,
            num_users=config.num_users,
            num_items=config.num_items,
            num_advertisers=config.num_advertisers,
            num_placements=config.num_placements,
        )
        self.click = Effects(rng, self.world, CLICK)
        self.conversion = Effects(rng, self.world, CONVERSION)
        self.history = ClickHistory(config.num_users, config.history_length)
        self.drift = np.zeros(config.num_items)

    def days(self) -> Iterator[tuple[date, pa.Table]]:
        """Every day draws from its own stream, so that a longer log begins like a shorter one."""
        for index in range(self.config.num_days):
            rng = np.random.default_rng((self.config.seed, 1 + index))
            day = date.fromisoformat(self.config.start_date) + timedelta(days=index)
            rows = self._impressions(rng, index, day)
            past, outcomes = self._play(rng, rows)
            yield day, self._table(rows, past, outcomes)
            self.drift += self.config.drift * (rng.normal() + rng.normal(size=len(self.drift)))

    def _impressions(self, rng: np.random.Generator, index: int, day: date) -> Impressions:
        world, num_rows = self.world, self.config.rows_per_day
        request = np.repeat(np.arange(num_rows), rng.integers(1, MAX_ITEMS_PER_REQUEST, num_rows, endpoint=True))[:num_rows]
        num_requests = int(request[-1]) + 1
        hour = np.sort(rng.choice(24, num_requests, p=_share_of_hours()))
        time_ms = np.sort(hour * HOUR_MS + rng.integers(HOUR_MS, size=num_requests))
        user = rng.choice(len(world.user_share), num_requests, p=world.user_share)[request]

        def is_null() -> Bools:
            return rng.random(num_rows) < self.config.null_rate

        return Impressions(
            day=index,
            request=request,
            time_ms=_midnight_ms(day) + time_ms[request],
            user=user,
            item=_items(rng, request, world.item_share),
            age=np.where(is_null(), len(AGES), world.user_age[user]),
            country=np.where(is_null(), len(COUNTRIES), world.user_country[user]),
            placement=rng.choice(len(world.placement_share), num_requests, p=world.placement_share)[request],
            device=rng.choice(len(DEVICES), num_requests, p=[0.6, 0.3, 0.1])[request],
            hour=hour[request],
            is_weekend=day.weekday() >= 5,
            price_is_null=is_null(),
            interests_is_null=is_null(),
        )

    def _play(self, rng: np.random.Generator, rows: Impressions) -> tuple[PastClicks, Outcomes]:
        """Hour by hour: a row sees the history as it stood when its hour began, so that all of it is strictly older."""
        num_rows, drift = len(rows.item), self.drift[rows.item]
        click_logits = self.click.feature_logits(self.world, rows) + drift
        conversion_logits = self.conversion.feature_logits(self.world, rows) + drift
        click_draw, conversion_draw = rng.random(num_rows), rng.random(num_rows)
        delay_ms = HOUR_MS * self.config.conversion_delay_hours * rng.exponential(size=num_rows)
        arrival_ms = rows.time_ms + 1 + delay_ms.astype(np.int64)

        pasts: list[PastClicks] = []
        outcomes: list[Outcomes] = []
        for start, stop in pairwise(np.searchsorted(rows.hour, np.arange(25))):
            if start == stop:
                continue
            hour = slice(start, stop)
            user, item, now = rows.user[hour], rows.item[hour], int(rows.time_ms[start]) // HOUR_MS * HOUR_MS
            past = self.history.at(now, user)
            click_probability = _sigmoid(click_logits[hour] + self.click.history_logits(self.world, item, past))
            conversion_probability = _sigmoid(conversion_logits[hour] + self.conversion.history_logits(self.world, item, past))
            clicked = click_draw[hour] < click_probability
            converted = clicked & (conversion_draw[hour] < conversion_probability)
            converted_at = np.where(converted, arrival_ms[hour], NEVER)
            self.history.append(user[clicked], item[clicked], converted_at[clicked])
            pasts.append(past)
            outcomes.append(Outcomes(click_probability, conversion_probability, clicked, converted, converted_at))
        return PastClicks(*map(np.concatenate, zip(*pasts, strict=True))), Outcomes(*map(np.concatenate, zip(*outcomes, strict=True)))

    def _table(self, rows: Impressions, past: PastClicks, outcomes: Outcomes) -> pa.Table:
        world, first = self.world, rows.day * len(rows.item)
        user, item = pa.array(rows.user), pa.array(rows.item)
        timestamp = pa.timestamp("ms", tz="UTC")
        offsets = _offsets(past.is_filled)
        return pa.table(
            {
                "impression_id": first + np.arange(len(rows.item)),
                "request_id": first + rows.request,
                "event_time": pa.array(rows.time_ms, timestamp),
                "hour": rows.hour,
                "is_weekend": np.full(len(rows.item), rows.is_weekend),
                "placement": _named(PLACEMENTS, rows.placement),
                "device": _named(DEVICES, rows.device),
                "user_id": user,
                "user_age_bucket": _named(AGES, rows.age),
                "user_country": _named(COUNTRIES, rows.country),
                "interests": _topics(world.user_interests).take(_nullable(rows.user, rows.interests_is_null)),
                "item_id": item,
                "advertiser_id": world.item_advertiser[rows.item],
                "item_category": _named(TOPICS, world.item_topic[rows.item]),
                "price": pa.array(world.item_price).take(_nullable(rows.item, rows.price_is_null)),
                "item_age_days": world.age_on(rows.day)[rows.item].astype(np.float32),
                "topic_weights": _weights(world.item_topic_weights).take(item),
                "item_vector": _vectors(world.item_vector).take(item),
                "history_item": pa.ListArray.from_arrays(offsets, past.items[past.is_filled]),
                "history_action": pa.ListArray.from_arrays(offsets, _named(ACTIONS, past.has_converted[past.is_filled].astype(np.int64))),
                "click": outcomes.is_clicked.astype(np.int8),
                "conversion": outcomes.is_converted.astype(np.int8),
                "conversion_time": pa.array(outcomes.converted_at, timestamp, mask=~outcomes.is_converted),
                "true_click_probability": outcomes.click_probability.astype(np.float32),
                "true_conversion_probability": outcomes.conversion_probability.astype(np.float32),
            }
        )


def _share_of_hours() -> Floats:
    """Quiet nights, busy evenings."""
    share: Floats = 1.2 + np.cos((np.arange(24) - 20) * (2 * np.pi / 24))
    share /= share.sum()
    return share


def _items(rng: np.random.Generator, request: Ints, share: Floats) -> Ints:
    """Items by their share, none twice in a request."""
    items = rng.choice(len(share), len(request), p=share)
    while len(again := np.flatnonzero(_is_repeated(request, items))):
        items[again] = rng.choice(len(share), len(again), p=share)
    return items


def _is_repeated(request: Ints, items: Ints) -> Bools:
    """Whether an earlier row of the same request has the same item."""
    is_repeated = np.zeros(len(items), np.bool_)
    for back in range(1, MAX_ITEMS_PER_REQUEST):
        is_repeated[back:] |= (request[back:] == request[:-back]) & (items[back:] == items[:-back])
    return is_repeated


def _midnight_ms(day: date) -> int:
    return int(datetime.combine(day, time(), UTC).timestamp()) * 1000


def _sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def _named(names: Sequence[str], codes: Ints) -> pa.Array:
    """A code beyond the names is null."""
    return pa.array(names).take(_nullable(codes, codes == len(names)))


def _nullable(indices: Ints, is_null: Bools) -> pa.Array:
    return pa.array(indices, mask=is_null)


def _offsets(is_filled: Bools) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(is_filled.sum(axis=1))]), pa.int32())


def _topics(has_topic: Bools) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(has_topic), _named(TOPICS, np.nonzero(has_topic)[1]))


def _weights(weights: Floats) -> pa.MapArray:
    topics = _topics(weights > 0)
    return pa.MapArray.from_arrays(topics.offsets, topics.values, weights[weights > 0].astype(np.float32))


def _vectors(vectors: Floats) -> pa.FixedSizeListArray:
    """Never null: Arrow up to 25 writes null vectors of fixed size to Parquet but cannot read them (apache/arrow#35692)."""
    return pa.FixedSizeListArray.from_arrays(vectors.astype(np.float32).ravel(), VECTOR_DIM)
