"""Trainings that belong together, each in a folder of its own, run on a Ray cluster."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

from mlenv.composition import compose, leaves
from mlenv.config import ExperimentConfig, ResourcesConfig
from mlenv.datasets.ray_workers import MAX_RETRIES, RayConfig, RayWorkers
from mlenv.errors import ConfigError, EarlyStopError, MlenvError, StoppedError
from mlenv.loops.stop_signals import StopSignals
from mlenv.pages.page import write_whole

logger = logging.getLogger(__name__)

LOG_FILE: Final = "trial.log"
"""What mlenv logged while it ran."""

_LOOK_SECONDS: Final = 0.5
"""Between two looks at whether this process was asked to end."""
_GRACE_SECONDS: Final = 10
"""For trials to end when the search is interrupted, or was killed."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training among others: ``mlenv train CONFIG OVERRIDES``, in the folder of the process that asks for it."""

    name: str
    config: str
    overrides: tuple[str, ...]
    output: str
    parent: str
    """Output folder of what it belongs to, whose MLflow run its own is nested under."""
    measures_test: bool
    """Whether the test window is looked at."""
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None
    """Is told of the step and the metrics of every evaluation before the last step; raises EarlyStopError to end the trial there."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: Literal["finished", "stopped", "failed", "interrupted"]
    """stopped: early, because others were better; interrupted: it goes on when it is run again."""
    seconds: float = 0.0
    error: str = ""


@contextmanager
def cluster(resources: ResourcesConfig) -> Iterator[ModuleType]:
    """Ray, connected to the cluster that the trials run on.

    Raises:
        MlenvError: ray is not installed.
        ConfigError: no cluster answers at the address, or it is too small for one trial.
    """
    workers = RayWorkers(RayConfig(num_workers=resources.max_concurrent, cpus_per_task=resources.cpus, address=resources.address))
    ray = workers.connect("resources.address")
    try:
        there = ray.cluster_resources()
        for name, wanted, kind in (("cpus", resources.cpus, "CPU"), ("gpus", resources.gpus, "GPU")):
            if wanted > there.get(kind, 0):
                raise ConfigError(f"resources.{name}", expected=f"at most the cluster's {there.get(kind, 0):g}", received=wanted)
        yield ray
    finally:
        workers.close()


def run_trials(ray: Any, trials: Iterator[Trial], resources: ResourcesConfig) -> Generator[tuple[Trial, Outcome], None, None]:
    """Runs trials, and gives each back when it has ended. The next one is asked for when there is room for it.

    One that fails ends no other; one whose process or node dies goes on elsewhere from its last checkpoint. Close the iterator to end
    those that are under way.

    Raises:
        StoppedError: this process is asked to end, or the one of a trial was.
    """
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=MAX_RETRIES)(_run_trial)
    settings = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    pending: dict[Any, Trial] = {}
    signals = StopSignals()
    signals.hold()  # Ray would make a plain KeyboardInterrupt of what they raise
    try:
        with signals:
            while True:
                while len(pending) < resources.max_concurrent and (trial := next(trials, None)) is not None:
                    pending[task.remote(trial, os.getcwd(), settings)] = trial
                if not pending:
                    return
                while not (ended := ray.wait(list(pending), timeout=_LOOK_SECONDS)[0]):
                    if signals.received:
                        raise StoppedError(signals.received)
                trial = pending.pop(ended[0])
                outcome = _outcome(ray, ended[0])
                if outcome.state == "interrupted":
                    raise StoppedError(f"{outcome.error}, sent to trial {trial.name}")
                yield trial, outcome
    finally:
        for reference in pending:
            ray.cancel(reference)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=_GRACE_SECONDS)


def check_one_process(config: ExperimentConfig, file: str) -> None:
    """Raises ConfigError when a training would start processes of its own."""
    if config.launch.num_processes > 1:
        received = config.launch.num_processes
        raise ConfigError(f"{file}: launch.num_processes", expected="1: a trial is one process", received=received, fix="set it to 1")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps others out of it.

    Raises:
        ConfigError: it has no parent.
        MlenvError: another one is at work in it.
    """
    if not folder.parent.is_dir():
        fix = f"mkdir -p '{folder.parent}', or choose a folder elsewhere"
        raise ConfigError("output", expected="a folder whose parent exists", received=str(folder), fix=fix)
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MlenvError(f"{folder}: another command is at work here. Fix: wait for it, or choose another folder.") from error
        yield


def remember(plain: dict[str, Any], file: Path, may_change: tuple[str, ...] = ()) -> None:
    """Writes down what the trials of a folder are about; one that goes on must be about the same.

    Raises:
        ConfigError: the folder belongs to something else.
    """
    if file.exists():
        before, now = leaves(json.loads(file.read_text())), leaves(json.loads(json.dumps(plain)))
        changed = [
            f"{key}: {before.get(key)!r} became {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key) and not key.startswith(may_change)
        ]
        if changed:
            fix = "put them back, or choose another output folder"
            raise ConfigError(str(file), expected="the values that it was begun with", received="; ".join(changed), fix=fix)
    write_whole(json.dumps(plain, indent=1), file)


def _run_trial(trial: Trial, folder: str, settings: Mapping[str, str]) -> Outcome:
    """Runs on the cluster."""
    started = time.perf_counter()
    os.environ.update(settings)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        os.chdir(folder)
    except OSError as error:
        return Outcome("failed", error=f"{error}; the nodes of a cluster need the folder under the same name")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    Path(trial.output).mkdir(parents=True, exist_ok=True)
    _wait_for_predecessor(Path(trial.output))
    log = logging.FileHandler(Path(trial.output) / LOG_FILE)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    ours = logging.getLogger("mlenv")
    ours.addHandler(log)
    ours.setLevel(logging.INFO)
    try:
        state, message = _train(trial)
    finally:
        ours.removeHandler(log)
        log.close()
    return Outcome(state, time.perf_counter() - started, message)


def _wait_for_predecessor(output: Path) -> None:
    """The process of a search that was killed may live some seconds longer, and hold the folder of its trial."""
    deadline = time.monotonic() + _GRACE_SECONDS
    with (output / ".lock").open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
            else:
                return


def _train(trial: Trial) -> tuple[Literal["finished", "stopped", "failed", "interrupted"], str]:
    from mlenv.training import train

    try:
        config = compose(trial.config, trial.overrides)
        if not trial.measures_test:
            config = replace(config, data=replace(config.data, test=None))
        train(config, on_evaluation=trial.on_evaluation, parent=Path(trial.parent))
    except EarlyStopError:
        return "stopped", ""
    except StoppedError as error:
        return "interrupted", str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other trials go on
        logger.error("%s", traceback.format_exc())
        return "failed", str(error) if isinstance(error, MlenvError) else f"{type(error).__name__}: {error}"
    return "finished", ""


def _outcome(ray: Any, ended: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(ended)
    except ray.exceptions.RayError as error:
        return Outcome("failed", error=f"its process died time and again: {str(error).strip().partition(chr(10))[0]}")
    return outcome
