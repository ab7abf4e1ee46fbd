"""What a checkpoint of large tables costs a training: standing still for it, and training on while it is written."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from benchmarks.criteo_shaped import EMBEDDING_DIM, NUM_CATEGORICAL, schema_of, write_set
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, LoopConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress
from mlenv.modules import MLPConfig, RankerConfig

NUM_EMBEDDINGS = 900_000
REPETITIONS, PLAIN_STEPS = 5, 40
TARGET = 0.3
"""Largest share of the time that writing takes for which the training may stand still."""


def measure(folder: Path) -> Result:
    (folder / "data").mkdir()
    write_set(folder / "data", 16 * 4096, NUM_EMBEDDINGS)
    config = ExperimentConfig(
        name="bench",
        output=str(folder / "run"),
        schema=schema_of(NUM_EMBEDDINGS),
        data=DataConfig(path=str(folder / "data"), train=WindowConfig()),
        model=RankerConfig(crossing=None, deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
        embeddings=EmbeddingsConfig(engine="torchrec"),
        loop=LoopConfig(log_every_steps=10**6),
        tracking=TrackingConfig(enabled=False),
    )
    standing, copying, slower = [], [], []
    with Experiment(config) as experiment:
        step, run = experiment.step, experiment.run
        progress = run.restore()
        batches = itertools.cycle(list(experiment.source("train").batches()))

        def seconds_of_step() -> float:
            nonlocal progress
            started = time.perf_counter()
            output = step.advance(batches, progress)
            assert output is not None
            progress = progress.after(output)
            return time.perf_counter() - started

        def seconds_of_save(progress: Progress, waits: bool) -> float:
            started = time.perf_counter()
            run.save(progress)
            if waits:
                run.wait()
            return time.perf_counter() - started

        for _ in range(REPETITIONS):
            plain = statistics.median(seconds_of_step() for _ in range(PLAIN_STEPS))
            standing.append(seconds_of_save(progress, waits=True))
            seconds_of_step()
            copying.append(seconds_of_save(progress, waits=False))
            meanwhile = []
            while not run.is_written:
                meanwhile.append(seconds_of_step())
            run.wait()
            slower.append(sum(meanwhile) - plain * len(meanwhile))
    gigabytes = NUM_CATEGORICAL * NUM_EMBEDDINGS * (EMBEDDING_DIM + 1) * 4 / 1e9
    waited, copied, slow = (statistics.median(seconds) for seconds in (standing, copying, slower))
    rows = [
        ["waits until it is written", f"{waited:.2f} s", "0.00 s", f"{waited:.2f} s"],
        ["goes on once all is copied", f"{copied:.2f} s", f"{slow:.2f} s", f"{copied + slow:.2f} s"],
    ]
    share = copied / waited
    return Result(
        f"A checkpoint of {gigabytes:.1f} GB of tables and their optimizer's state: what the training loses",
        markdown_table(["the training", "stands still", "slower steps meanwhile", "in all"], rows),
        f"It stands still for {share:.2f} of the time that writing takes (target: at most {TARGET}); then the cores are shared.",
        share <= TARGET,
    )
