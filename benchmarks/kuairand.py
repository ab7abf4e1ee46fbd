"""What tasks together, sequences and crossings are worth on the KuaiRand sample: test metrics, mean and spread over seeds.

Everything but the part that a row names is as in examples/kuairand/dcn_v2.yaml, whose settings were chosen on the
validation days for shared bottom, DIN over the history and one cross; no row was tuned by itself.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from mlenv.composition import compose
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.experiment import Experiment
from mlenv.loops.evaluate import evaluate
from mlenv.loops.fit import fit

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
SEEDS = range(3)
TASKS, METRICS = ("click", "long_view"), ("auc", "grouped_auc", "normalized_entropy", "calibration", "ece")
NO_HISTORY = "schema.features.hist_long_view=null"
HISTORY = "model.sequences.hist_long_view"
EXAMPLE = "both, shared bottom, DIN (the example)"
ROWS = {
    "click alone": ["schema.labels.long_view=null"],
    "long_view alone": ["schema.labels.click=null"],
    "both, shared bottom, no history": [NO_HISTORY, HISTORY + "=null"],
    "both, shared bottom, mean of history": [HISTORY + "={kind: mean}"],
    EXAMPLE: [],
    "both, shared bottom, TransAct": [HISTORY + "={kind: trans_act, candidate: [video_id]}"],
    "both, shared bottom, HSTU": [HISTORY + "={kind: hstu}"],
    "both, MMoE, DIN": ["model.experts={kind: mmoe, num_experts: 4, expert: {hidden: [64], dropout: 0.5}}"],
    "both, PLE, DIN": ["model.experts={kind: ple, num_layers: 1, expert: {hidden: [64], dropout: 0.5}}"],
    "MaskNet instead of the cross": ["model.crossing={kind: masknet}"],
    "transformer instead of the cross": ["model.crossing={kind: transformer, token_dim: 8}"],
    "no crossing": ["model.crossing=null"],
}
FLOOR = {"click": 0.7188, "long_view": 0.7098}
"""AUC of logistic regression on one-hot ids."""


def measure(folder: Path) -> Result:
    convert_kuairand(DATA, folder / "data")
    figures = {
        name: [_train(folder / f"{number}-{seed}", folder / "data", seed, settings) for seed in SEEDS]
        for number, (name, settings) in enumerate(ROWS.items())
    }
    header = ["model", *(f"{task} {metric}" for task in TASKS for metric in METRICS)]
    rows = [[name, *(_summary(runs, f"{task}/{metric}") for task in TASKS for metric in METRICS)] for name, runs in figures.items()]
    example = figures[EXAMPLE]
    reached = {task: statistics.mean(run[f"{task}/auc"] for run in example) for task in TASKS}
    return Result(
        "KuaiRand sample: test days 2022-05-07 and 08, mean ± standard deviation over three seeds",
        markdown_table(header, rows),
        f"AUC of the example: {reached['click']:.4f} and {reached['long_view']:.4f}; of logistic regression: "
        f"{FLOOR['click']} and {FLOOR['long_view']}. The noise of the test rows is about 0.012; rows are compared on the same examples.",
        all(reached[task] > FLOOR[task] for task in TASKS),
    )


def _train(output: Path, data: Path, seed: int, settings: list[str]) -> dict[str, float]:
    fixed = [
        f"data.path={data}",
        f"output={output}",
        f"seed={seed}",
        "tracking.enabled=false",
        "data.validation=null",
        "loop.evaluate_every_steps=0",
    ]
    config = compose(ROOT / "examples" / "kuairand" / "dcn_v2.yaml", [*fixed, *settings])
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
        return evaluate(experiment.model, experiment.source("test")).metrics


def _summary(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if values else "-"
