"""Batch inference beside the training of the same model: from Parquet to weights, from Parquet to a folder of predictions.

Both take turns in one process. A turn of prediction is all of it but opening the model: reading, scoring, writing, measuring.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from benchmarks.mlenv_training import SameRunAgain
from benchmarks.training_turns import median_ratio
from mlenv.batch_inference import prepare, run
from mlenv.composition import compose
from mlenv.config import ExperimentConfig
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.experiment import Experiment
from mlenv.loops.fit import fit
from mlenv.training import train

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
REPETITIONS, TRAINED_STEPS, TURN_SECONDS, TARGET = 5, 20, 4.0, 3.0
WAYS = {"one model": 1, "two models, rows read once": 2}


def measure(folder: Path) -> Result:
    simulate(SimulationConfig(), folder / "ads")
    cases = {"demo, simulated ads": ("examples/demo/ranker.yaml", folder / "ads")}
    if DATA.is_dir():
        convert_kuairand(DATA, folder / "kuairand")
        cases["KuaiRand sample"] = ("examples/kuairand/dcn_v2.yaml", folder / "kuairand")
    rows, ratios = [], {}
    for number, (title, (file, data)) in enumerate(cases.items()):
        settings = [f"output={folder / str(number)}", f"data.path={data}", "tracking.enabled=false", "data.num_epochs=1000"]
        config = compose(ROOT / file, [*settings, f"loop.max_steps={TRAINED_STEPS}", "loop.learning_rate_decay=none"])
        rates = _rates(config, folder / "scored")
        ratios[title] = median_ratio(rates, "one model", "training")
        for way, measured in rates.items():
            rows.append([f"{title}: {way}", f"{statistics.median(measured) / 1e3:.0f} k", f"{median_ratio(rates, way, 'training'):.1f}"])
    told = ", ".join(f"{title} {ratio:.1f}" for title, ratio in ratios.items())
    return Result(
        "Batch inference: rows/s from Parquet to written and measured predictions, beside training",
        markdown_table(["what", "rows/s", "times training"], rows),
        f"Prediction beside training, median of {REPETITIONS} paired turns: {told} (target: {TARGET:.0f}).",
        all(ratio >= TARGET for ratio in ratios.values()),
    )


def _rates(config: ExperimentConfig, out: Path) -> dict[str, list[float]]:
    """Rows/s, turn by turn."""
    train(config)
    ways = {way: prepare([f"{place}={config.output}" for place in range(number)]) for way, number in WAYS.items()}
    loop = replace(config.loop, max_steps=0)
    with Experiment(replace(config, output=f"{config.output}-turns", loop=loop)) as made:
        again = SameRunAgain(made.run)

        def train_rate(steps: int) -> float:
            again.steps = steps
            started = time.perf_counter()
            before = again.restore().examples
            return (fit(made.step, made.source("train"), again, loop).examples - before) / (time.perf_counter() - started)

        def predict_rate(way: str) -> float:
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            return run(ways[way], out).num_rows / (time.perf_counter() - started)

        train_rate(10)
        steps = max(round(train_rate(20) * TURN_SECONDS / config.data.batch_size), 20)
        turns: dict[str, Callable[[], float]] = {"training": lambda: train_rate(steps)}
        turns |= {way: (lambda way=way: predict_rate(way)) for way in ways}
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(REPETITIONS):
            for name, turn in turns.items():
                rates[name].append(turn())
    return rates
