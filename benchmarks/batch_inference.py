"""Batch inference beside the training of the same model: from Parquet to weights, from Parquet to a folder of predictions.

Both take turns in one process. A turn of prediction is all of it but opening the model: reading, scoring, writing, measuring.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from benchmarks.mlenv_training import SameRunAgain
from mlenv.composition import compose
from mlenv.config import ExperimentConfig
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.experiment import Experiment
from mlenv.inference.batch_inference import InferenceOptions, prepare, run
from mlenv.loops.fit import fit
from mlenv.training import train

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
REPETITIONS, TRAINED_STEPS, TURN_SECONDS, TARGET = 5, 20, 4.0, 3.0
COPIES = 10
"""Of the KuaiRand sample, to predict: it is so small that starting the threads would be most of it."""
TRAINING = "training"
MODELS = {"one model": 1, "two models, rows read once": 2}


@dataclass(frozen=True)
class Rate:
    """Of one turn."""

    rows: int
    seconds: float
    cpu_seconds: float
    """Of all threads, waiting left out: what other processes do on the machine hardly changes it."""


def measure(folder: Path) -> Result:
    simulate(SimulationConfig(num_days=3), folder / "ads")
    cases = {"demo, simulated ads": ("examples/demo/ranker.yaml", folder / "ads", folder / "ads")}
    if DATA.is_dir():
        convert_kuairand(DATA, folder / "kuairand")
        cases["KuaiRand sample"] = ("examples/kuairand/dcn_v2.yaml", folder / "kuairand", _copies(folder / "kuairand", folder / "copies"))
    rows, verdicts, reached = [], [], []
    for number, (title, (file, data, logged)) in enumerate(cases.items()):
        settings = [f"output={folder / str(number)}", f"data.path={data}", "tracking.enabled=false", "data.num_epochs=1000"]
        if number == 0:
            settings += ["data.train.end=2026-01-02", "data.test.start=2026-01-03"]
        config = compose(ROOT / file, [*settings, f"loop.max_steps={TRAINED_STEPS}", "loop.learning_rate_decay=none"])
        turns = _turns(config, logged, folder / "scored")
        for way, measured in turns.items():
            rate = statistics.median(turn.rows / turn.seconds for turn in measured)
            times = [_times_training(turns, way, clock) for clock in ("seconds", "cpu_seconds")]
            rows.append([f"{title}: {way}", f"{rate / 1e3:.0f} k", *(f"{ratio:.1f}" for ratio in times)])
            if way == "one model":
                verdicts.append(f"{title} {times[0]:.1f} times, {times[1]:.1f} by CPU time")
                reached.append(min(times) >= TARGET)
    return Result(
        "Batch inference: rows/s from Parquet to written and measured predictions, beside training",
        markdown_table(["what", "rows/s", "times training", "by CPU time"], rows),
        f"Prediction beside training, median of {REPETITIONS} paired turns: {'; '.join(verdicts)} (target: {TARGET:.0f}).",
        all(reached),
    )


def _turns(config: ExperimentConfig, logged: Path, out: Path) -> dict[str, list[Rate]]:
    """Training and each way to predict, turn by turn."""
    train(config)
    options = InferenceOptions(path=str(logged))
    inferences = {way: prepare([f"model-{place}={config.output}" for place in range(number)], options) for way, number in MODELS.items()}
    loop = replace(config.loop, max_steps=0)
    with Experiment(replace(config, output=f"{config.output}-turns", loop=loop)) as made:
        again = SameRunAgain(made.run)

        def trained(steps: int) -> int:
            again.steps = steps
            before = again.restore().examples
            return fit(made.step, made.source("train"), again, loop).examples - before

        def predicted(way: str) -> int:
            shutil.rmtree(out, ignore_errors=True)
            return run(inferences[way], out).num_rows

        _timed(lambda: trained(10))
        first = _timed(lambda: trained(20))
        steps = max(round(20 * TURN_SECONDS / first.seconds), 20)
        turns: dict[str, list[Rate]] = {}
        for _ in range(REPETITIONS):
            turns.setdefault(TRAINING, []).append(_timed(lambda: trained(steps)))
            for way in MODELS:
                turns.setdefault(way, []).append(_timed(lambda way=way: predicted(way)))
    return turns


def _timed(turn: Callable[[], int]) -> Rate:
    started, cpu_started = time.perf_counter(), time.process_time()
    rows = turn()
    return Rate(rows, time.perf_counter() - started, time.process_time() - cpu_started)


def _times_training(turns: dict[str, list[Rate]], way: str, clock: str) -> float:
    """Median of the paired ratios of rows per second."""
    pairs = zip(turns[way], turns[TRAINING], strict=True)
    return statistics.median((own.rows / getattr(own, clock)) / (base.rows / getattr(base, clock)) for own, base in pairs)


def _copies(data: Path, out: Path) -> Path:
    for day in data.iterdir():
        (out / day.name).mkdir(parents=True)
        for number in range(COPIES):
            for file in day.iterdir():
                shutil.copy(file, out / day.name / f"{number}-{file.name}")
    return out
