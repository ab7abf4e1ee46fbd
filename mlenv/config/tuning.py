"""A search for better values of a config's keys: the file that ``mlenv tune`` takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mlenv.config.loop import MONITORS
from mlenv.errors import ConfigError, MlenvError, Problems, check_above, check_at_least, nearest, require
from mlenv.kinds import kind_field

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner


_INSIDE = math.sqrt(2) - 1
"""Where between its bounds a space is tried: at no whole number, so that a key that wants one says so."""


class SpaceConfig(Protocol):
    """The values that a key may take."""

    @property
    def extremes(self) -> tuple[object, ...]:
        """Values that must all be right, for any of them to be: they are tried before the first trial."""

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Numbers between two bounds."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    @property
    def extremes(self) -> tuple[object, ...]:
        return self.low, self.low + _INSIDE * (self.high - self.low), self.high

    def distribution(self) -> BaseDistribution:
        distribution: BaseDistribution = _optuna().distributions.FloatDistribution(self.low, self.high)
        return distribution


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """Numbers between two positive bounds whose logarithm is uniform: as many between 0.001 and 0.01 as between 0.01 and 0.1."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_above("low", self.low, 0)
        _check_bounds(self.low, self.high)

    @property
    def extremes(self) -> tuple[object, ...]:
        return self.low, self.low * (self.high / self.low) ** _INSIDE, self.high

    def distribution(self) -> BaseDistribution:
        distribution: BaseDistribution = _optuna().distributions.FloatDistribution(self.low, self.high, log=True)
        return distribution


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Whole numbers between two bounds, both included."""

    low: int
    high: int
    step: int = 1
    """Distance between two of them."""

    def __post_init__(self) -> None:
        check_at_least("step", self.step, 1)
        _check_bounds(self.low, self.high)
        if (self.high - self.low) % self.step:
            raise ConfigError("high", expected=f"{self.low} and a multiple of {self.step}", received=self.high)

    @property
    def extremes(self) -> tuple[object, ...]:
        return self.low, self.high

    def distribution(self) -> BaseDistribution:
        distribution: BaseDistribution = _optuna().distributions.IntDistribution(self.low, self.high, step=self.step)
        return distribution


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values: numbers, texts, lists, or whole mappings such as a crossing with all that belongs to its kind."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("values", expected="at least one value", received=[])

    @property
    def extremes(self) -> tuple[object, ...]:
        return tuple(self.values)

    def distribution(self) -> BaseDistribution:
        """Over the places of the values: Optuna knows no lists and mappings."""
        distribution: BaseDistribution = _optuna().distributions.CategoricalDistribution(tuple(range(len(self.values))))
        return distribution


SPACES: dict[str, type | str] = {"choice": Choice, "integers": Integers, "log_uniform": LogUniform, "uniform": Uniform}
"""Spaces by the name that ``space.KEY.kind`` takes."""


class EarlyStoppingConfig(Protocol):
    """Decides which trials are not worth going on with, by what others had after as many evaluations."""

    def pruner(self) -> BasePruner:
        """Optuna's name for it."""


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving: at 1, 3, 9 ... evaluations only the best third of those that came so far goes on.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, arXiv:1810.05934.
    """

    grace_evaluations: int = 1
    """The first evaluation that can stop a trial."""
    reduction_factor: int = 3
    """One of so many goes on, to so many times the evaluations."""

    def __post_init__(self) -> None:
        check_at_least("grace_evaluations", self.grace_evaluations, 1)
        check_at_least("reduction_factor", self.reduction_factor, 2)

    def pruner(self) -> BasePruner:
        pruners = _optuna().pruners
        pruner: BasePruner = pruners.SuccessiveHalvingPruner(self.grace_evaluations, self.reduction_factor, min_early_stopping_rate=0)
        return pruner


@dataclass(frozen=True, kw_only=True)
class Median:
    """A trial is stopped when its best evaluation is worse than the median of the others after as many."""

    grace_evaluations: int = 1
    """The first evaluation that can stop a trial."""
    grace_trials: int = 4
    """Trials that must have ended before one can be stopped."""

    def __post_init__(self) -> None:
        check_at_least("grace_evaluations", self.grace_evaluations, 1)
        check_at_least("grace_trials", self.grace_trials, 1)

    def pruner(self) -> BasePruner:
        pruner: BasePruner = _optuna().pruners.MedianPruner(self.grace_trials, self.grace_evaluations)
        return pruner


EARLY_STOPPING: dict[str, type | str] = {"asha": Asha, "median": Median}
"""Rules by the name that ``early_stopping.kind`` takes."""


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Where trials run, and on what."""

    max_concurrent: int = 2
    """Trials under way at once."""
    cpus: int = 1
    """CPUs, and compute threads, of a trial."""
    gpus: float = 0
    """GPUs of a trial; 0.5 lets two share one."""
    address: str = ""
    """Ray cluster to join: auto for the one of this machine, or host:port. Empty starts one for the time of the trials."""

    def __post_init__(self) -> None:
        check_at_least("max_concurrent", self.max_concurrent, 1)
        check_at_least("cpus", self.cpus, 1)
        check_at_least("gpus", self.gpus, 0)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """A search for the values of a config's keys that make a validation metric best."""

    config: str
    """Config file that the trials differ from; seen from this file."""
    output: str
    """Folder of the search: its trials, its page, the best config. Its parent must exist."""
    metric: str
    """Metric of the validation window, such as click/auc, at a trial's best evaluation; each trial's ``loop.monitor``."""
    num_trials: int
    space: dict[str, SpaceConfig] = kind_field(SPACES)
    """What is searched: keys of the config, such as ``optimizer.learning_rate``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """A piece of config that is put over ``config`` in every trial, and is part of the best config."""
    search: Literal["random", "tpe"] = "tpe"
    """tpe draws more often where earlier trials were good (tree-structured Parzen estimator); random does not look at them."""
    random_trials: int = 8
    """With tpe, trials that are drawn at random before the others."""
    early_stopping: EarlyStoppingConfig | None = kind_field(EARLY_STOPPING, default=Asha())
    """null lets every trial train to its end."""
    resources: ResourcesConfig = ResourcesConfig()
    seed: int = 0
    """Of what is drawn; each trial's own is the config's."""

    def __post_init__(self) -> None:
        check_at_least("num_trials", self.num_trials, 1)
        check_at_least("random_trials", self.random_trials, 1)
        check_at_least("seed", self.seed, 0)
        if problems := list(self._problems()):
            raise Problems("tuning", problems)

    @property
    def higher_is_better(self) -> bool:
        return MONITORS[self.metric.rpartition("/")[2]]

    def _problems(self) -> Iterator[MlenvError]:
        task, _, name = self.metric.rpartition("/")
        if not task or name not in MONITORS:
            fix = nearest(name, MONITORS)
            yield ConfigError("metric", expected=f"TASK/METRIC with a metric of {sorted(MONITORS)}", received=self.metric, fix=fix)
        if not self.space:
            yield ConfigError("space", expected="at least one key of the config", received={})
        settings = list(_keys(self.settings))
        for key in (*self.space, *settings):
            for owned in (owned for owned in OWNED if _overlap(key, owned)):
                place = "space" if key in self.space else "settings"
                yield ConfigError(place, expected=f"no {owned}, which is the search's own", received=key, fix=f"take {key} out")
        for key in self.space:
            for other in (other for other in (*self.space, *settings) if other is not key and _overlap(key, other)):
                yield ConfigError("space", expected=f"no key beside {other!r} that changes the same", received=key, fix=f"take {key} out")


OWNED = ("name", "output", "loop.monitor", "data.test", "tracking")
"""Keys that a search sets itself, or never looks at."""


def _keys(node: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of what nested mappings hold."""
    if isinstance(node, dict):
        for part, entry in node.items():
            yield from _keys(entry, f"{key}.{part}" if key else str(part))
    else:
        yield key


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _check_bounds(low: float, high: float) -> None:
    check_above("high", high, low)
    if not math.isfinite(low):
        raise ConfigError("low", expected="a finite number", received=low)


def _optuna() -> Any:
    return require("optuna", extra="tune")
