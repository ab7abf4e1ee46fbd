"""Which values a search tries next, and which trials it stops: Optuna, asked and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np

from mlenv.config.tuning import Choice, TuningConfig
from mlenv.errors import require

TrialState = Literal["running", "finished", "stopped", "failed"]
"""stopped: early, because others were better."""


@final
class Search:
    """Knows no files and no cluster. It is rebuilt by telling it again of the trials that there are, in their order.

    What is drawn for a trial depends on its number and on what the search was told before, not on where it was interrupted.
    """

    def __init__(self, config: TuningConfig) -> None:
        optuna = require("optuna", extra="tune")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._optuna = config, optuna
        self._space = {key: space.distribution() for key, space in config.space.items()}
        pruner = config.early_stopping.pruner() if config.early_stopping is not None else optuna.pruners.NopPruner()
        self._study = optuna.create_study(direction="maximize" if config.higher_is_better else "minimize", pruner=pruner)
        self._trials: dict[int, Any] = {}
        self._told: dict[int, int] = {}

    def begin(self, number: int, values: Mapping[str, object] | None = None, evaluations: Sequence[float] = ()) -> dict[str, object]:
        """Draws the values of a trial; or takes those that it has, and what it has measured so far."""
        self._study.sampler = self._sampler(number)
        if values is not None:
            self._study.enqueue_trial({key: self._drawn(key, value) for key, value in values.items()})
        trial = self._study.ask(self._space)
        self._trials[number], self._told[number] = trial, 0
        for evaluation, value in enumerate(evaluations, start=1):
            self.must_stop(number, evaluation, value)
        return {key: self._value(key, trial.params[key]) for key in self._space}

    def must_stop(self, number: int, evaluation: int, value: float) -> bool:
        """Whether a trial is to end after this evaluation, its first being 1; one that it was told of before changes nothing."""
        if evaluation <= self._told[number]:
            return False
        self._told[number] = evaluation
        trial = self._trials[number]
        trial.report(value, evaluation)
        return bool(trial.should_prune())

    def end(self, number: int, state: TrialState, value: float | None) -> None:
        """Takes the result of a trial; a failed one has none."""
        states = self._optuna.trial.TrialState
        trial = self._trials.pop(number)
        if state == "finished":
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=states.PRUNED if state == "stopped" else states.FAIL)

    def _sampler(self, number: int) -> Any:
        """One for each trial, so that a search that goes on does not draw again what it drew at first."""
        samplers, seed = self._optuna.samplers, int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        if self._config.search == "random":
            return samplers.RandomSampler(seed=seed)
        # constant_liar: trials that are under way count as bad, so that those beside them are drawn elsewhere.
        return samplers.TPESampler(seed=seed, n_startup_trials=self._config.random_trials, constant_liar=True)

    def _value(self, key: str, drawn: Any) -> object:
        space = self._config.space[key]
        return space.values[drawn] if isinstance(space, Choice) else drawn

    def _drawn(self, key: str, value: object) -> object:
        space = self._config.space[key]
        return space.values.index(value) if isinstance(space, Choice) else value
