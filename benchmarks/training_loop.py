"""Training from Parquet through the whole of mlenv, beside a hand-written loop over tensors that are already in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from benchmarks.criteo_shaped import schema_of, write_set
from mlenv.batch import Batch
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, LoopConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress, fit
from mlenv.loops.train_step import StepOutput
from mlenv.modules import CrossNetConfig, MLPConfig, RankerConfig, weighted_binary_cross_entropy

NUM_ROWS, NUM_EMBEDDINGS, REPETITIONS = 16 * 4096, 10_000, 5
TARGET = 0.9
MODELS = {
    "deep network 64-32": RankerConfig(crossing=None, deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
    "DCN-V2, 3 crosses beside 500-500-500": RankerConfig(
        crossing=CrossNetConfig(num_layers=3), deep=MLPConfig(hidden=(500, 500, 500)), heads=MLPConfig(hidden=())
    ),
}


class EveryStepFresh:
    """A run that starts over each time but keeps logging as a real one does."""

    def __init__(self, run: object) -> None:
        self._run = run

    def restore(self) -> Progress:
        return Progress()

    def log(self, progress: Progress, output: StepOutput) -> None:
        self._run.log(progress, output)  # type: ignore[attr-defined]

    def evaluate(self, progress: Progress) -> None: ...

    def save(self, progress: Progress) -> None: ...


def bare_loop(experiment: Experiment, batches: list[Batch], optimizers: list[object]) -> None:
    """What somebody would write by hand around the same model."""
    model = experiment.model
    model.train()
    for batch in batches:
        loss = weighted_binary_cross_entropy(model(batch), batch.labels, batch.weights).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()  # type: ignore[attr-defined]
            optimizer.zero_grad()  # type: ignore[attr-defined]


def measure(folder: Path) -> Result:
    (folder / "data").mkdir()
    write_set(folder / "data", NUM_ROWS, NUM_EMBEDDINGS)
    rows, worst = [], float("inf")
    for name, model in MODELS.items():
        for engine in ("torch", "torchrec"):
            output = folder / f"{engine}-{len(rows)}"
            config = ExperimentConfig(
                name="bench",
                output=str(output),
                schema=schema_of(NUM_EMBEDDINGS),
                data=DataConfig(path=str(folder / "data"), train=WindowConfig()),
                model=model,
                embeddings=EmbeddingsConfig(engine=engine),  # type: ignore[arg-type]
                loop=LoopConfig(log_every_steps=20),
                tracking=TrackingConfig(enabled=False),
            )
            with Experiment(config) as experiment:
                batches = list(experiment.source("train").batches())
                optimizers = experiment.optimizers
                run = EveryStepFresh(experiment.run)
                ways: dict[str, Callable[[], object]] = {
                    "bare": lambda e=experiment, b=batches, o=optimizers: bare_loop(e, b, o),
                    "mlenv": lambda e=experiment, r=run, c=config: fit(e.step, e.source("train"), r, c.loop),
                }
                seconds = paired_seconds(ways, REPETITIONS)  # type: ignore[arg-type]
            ratio = median_ratio(seconds, "mlenv", "bare")
            worst = min(worst, ratio)
            rates = [f"{NUM_ROWS / statistics.median(seconds[way]) / 1e3:.0f} k" for way in ("bare", "mlenv")]
            rows.append([f"{name}, {engine} tables", *rates, f"{ratio:.2f}"])
    return Result(
        "Training: rows/s from Parquet through mlenv, and of a bare loop over tensors in memory",
        markdown_table(["model", "bare loop, rows/s", "mlenv from Parquet, rows/s", "ratio"], rows),
        f"The lowest ratio is {worst:.2f} (target: at least {TARGET}).",
        worst >= TARGET,
    )
