"""What tasks together, sequences, crossings and calibration are worth on the KuaiRand sample: test metrics, mean and spread over seeds.

Everything but the part that a row names is as in examples/kuairand/dcn_v2.yaml, whose settings were chosen on the
validation days for shared bottom, DIN over the history and one cross; no row was tuned by itself. Calibration is Platt's,
fitted on the validation days.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from mlenv.composition import compose
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.experiment import Experiment
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.evaluate import evaluate
from mlenv.loops.fit import fit
from mlenv.loops.training_run import CHECKPOINT_FOLDER

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
SEEDS = range(3)
TASKS = ("click", "long_view", "like")
ORDER, LEVEL = ("auc", "grouped_auc"), ("normalized_entropy", "calibration", "ece")

LIKE = "schema.labels.like={}"
HISTORY = "model.sequences.hist_long_view"
NO_HISTORY = ["schema.features.hist_long_view=null", f"{HISTORY}=null"]
MMOE = "model.experts={kind: mmoe, num_experts: 4, expert: {hidden: [64], dropout: 0.5}}"
PLE = "model.experts={kind: ple, num_layers: 1, expert: {hidden: [64], dropout: 0.5}}"
EXAMPLE, NO_SEQUENCE, SHARED = "click and long_view, DIN (the example)", "three tasks, no history", "three tasks, DIN"
ROWS = {
    "click alone, DIN": ["schema.labels.long_view=null"],
    "long_view alone, DIN": ["schema.labels.click=null"],
    "like alone, DIN": [LIKE, "schema.labels.click=null", "schema.labels.long_view=null"],
    EXAMPLE: [],
    NO_SEQUENCE: [LIKE, *NO_HISTORY],
    "three tasks, mean of history": [LIKE, HISTORY + "={kind: mean}"],
    SHARED: [LIKE],
    "three tasks, TransAct": [LIKE, HISTORY + "={kind: trans_act, candidate: [video_id]}"],
    "three tasks, HSTU": [LIKE, HISTORY + "={kind: hstu}"],
    "three tasks, MMoE, no history": [LIKE, MMOE, *NO_HISTORY],
    "three tasks, MMoE, DIN": [LIKE, MMOE],
    "three tasks, PLE, no history": [LIKE, PLE, *NO_HISTORY],
    "three tasks, PLE, DIN": [LIKE, PLE],
    "three tasks, DIN, uncertainty": [LIKE, "objective.balance.kind=uncertainty"],
    "three tasks, DIN, GradNorm": [LIKE, "objective.balance.kind=grad_norm"],
    "three tasks, DIN, PCGrad": [LIKE, "objective.balance.kind=pcgrad"],
    "three tasks, DIN, MaskNet instead of the cross": [LIKE, "model.crossing={kind: masknet}"],
    "three tasks, DIN, transformer instead of the cross": [LIKE, "model.crossing={kind: transformer, token_dim: 8}"],
    "three tasks, DIN, no crossing": [LIKE, "model.crossing=null"],
}
FLOOR = {"click": 0.7188, "long_view": 0.7098}
"""AUC of logistic regression on one-hot ids."""

Figures = dict[str, float]


def measure(folder: Path) -> Result:
    convert_kuairand(DATA, folder / "data")
    runs = {
        name: [_train(folder / f"{number}-{seed}", folder / "data", seed, settings) for seed in SEEDS]
        for number, (name, settings) in enumerate(ROWS.items())
    }
    after = {name: [calibrated for _, calibrated in pairs] for name, pairs in runs.items()}
    before = {name: [plain for plain, _ in pairs] for name, pairs in runs.items()}
    header = ["model", *(f"{task} {metric}" for task in TASKS for metric in ORDER)]
    order = [[name, *(_summary(figures, f"{task}/{metric}") for task in TASKS for metric in ORDER)] for name, figures in after.items()]
    levels = [f"{task}/{metric}" for task in TASKS for metric in LEVEL]
    level_header = ["model, as trained / calibrated", *(key.replace("/", " ") for key in levels)]
    level = [[name, *(f"{_mean(before[name], key)} / {_mean(after[name], key)}" for key in levels)] for name in runs]
    reached = {task: statistics.mean(run[f"{task}/auc"] for run in after[EXAMPLE]) for task in FLOOR}
    alone = {task: after[f"{task} alone, DIN"] for task in TASKS}
    return Result(
        "KuaiRand sample: test days 2022-05-07 and 08, mean ± standard deviation over three seeds",
        markdown_table(header, order) + "\n\n" + markdown_table(level_header, level),
        f"AUC of the example: {reached['click']:.4f} and {reached['long_view']:.4f}; of logistic regression: "
        f"{FLOOR['click']} and {FLOOR['long_view']}. Gains in AUC, with the standard error over the seeds:\n\n"
        f"- a history read by DIN, over none: {_gains(after[SHARED], dict.fromkeys(TASKS, after[NO_SEQUENCE]))}\n"
        f"- three tasks on a shared bottom, over each alone: {_gains(after[SHARED], alone)}\n"
        f"- MMoE over the shared bottom: {_gains(after['three tasks, MMoE, DIN'], dict.fromkeys(TASKS, after[SHARED]))}\n"
        f"- PLE over the shared bottom: {_gains(after['three tasks, PLE, DIN'], dict.fromkeys(TASKS, after[SHARED]))}\n\n"
        "A gain below twice its error has not earned its place. The seeds share the test rows, whose own noise is about 0.012 "
        "(like, with 120 positives, 0.025); rows of the table are compared on the same examples.",
        all(reached[task] > FLOOR[task] for task in FLOOR),
    )


def _train(output: Path, data: Path, seed: int, settings: list[str]) -> tuple[Figures, Figures]:
    """Test metrics of the model as it was trained, and calibrated; AUC is the same in both."""
    fixed = [f"data.path={data}", f"output={output}", f"seed={seed}", "tracking.enabled=false", "loop.evaluate_every_steps=0"]
    composed = compose(ROOT / "examples" / "kuairand" / "dcn_v2.yaml", [*fixed, "data.validation=null", *settings])
    platt = [f"calibration.{task}.kind=platt" for task in composed.schema.tasks]
    config = compose(ROOT / "examples" / "kuairand" / "dcn_v2.yaml", [*fixed, *platt, *settings])
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
        experiment.calibrate(list_checkpoints(output / CHECKPOINT_FOLDER)[-1])
        evaluation = evaluate(experiment.model, experiment.source("test"), calibrators=experiment.calibrators)
        return evaluation.uncalibrated, evaluation.metrics


def _summary(runs: list[Figures], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if values else "-"


def _mean(runs: list[Figures], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.mean(values):.3f}" if values else "-"


def _gains(runs: list[Figures], others: dict[str, list[Figures]]) -> str:
    """Mean difference in AUC by task, seed by seed, and its standard error."""
    texts = []
    for task in TASKS:
        gains = [run[f"{task}/auc"] - other[f"{task}/auc"] for run, other in zip(runs, others[task], strict=True)]
        texts.append(f"{task} {statistics.mean(gains):+.4f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.4f}")
    return ", ".join(texts)
