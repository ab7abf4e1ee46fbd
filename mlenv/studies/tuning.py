"""A search for better values of a config's keys: trials on Ray, drawn and stopped early by Optuna, judged by the validation window.

Its folder is all there is to know of it: a search that was killed goes on when it is run again. The test window is never looked at.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from mlenv.composition import compose, from_plain, leaves, load, parse_overrides, to_plain
from mlenv.config import ExperimentConfig, TuningConfig
from mlenv.dry_run import check_data, check_parts
from mlenv.errors import EarlyStopError, MlenvError, Problems, TrainingError, require
from mlenv.loops.journal import JOURNAL_FILE, Journal
from mlenv.pages.page import write_whole
from mlenv.records.tracking import MlflowTracker
from mlenv.studies.search import Search, TrialState
from mlenv.studies.trials import Outcome, Trial, alone_in, check_one_process, cluster, remember, run_trials
from mlenv.studies.tuning_page import TrialRow, TuningPage, render_tuning

logger = logging.getLogger(__name__)

TRIALS: Final = "trials"
TRIAL_FILE: Final = "trial.json"
SEARCH_FILE: Final = "search.json"
BEST_CONFIG: Final = "best.yaml"
PAGE: Final = "tuning.html"

_MAY_CHANGE: Final = ("search.num_trials", "search.resources.")
"""Keys that a search that goes on may set anew."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """``trial.json``: what was tried, and what came of it."""

    number: int
    values: dict[str, object]
    """Of the keys that are searched."""
    state: TrialState = "running"
    best: float | None = None
    """The metric at its best evaluation."""
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class TuningResult:
    """What a search leaves in its output folder."""

    best: TrialRecord
    trials: tuple[TrialRecord, ...]
    config: Path
    """The best config, for ``mlenv train``."""
    page: Path
    tracked_as: str
    """The run in MLflow that those of the trials are nested under; empty when it is not tracked."""


def tune(file: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TuningResult:
    """Runs all trials of a search that have not ended yet.

    Args:
        file: of a ``TuningConfig``; ``key=value`` overrides are keys of it, such as ``settings.loop.max_steps=100``.

    Raises:
        MlenvError: the search or a config of its trials cannot be used, before the first trial; ray or optuna is missing.
        TrainingError: no trial came to its end.
        StoppedError: a signal came; the same command goes on.
    """
    config = compose_tuning(file, overrides)
    base = check_search(config)
    require("optuna", extra="tune")
    output = Path(config.output)
    with alone_in(output):
        (output / TRIALS).mkdir(exist_ok=True)
        remember({"search": to_plain(config), "config": to_plain(base)}, output / SEARCH_FILE, _MAY_CHANGE)
        running = _Tuning(config, base, output)
        try:
            running.run()
        except BaseException as error:
            running.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        running.close("FINISHED")
        return running.result()


def compose_tuning(file: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TuningConfig:
    """Merges defaults, a YAML file and ``key=value`` overrides; ``config`` is then seen from the current folder.

    Raises:
        Problems, ConfigError: as ``compose``.
    """
    config: TuningConfig = from_plain(load(file, overrides), TuningConfig, str(file))
    return dataclasses.replace(config, config=os.path.relpath(Path(file).parent / config.config))


def check_search(config: TuningConfig) -> ExperimentConfig:
    """Composes the config of the trials with every extreme of every key, and builds what it describes.

    Returns:
        The config with the first extreme of every key.

    Raises:
        Problems: names every key and value that a trial could not be trained with.
        DataError: the columns of the data do not fit.
    """
    first = {key: space.extremes[0] for key, space in config.space.items()}
    tried = [first, *({**first, key: value} for key, space in config.space.items() for value in space.extremes[1:])]
    problems: dict[str, MlenvError] = {}
    composed = []
    for values in tried:
        try:
            one = compose(config.config, trial_overrides(config, values))
            check_one_process(one, config.config)
            check_parts(one)
            composed.append(one)
        except MlenvError as error:
            for problem in error.problems if isinstance(error, Problems) else [error]:
                problems.setdefault(str(problem), problem)
    if problems:
        raise Problems(f"{config.config}, with values of space", problems.values())
    check_data(composed[0])
    return composed[0]


def trial_overrides(config: TuningConfig, values: Mapping[str, object]) -> tuple[str, ...]:
    """``key=value`` for all that a trial sets over the config."""
    settings = {**leaves(config.settings), "loop.monitor": config.metric, **values}
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


class _Tuning:
    """A search under way: its records, its page, its run in MLflow."""

    def __init__(self, config: TuningConfig, base: ExperimentConfig, output: Path) -> None:
        self._config, self._base, self._output = config, base, output
        found = (_read_record(path) for path in sorted((output / TRIALS).glob(f"*/{TRIAL_FILE}")))
        self._records = {record.number: record for record in found}
        self._tracker: MlflowTracker | None = None
        if base.tracking.enabled:
            tracking = base.tracking
            self._tracker = MlflowTracker(output, uri=tracking.uri, experiment=tracking.experiment, run_name=output.name)
            space = {f"space.{key}": json.dumps(to_plain(space)) for key, space in config.space.items()}
            plain = leaves({name: value for name, value in to_plain(config).items() if name != "space"})
            self._tracker.start({**{key: str(value) for key, value in plain.items()}, **space}, {"mlenv.kind": "search"})

    def run(self) -> None:
        missing = [number for number in range(1, self._config.num_trials + 1) if not self._has_ended(number)]
        if missing:
            with cluster(self._config.resources) as ray:
                self._run(ray, missing)
        self._write()

    def close(self, status: Any) -> None:
        if self._tracker is not None:
            self._tracker.finish(status)

    def result(self) -> TuningResult:
        best = self._best()
        if best is None:
            failed = next((record for record in self._records.values() if record.error), None)
            more = f" Trial {failed.number}: {failed.error}" if failed is not None else ""
            raise TrainingError(f"{self._output}: no trial came to its end.{more}")
        tracked = ""
        if self._tracker is not None:
            run = f"run {self._tracker.run_id or 'pending'} of experiment {self._base.tracking.experiment!r}"
            tracked = self._tracker.url or run
        records = tuple(self._records[number] for number in sorted(self._records))
        return TuningResult(best, records, self._output / BEST_CONFIG, self._output / PAGE, tracked)

    def _run(self, ray: Any, missing: list[int]) -> None:
        search = ray.remote(num_cpus=0)(Search).remote(self._config)
        for number, record in sorted(self._records.items()):
            ray.get(search.begin.remote(number, record.values, self._evaluations(number)))
            if record.state != "running":
                ray.get(search.end.remote(number, record.state, record.best))
        trials = (self._trial(ray, search, number) for number in missing)
        with closing(run_trials(ray, trials, self._config.resources)) as ended:
            for trial, outcome in ended:
                record = self._end(int(trial.name), outcome)
                ray.get(search.end.remote(record.number, record.state, record.best))

    def _trial(self, ray: Any, search: Any, number: int) -> Trial:
        """Draws the values of a trial, unless it was begun before."""
        if number not in self._records:
            self._keep(TrialRecord(number=number, values=ray.get(search.begin.remote(number))))
        logger.info("trial %d: %s", number, values_text(self._records[number].values))
        overrides = trial_overrides(self._config, self._records[number].values)
        folder = str(self._folder(number))
        return Trial(
            name=f"{number:03d}",
            config=self._config.config,
            overrides=(*overrides, f"name={json.dumps(f'{self._output.name}/{number:03d}')}", f"output={json.dumps(folder)}"),
            output=folder,
            parent=str(self._output),
            measures_test=False,
            on_evaluation=partial(_ask, search, number, self._base.loop.evaluate_every_steps, self._config.metric),
        )

    def _end(self, number: int, outcome: Outcome) -> TrialRecord:
        assert outcome.state != "interrupted", "run_trials ends with it"
        evaluations, record = self._evaluations(number), self._records[number]
        best = (max if self._config.higher_is_better else min)(evaluations, default=None)
        record = dataclasses.replace(record, state=outcome.state, best=best, seconds=outcome.seconds, error=outcome.error)
        self._keep(record)
        text = f"{self._config.metric} {record.best:.5f}" if record.best is not None else "no evaluation"
        logger.info("trial %d %s: %s%s", number, record.state, text, f"; {record.error}" if record.error else "")
        best_now, ended = self._best(), sum(record.state != "running" for record in self._records.values())
        if best_now is not None and best_now.best is not None:
            Journal(self._output / JOURNAL_FILE).append(ended, {f"best/{self._config.metric}": best_now.best})
        self._write()
        return record

    def _keep(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        self._folder(record.number).mkdir(exist_ok=True)
        write_whole(json.dumps(dataclasses.asdict(record), indent=1), self._folder(record.number) / TRIAL_FILE)

    def _write(self) -> None:
        """Writes the page and the best config, as far as it is known."""
        best = self._best()
        if best is not None:
            write_whole(self._best_yaml(best), self._output / BEST_CONFIG)
        rows = [
            TrialRow(record.number, record.values, record.state, record.best, self._evaluations(number), record.seconds, record.error)
            for number, record in sorted(self._records.items())
        ]
        page = TuningPage(self._output.name, self._config, rows, best.number if best is not None else None, BEST_CONFIG)
        write_whole(render_tuning(page), self._output / PAGE)
        if self._tracker is not None:
            if best is not None:
                self._tracker.set_tags({f"best.{key}": json.dumps(value) for key, value in best.values.items()})
                self._tracker.set_tags({"best.trial": f"{best.number:03d}", f"best.{self._config.metric}": str(best.best)})
                self._tracker.log_artifact(self._output / BEST_CONFIG)
            self._tracker.log_artifact(self._output / PAGE)

    def _best_yaml(self, best: TrialRecord) -> str:
        """The config of the best trial, as a file that extends the one that the trials differ from."""
        base = os.path.relpath(self._config.config, self._output)
        name, output = f"{self._base.name}-best", str(self._output / "best")
        plain = parse_overrides(trial_overrides(self._config, best.values))
        head = f"# Trial {best.number} of {self._output.name}: {self._config.metric} {best.best:.6g} on the validation window.\n"
        return head + OmegaConf.to_yaml(OmegaConf.create({"extends": base, "name": name, "output": output, **plain}))

    def _best(self) -> TrialRecord | None:
        sign = 1 if self._config.higher_is_better else -1
        ended = [record for record in self._records.values() if record.state == "finished" and record.best is not None]
        return max(ended, key=lambda record: (sign * (record.best or 0.0), -record.number), default=None)

    def _has_ended(self, number: int) -> bool:
        return number in self._records and self._records[number].state != "running"

    def _evaluations(self, number: int) -> list[float]:
        """The metric at every evaluation of a trial so far."""
        key = f"validation/{self._config.metric}"
        return [line[key] for line in Journal(self._folder(number) / JOURNAL_FILE).read() if key in line]

    def _folder(self, number: int) -> Path:
        return self._output / TRIALS / f"{number:03d}"


def values_text(values: Mapping[str, object]) -> str:
    """What a trial tries, for people."""
    return ", ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())


def _ask(search: Any, number: int, every: int, metric: str, step: int, metrics: Mapping[str, float]) -> None:
    """Runs in the trial: whether others are so much better that it had better end."""
    import ray

    if ray.get(search.must_stop.remote(number, step // every, metrics[metric])):
        raise EarlyStopError(f"trial {number}, at step {step}")


def _read_record(path: Path) -> TrialRecord:
    return TrialRecord(**json.loads(path.read_text()))
