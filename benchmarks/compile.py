"""A training step as it is and compiled behind the embeddings, in float32 and in bfloat16, without reading data."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from benchmarks.criteo_shaped import schema_of, write_set
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, LoopConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress
from mlenv.modules import CrossNetConfig, FactorizationMachineConfig, MLPConfig, RankerConfig

BATCH_SIZE, NUM_BATCHES, NUM_EMBEDDINGS, REPETITIONS = 4096, 4, 10_000, 7
TARGET = 1.0
WAYS = ("32-true", "32-true, compiled", "bf16-mixed", "bf16-mixed, compiled")
MODELS = {
    "DeepFM, 64-32": RankerConfig(crossing=FactorizationMachineConfig(), deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
    "DCN-V2, 3 crosses beside 500-500-500": RankerConfig(
        crossing=CrossNetConfig(num_layers=3), deep=MLPConfig(hidden=(500, 500, 500)), heads=MLPConfig(hidden=())
    ),
}


def config_of(folder: Path, model: str, way: str) -> ExperimentConfig:
    """A training of a model in one of the ways."""
    precision, _, compiled = way.partition(", ")
    return ExperimentConfig(
        name="bench",
        output=str(folder / "run"),
        schema=schema_of(NUM_EMBEDDINGS),
        data=DataConfig(path=str(folder / "data"), train=WindowConfig(), batch_size=BATCH_SIZE),
        model=MODELS[model],
        embeddings=EmbeddingsConfig(engine="torchrec"),
        loop=LoopConfig(precision=precision, compile="kernels" if compiled else "none", device="cpu"),  # type: ignore[arg-type]
        tracking=TrackingConfig(enabled=False),
    )


def steps_of(experiment: Experiment) -> Callable[[], None]:
    """Runs a few steps over batches in memory."""
    batches = cycle(list(experiment.source("train").batches()))
    step = experiment.step

    def steps() -> None:
        for number in range(NUM_BATCHES):
            step.advance(batches, Progress(step=number))

    return steps


def seconds_of_a_second_start(folder: Path, model: str, way: str) -> float:
    """Seconds of compiling in a new process that finds the kernels of this one on the disk."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.compile import config_of; from mlenv.experiment import Experiment\n"
        "with Experiment(config_of(Path(sys.argv[1]), *sys.argv[2:])) as experiment: print(experiment.compilation.seconds)"
    )
    command = [sys.executable, "-c", code, str(folder), model, way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(folder: Path) -> Result:
    (folder / "data").mkdir()
    write_set(folder / "data", NUM_BATCHES * BATCH_SIZE, NUM_EMBEDDINGS)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "kernels")
    rows, ratios = [], []
    for model in MODELS:
        experiments = {way: Experiment(config_of(folder, model, way)) for way in WAYS}
        seconds = paired_seconds({way: steps_of(experiment) for way, experiment in experiments.items()}, REPETITIONS)
        for way, experiment in experiments.items():
            compilation, own = experiment.compilation, seconds[way]
            cells = ["", ""]
            if compilation is not None:
                assert compilation.compiled, compilation.reason
                cells = [f"{compilation.seconds:.1f}", f"{seconds_of_a_second_start(folder, model, way):.1f}"]
                ratios.append(median_ratio(seconds, way, way.partition(", ")[0]))
            rate = BATCH_SIZE * NUM_BATCHES / statistics.median(own) / 1e3
            milliseconds = 1e3 * statistics.median(own) / NUM_BATCHES
            rows.append([f"{model}: {way}", f"{milliseconds:.0f}", f"{rate:.0f} k", f"{median_ratio(seconds, way, '32-true'):.2f}", *cells])
        for experiment in experiments.values():
            experiment.__exit__(None, None, None)
    header = ["training step of 4096 rows, 26 tables of 16, 13 numbers", "ms", "rows/s", "speed", "compiling, s", "in a second run, s"]
    return Result(
        "Compiling the dense part: whole steps, speeds relative to float32 as it is",
        markdown_table(header, rows),
        f"Compiled steps have {min(ratios):.2f} to {max(ratios):.2f} of the speed of the same step as it is (target: at least {TARGET}).",
        min(ratios) >= TARGET,
    )
