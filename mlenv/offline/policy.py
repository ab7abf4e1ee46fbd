"""What another policy would have earned on logged traffic, from what was shown with known probabilities.

Sources: Horvitz and Thompson, "A Generalization of Sampling Without Replacement from a Finite Universe", JASA 1952 (IPS);
Swaminathan and Joachims, "The Self-Normalized Estimator for Counterfactual Learning", NeurIPS 2015 (SNIPS);
Dudik, Langford and Li, "Doubly Robust Policy Evaluation and Learning", ICML 2011 (DR).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlenv.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NORMAL_95: Final = 1.959964
LEAST_EFFECTIVE: Final = 100.0
"""Rows that the weighted ones must be worth; fewer carry no interval."""
OFF: Final = 4.0
"""Standard errors by which the mean weight may be off 1 before the propensities are doubted."""


@dataclass(frozen=True, kw_only=True)
class LoggedRows:
    """What was shown: one row for each decision."""

    rewards: Floats
    """``(rows,)``."""
    propensities: Floats
    """``(rows,)``: with which the logging policy chose what it showed."""
    targets: Floats
    """``(rows,)``: with which the other policy chooses the same."""
    clusters: Integers
    """``(rows,)``: rows of one request or user are not independent; numbers from 0."""
    expected_shown: Floats | None = None
    """``(rows,)``: a model's reward of what was shown."""
    expected_policy: Floats | None = None
    """``(rows,)``: a model's reward of what the other policy shows, on average over its choices."""

    def __post_init__(self) -> None:
        for name, values, is_good, fix in (
            ("propensity", self.propensities, (self.propensities > 0) & (self.propensities <= 1), "log it with what was shown"),
            (
                "probability of the other policy",
                self.targets,
                (self.targets >= 0) & (self.targets <= 1),
                "let it sum to 1 over the choices",
            ),
            ("reward", self.rewards, np.isfinite(self.rewards), "leave out rows whose reward is not known yet"),
        ):
            if wrong := np.flatnonzero(~is_good).tolist():
                expected = "a finite number" if name == "reward" else "above 0 and at most 1" if name == "propensity" else "from 0 to 1"
                received = f"{values[wrong[0]]} in row {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                raise DataError(name, expected=expected, received=received, fix=fix)
        if (requests := len(np.unique(self.clusters))) < 2:
            fix = "name a log with more randomized traffic, or other days"
            raise DataError("log", expected="rows of randomized traffic, of two requests or more", received=requests, fix=fix)


@dataclass(frozen=True)
class Estimate:
    """A mean reward, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PolicyValue:
    """What is known of the other policy."""

    logged: Estimate
    """Mean reward of what was shown."""
    estimates: dict[str, Estimate]
    """By estimator: ``ips``, ``snips``, and with a model of the reward ``direct`` and ``doubly_robust``."""
    effective_rows: float
    """How many equally weighted rows the weighted ones are worth (Kish)."""
    mean_weight: float
    """1 where the propensities are right."""
    largest_share: float
    """Of all weight that one row has."""
    clipped: float
    """Share of the weight that clipping took away."""
    warnings: tuple[str, ...]


def evaluate_policy(log: LoggedRows, clip: float = math.inf) -> PolicyValue:
    """
    Args:
        clip: largest weight; a smaller one makes the estimates steadier and draws them towards the logged policy.
    """
    raw = log.targets / log.propensities
    weights = np.minimum(raw, clip)
    total = weights.sum()
    if not total:
        fix = "take a log in which the logging policy shows what the other one would"
        raise DataError("log", expected="rows that the other policy could have shown", received="none", fix=fix)
    rewards, clusters = log.rewards, log.clusters
    snips = float((weights * rewards).sum() / total)
    estimates = {
        "ips": _mean(weights * rewards, clusters),
        "snips": _around(snips, weights * (rewards - snips) / weights.mean(), clusters),
    }
    if log.expected_policy is not None and log.expected_shown is not None:
        estimates["direct"] = _mean(log.expected_policy, clusters)
        estimates["doubly_robust"] = _mean(log.expected_policy + weights * (rewards - log.expected_shown), clusters)
    effective = float(total**2 / (weights**2).sum())
    mean_weight, largest = _mean(raw, clusters), float(weights.max() / total)
    return PolicyValue(
        logged=_mean(rewards, clusters),
        estimates=estimates,
        effective_rows=effective,
        mean_weight=mean_weight.value,
        largest_share=largest,
        clipped=float(1 - total / raw.sum()),
        warnings=tuple(_warnings(effective, mean_weight, largest)),
    )


def _warnings(effective: float, mean_weight: Estimate, largest: float) -> list[str]:
    found = []
    if effective < LEAST_EFFECTIVE:
        found.append(f"the weighted rows are worth {effective:.0f}, too few for an interval: log more of what the other policy shows")
    if (error := (mean_weight.high - mean_weight.low) / 2 / NORMAL_95) and abs(mean_weight.value - 1) > OFF * error:
        found.append(
            f"weights average {mean_weight.value:.3f} instead of 1: the propensities are not those of the logging policy, "
            "or it never shows some of what the other one does"
        )
    if largest > 0.05:
        found.append(f"one row has {largest:.0%} of the weight: clip the weights, or log it more often")
    return found


def _mean(terms: Floats, clusters: Integers) -> Estimate:
    value = float(terms.mean())
    return _around(value, terms - value, clusters)


def _around(value: float, influence: Floats, clusters: Integers) -> Estimate:
    """A 95 % interval from what each row moves the value by; rows of a cluster move it together."""
    sums = np.bincount(clusters, influence)
    num = len(sums)
    error = math.sqrt(float((sums**2).sum()) * num / (num - 1)) / len(influence)
    return Estimate(value, value - NORMAL_95 * error, value + NORMAL_95 * error)


def choices(scores: Floats, requests: Integers, kind: str, amount: float) -> Floats:
    """Probabilities ``(candidates,)`` with which a policy chooses each candidate of its request.

    Args:
        scores: ``(candidates,)`` of a model.
        requests: ``(candidates,)`` numbers of requests, from 0.
        kind: ``softmax`` with ``amount`` the temperature, or ``greedy``: the best, and with probability ``amount`` any of them.
    """
    num = int(requests.max()) + 1
    best = np.full(num, -np.inf)
    np.maximum.at(best, requests, scores)
    sizes = np.bincount(requests, minlength=num)
    if kind == "softmax":
        powers = np.exp((scores - best[requests]) / amount)
        return np.asarray(powers / np.bincount(requests, powers, num)[requests], np.float64)
    is_best = scores == best[requests]
    ties = np.bincount(requests, is_best, num)
    return np.asarray(amount / sizes[requests] + (1 - amount) * is_best / ties[requests], np.float64)
