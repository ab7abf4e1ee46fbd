"""What a step costs when the tables grow: only the rows that are looked up should count."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.comparison import Result, markdown_table, paired_seconds
from benchmarks.criteo_shaped import NUM_CATEGORICAL, schema_of, write_set
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress
from mlenv.modules import MLPConfig, RankerConfig

TOTAL_ROWS = (100_000, 10_000_000)
STEPS, REPETITIONS = 12, 7
TARGET = 2.0


def measure(folder: Path) -> Result:
    cost: dict[str, list[float]] = {}
    for engine in ("torchrec", "torch"):
        cost[engine] = [_seconds_per_step(folder, engine, total // NUM_CATEGORICAL) for total in TOTAL_ROWS]
    growth = {engine: large / small for engine, (small, large) in cost.items()}
    rows = [[engine, *(f"{seconds * 1e3:.1f} ms" for seconds in cost[engine]), f"{growth[engine]:.2f}"] for engine in cost]
    return Result(
        "Step cost against table size: 26 tables, 16 wide, zipf ids, batch 4,096",
        markdown_table(["engine", *(f"{total:,} rows" for total in TOTAL_ROWS), "growth"], rows),
        f"With torchrec a step costs {growth['torchrec']:.2f} times as much on tables 100 times as large (target: at most {TARGET}).",
        growth["torchrec"] <= TARGET,
    )


def _seconds_per_step(folder: Path, engine: str, num_embeddings: int) -> float:
    name = f"{engine}-{num_embeddings}"
    (folder / name).mkdir()
    write_set(folder / name, STEPS * 4096, num_embeddings)
    config = ExperimentConfig(
        name=name,
        output=str(folder / f"{name}.run"),
        schema=schema_of(num_embeddings),
        data=DataConfig(path=str(folder / name), train=WindowConfig()),
        model=RankerConfig(crossing=None, deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
        embeddings=EmbeddingsConfig(engine=engine),  # type: ignore[arg-type]
        tracking=TrackingConfig(enabled=False),
    )
    with Experiment(config) as experiment:
        batches = list(experiment.source("train").batches())

        def train() -> None:
            reader = iter(batches)
            while experiment.step.advance(reader, Progress()) is not None:
                pass

        return statistics.median(paired_seconds({name: train}, REPETITIONS)[name]) / STEPS
