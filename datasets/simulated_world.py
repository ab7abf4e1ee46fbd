"""The users, items and tastes behind the simulated ads log, and the probabilities that they give.

Both tasks follow one formula with other strengths: effects of single features, effects of pairs, and how well the
item's taste fits the user's own taste and the user's past clicks. A null contributes nothing, so that the truth is a
function of what a model can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AGES = ("18-24", "25-34", "35-44", "45-54", "55+")
COUNTRIES = ("US", "IN", "BR", "DE", "JP", "FR", "GB", "MX")
DEVICES = ("phone", "desktop", "tablet")
PLACEMENTS = ("feed", "search", "story", "video", "banner", "sidebar", "email", "push")
TOPICS = ("travel", "sports", "fashion", "games", "food", "music", "cars", "books", "home", "finance", "health", "tech")

TASTE_DIM = 3
VECTOR_DIM = 8
NOVELTY_DAYS = 14.0
RENEWAL_DAYS = 60.0


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How far one task's logit moves with each feature: standard deviations of drawn effects, or slopes."""

    base: float
    user: float
    item: float
    advertiser: float
    topic: float
    placement: float
    device: float
    country: float
    age_topic: float
    country_topic: float
    placement_device: float
    evening: float
    weekend: float
    price: float
    """Slope on the standardized log price."""
    price_age: float
    novelty: float
    interest: float
    """Slope on the weight of the item's topics that the user is interested in."""
    vector: float
    taste: float
    """Slope on the fit of the item to the user's own taste."""
    history: float
    """Slope on the fit of the item to the taste of the items that the user clicked."""
    repeat: float
    """Slope on the share of past clicks that are of the item's topic."""
    loyalty: float
    """Slope on the share of past clicks that converted."""


CLICK = Strengths(
    base=-3.4,
    user=0.15,
    item=0.45,
    advertiser=0.35,
    topic=0.3,
    placement=0.6,
    device=0.25,
    country=0.15,
    age_topic=0.25,
    country_topic=0.12,
    placement_device=0.12,
    evening=0.2,
    weekend=0.15,
    price=-0.12,
    price_age=0.06,
    novelty=0.4,
    interest=0.7,
    vector=0.15,
    taste=0.25,
    history=0.4,
    repeat=0.8,
    loyalty=0.8,
)
CONVERSION = Strengths(
    base=-2.6,
    user=0.1,
    item=0.2,
    advertiser=0.4,
    topic=0.3,
    placement=0.25,
    device=0.4,
    country=0.2,
    age_topic=0.12,
    country_topic=0.08,
    placement_device=0.08,
    evening=0.1,
    weekend=0.2,
    price=-0.4,
    price_age=0.05,
    novelty=0.2,
    interest=0.4,
    vector=0.12,
    taste=0.2,
    history=0.2,
    repeat=0.4,
    loyalty=1.0,
)


@dataclass(frozen=True)
class World:
    """What stays the same over the days of a log. Arrays are indexed by user id or by item id."""

    user_age: Ints
    user_country: Ints
    user_interests: Bools
    """``(users, topics)``."""
    user_taste: Floats
    """``(users, TASTE_DIM)``; not in the log."""
    user_share: Floats
    """Share of the requests that come from the user."""
    item_advertiser: Ints
    item_topic: Ints
    item_price: Floats
    item_age: Floats
    """Days since the item was last renewed, on the first day of the log."""
    item_topic_weights: Floats
    """``(items, topics)``, zero for the topics that the item does not have."""
    item_vector: Floats
    """``(items, VECTOR_DIM)``: a noisy view of the taste, in the log."""
    item_taste: Floats
    """``(items, TASTE_DIM)``; not in the log."""
    item_share: Floats
    """Share of the places that the item fills."""
    placement_share: Floats

    def age_on(self, day: int) -> Floats:
        """``(items,)`` days; renewals keep the mix of ages, and with it the click rate, the same on every day."""
        return (self.item_age + day) % RENEWAL_DAYS


@dataclass(frozen=True)
class Impressions:
    """One entry per row, in order of time. A code equal to the number of names, or a true ``*_is_null``, stands for null."""

    day: int
    """Days since the start of the log."""
    request: Ints
    """Rows with the same number were shown together; counts from 0 on each day."""
    time_ms: Ints
    """Since the epoch."""
    user: Ints
    item: Ints
    age: Ints
    country: Ints
    placement: Ints
    device: Ints
    hour: Ints
    is_weekend: bool
    price_is_null: Bools
    interests_is_null: Bools


class PastClicks(NamedTuple):
    """The last clicks before each row, oldest first, ``(rows, history_length)``; the first places are filled."""

    items: Ints
    has_converted: Bools
    is_filled: Bools


def draw_world(rng: np.random.Generator, *, num_users: int, num_items: int, num_advertisers: int, num_placements: int) -> World:
    """Tastes follow topics: interests of a user and topics of an item tell something about theirs."""
    topic_taste = rng.normal(size=(len(TOPICS), TASTE_DIM))
    user_interests = rng.random((num_users, len(TOPICS))) < 0.2
    item_topic = rng.integers(len(TOPICS), size=num_items)
    item_topic_weights = _topic_weights(rng, item_topic)
    item_taste = _standardize(item_topic_weights @ topic_taste + 0.3 * rng.normal(size=(num_items, TASTE_DIM)))
    return World(
        user_age=rng.choice(len(AGES), num_users, p=[0.2, 0.3, 0.2, 0.15, 0.15]),
        user_country=rng.choice(len(COUNTRIES), num_users, p=_share(1 / np.arange(1, len(COUNTRIES) + 1))),
        user_interests=user_interests,
        user_taste=_standardize(user_interests @ topic_taste + 0.3 * rng.normal(size=(num_users, TASTE_DIM))),
        user_share=_share(rng.lognormal(sigma=0.6, size=num_users)),
        item_advertiser=rng.choice(num_advertisers, num_items, p=_share(1 / np.arange(1, num_advertisers + 1) ** 0.5)),
        item_topic=item_topic,
        item_price=np.exp(3.0 + rng.normal(scale=0.5, size=len(TOPICS))[item_topic] + rng.normal(scale=0.9, size=num_items)).round(2),
        item_age=rng.uniform(0, RENEWAL_DAYS, num_items),
        item_topic_weights=item_topic_weights,
        item_vector=item_taste @ rng.normal(size=(TASTE_DIM, VECTOR_DIM)) / TASTE_DIM**0.5 + 0.2 * rng.normal(size=(num_items, VECTOR_DIM)),
        item_taste=item_taste,
        item_share=_share(rng.permutation(1 / np.arange(1, num_items + 1) ** 0.5)),
        placement_share=_share(rng.permutation(1 / np.arange(1, num_placements + 1) ** 0.5)),
    )


class Effects:
    """One task's drawn effects, and the logits that they give."""

    def __init__(self, rng: np.random.Generator, world: World, strengths: Strengths) -> None:
        def draw(*sizes: int) -> Floats:
            return rng.normal(size=sizes)

        num_advertisers, num_placements = int(world.item_advertiser.max()) + 1, len(world.placement_share)
        ages, countries, devices, topics = len(AGES), len(COUNTRIES), len(DEVICES), len(TOPICS)
        self.strengths = strengths
        self.user = strengths.user * draw(len(world.user_age))
        self.item = strengths.item * draw(len(world.item_topic))
        self.item += strengths.advertiser * draw(num_advertisers)[world.item_advertiser] + strengths.topic * draw(topics)[world.item_topic]
        self.placement_device = strengths.placement_device * draw(num_placements, devices)
        # Few placements and devices: spread evenly, so that a seed does not decide how much they matter.
        self.placement_device += strengths.placement * rng.permutation(_standardize(np.arange(num_placements, dtype=float)))[:, None]
        self.placement_device += strengths.device * rng.permutation(_standardize(np.arange(devices, dtype=float)))
        self.age_topic = _with_null_row(strengths.age_topic * draw(ages, topics))
        self.country_topic = _with_null_row(
            strengths.country * draw(countries)[:, None] + strengths.country_topic * draw(countries, topics)
        )
        self.price_age = strengths.price + _with_null_row(strengths.price_age * draw(ages))
        self.item_price = _standardize(np.log(world.item_price))
        self.item_vector = strengths.vector * _standardize(world.item_vector @ draw(VECTOR_DIM))

    def feature_logits(self, world: World, rows: Impressions) -> Floats:
        """``(rows,)``: everything but the history."""
        strengths, user, item = self.strengths, rows.user, rows.item
        topic = world.item_topic[item]
        interest = (world.user_interests[user] * world.item_topic_weights[item]).sum(axis=1)
        logits = strengths.base + self.user[user] + self.item[item] + self.placement_device[rows.placement, rows.device]
        logits += self.age_topic[rows.age, topic] + self.country_topic[rows.country, topic]
        logits += strengths.evening * np.cos((rows.hour - 21) * (2 * np.pi / 24)) + strengths.weekend * rows.is_weekend
        logits += np.where(rows.price_is_null, 0.0, self.price_age[rows.age] * self.item_price[item])
        logits += strengths.novelty * np.exp(-world.age_on(rows.day)[item] / NOVELTY_DAYS)
        logits += np.where(rows.interests_is_null, 0.0, strengths.interest * interest)
        return logits + self.item_vector[item] + strengths.taste * _fit(world.user_taste[user], world.item_taste[item])

    def history_logits(self, world: World, item: Ints, past: PastClicks) -> Floats:
        """``(rows,)``: zero for a user without past clicks."""
        share = past.is_filled / np.maximum(past.is_filled.sum(axis=1), 1)[:, None]
        taste = np.einsum("rh,rhd->rd", share, world.item_taste[past.items])
        repeat = (share * (world.item_topic[past.items] == world.item_topic[item][:, None])).sum(axis=1)
        loyalty = (share * past.has_converted).sum(axis=1)
        logits = self.strengths.history * _fit(taste, world.item_taste[item])
        logits += self.strengths.repeat * repeat + self.strengths.loyalty * loyalty
        return logits


def _topic_weights(rng: np.random.Generator, item_topic: Ints) -> Floats:
    """The item's own topic weighs most, two more share the rest."""
    weights = np.zeros((len(item_topic), len(TOPICS)))
    items, own = np.arange(len(item_topic)), rng.uniform(0.5, 0.9, len(item_topic))
    weights[items, item_topic] = own
    for other in (1, 2):
        weights[items, (item_topic + other * rng.integers(1, 5, len(item_topic))) % len(TOPICS)] += (1 - own) / 2
    return weights


def _fit(left: Floats, right: Floats) -> Floats:
    """``(rows,)``: about standard deviation 1 for standardized tastes."""
    fit: Floats = (left * right).sum(axis=1) / TASTE_DIM**0.5
    return fit


def _standardize(values: Floats) -> Floats:
    """Mean 0 and deviation 1 along the first axis; zeros where nothing varies."""
    standardized: Floats = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-12)
    return standardized


def _share(values: Floats) -> Floats:
    share: Floats = values / values.sum()
    return share


def _with_null_row(table: Floats) -> Floats:
    return np.concatenate([table, np.zeros((1, *table.shape[1:]))])
