"""A training step of the demo's model under every optimizer, with averaged weights and with accumulated gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from mlenv.batch import Batch
from mlenv.composition import compose
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "ranker.yaml"
NUM_STEPS, BATCH_SIZE, REPETITIONS = 15, 1024, 15
TARGET = 0.9
REFERENCES = {"torch": "AdamW, row-wise Adagrad, torch", "torchrec": "AdamW, row-wise Adagrad, torchrec"}
WAYS = {
    REFERENCES["torch"]: [],
    "Adam": ["optimizer.kind=adam"],
    "Lion": ["optimizer.kind=lion"],
    "SGD with momentum": ["optimizer.kind=sgd"],
    "averaged weights": ["loop.ema_decay=0.999"],
    "warm-up and cosine": ["loop.warmup_steps=100", "loop.learning_rate_decay=cosine"],
    "4 batches of 256 rows in a step": ["data.batch_size=256", "loop.accumulate_batches=4"],
    "tables: SGD": ["embeddings.optimizer=sgd"],
    "tables: Adam": ["embeddings.optimizer=adam"],
    "tables: one by Adam": ["embeddings.tables={item: {optimizer: adam, learning_rate: 0.001}}"],
    REFERENCES["torchrec"]: ["embeddings.engine=torchrec"],
    "tables: SGD, torchrec": ["embeddings={engine: torchrec, optimizer: sgd}"],
    "tables: one by SGD, torchrec": ["embeddings={engine: torchrec, tables: {item: {optimizer: sgd, learning_rate: 10}}}"],
}
"""All but the references say what is different."""
HELD_TO_TARGET = ("Adam", "Lion", "SGD with momentum", "averaged weights", "warm-up and cosine")


def measure(folder: Path) -> Result:
    simulate(SimulationConfig(num_days=1, rows_per_day=NUM_STEPS * BATCH_SIZE), folder / "ads")
    with ExitStack() as stack:
        ways = {name: training(folder / str(place), settings, stack) for place, (name, settings) in enumerate(WAYS.items())}
        seconds = paired_seconds(ways, REPETITIONS)
    rows, ratios = [], {}
    for name in WAYS:
        ratios[name] = median_ratio(seconds, name, REFERENCES["torchrec" if "torchrec" in name else "torch"])
        rows.append([name, f"{statistics.median(seconds[name]) / NUM_STEPS * 1e3:.1f}", f"{ratios[name]:.2f}"])
    worst = min(HELD_TO_TARGET, key=lambda name: ratios[name])
    return Result(
        f"Optimizers: a step of {BATCH_SIZE} rows of the demo's model, rows in memory",
        markdown_table(["what is different from the references", "ms per step", "speed relative to the reference"], rows),
        f"The slowest of the dense kinds, averaged weights and schedules: {worst}, {ratios[worst]:.2f} of the speed of AdamW "
        f"(target: at least {TARGET}).",
        ratios[worst] >= TARGET,
    )


def training(output: Path, settings: list[str], stack: ExitStack) -> Callable[[], None]:
    """Trains on all rows, which are in memory."""
    data = [f"data.path={output.parent / 'ads'}", f"data.batch_size={BATCH_SIZE}", "data.train.end=2026-01-01", "data.test=null"]
    plain = ["tracking.enabled=false", "embeddings.engine=torch", "loop.learning_rate_decay=none", "data.num_epochs=10"]
    experiment = stack.enter_context(Experiment(compose(DEMO, [f"output={output}", *data, *plain, *settings])))
    first = experiment.source("train").batches()
    batches: list[Batch] = []
    while sum(map(len, batches)) < NUM_STEPS * BATCH_SIZE:
        batches.append(next(first))
    first.close()
    step = experiment.step

    def train() -> None:
        rest = iter(batches)
        progress = Progress()
        while (output := step.advance(rest, progress)) is not None:
            progress = progress.after(output)

    return train
