"""What a student with a tenth of the parameters learns from its teacher on Frappe_x1: test AUC over three seeds.

The teacher knows its training rows by heart: what it says about them is little more than their labels. So the student is
also taught on rows that were made up: training rows with another item, drawn evenly, as the negatives of the set were.
All settings were chosen by the validation AUC alone.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.comparison import Result, markdown_table
from benchmarks.frappe import DATA
from mlenv.composition import compose
from mlenv.datasets.frappe import convert_frappe
from mlenv.experiment import Experiment
from mlenv.loops.evaluate import evaluate
from mlenv.loops.fit import fit

HERE = Path(__file__).parent
TEACHER = HERE.parent / "frappe" / "dnn.yaml"
SEEDS = range(3)
MADE_UP, TARGET = 3, 0.5
"""Made-up rows per training row; and the share of the gap that the student must recover."""

ALONE, PLAIN, UNLABELED = "student alone", "student, taught on its training rows", "student, taught on rows without a label too"


def measure(folder: Path) -> Result:
    convert_frappe(DATA, folder / "data")
    _write_with_made_up_rows(folder / "data", folder / "more")
    auc: dict[str, list[float]] = {"teacher": [], ALONE: [], PLAIN: [], UNLABELED: []}
    sizes: dict[str, int] = {}
    for seed in SEEDS:
        teacher = folder / f"teacher-{seed}"
        taught = [f"objective.distillation.teacher={teacher}"]
        for name, file, data, settings in (
            ("teacher", TEACHER, "data", []),
            (ALONE, HERE / "student.yaml", "data", []),
            (PLAIN, HERE / "taught.yaml", "data", taught),
            (UNLABELED, HERE / "taught_unlabeled.yaml", "more", taught),
        ):
            output = teacher if name == "teacher" else folder / f"{file.stem}-{seed}"
            fixed = [f"data.path={folder / data}", f"output={output}", f"seed={seed}", "tracking.enabled=false"]
            sizes[name], reached = _train(file, [*fixed, *settings])
            auc[name].append(reached)
            print(f"seed {seed}, {name}: {reached:.5f}", flush=True)
    return summary(auc, sizes)


def summary(auc: dict[str, list[float]], sizes: dict[str, int]) -> Result:
    """The table and the verdict, of test AUC by model and seed."""
    shares = {name: _recovered(auc["teacher"], auc[ALONE], auc[name]) for name in (PLAIN, UNLABELED)}
    rows = []
    for name, values in auc.items():
        reached = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        rows.append([name, f"{sizes[name]:,}", reached, f"{shares[name]:.0%}" if name in shares else ""])
    return Result(
        f"Distillation on Frappe_x1: test rows, mean ± standard deviation over {len(SEEDS)} seeds",
        markdown_table(["model", "parameters", "test AUC", "of the gap recovered"], rows),
        f"Taught on rows without a label, the student recovers {shares[UNLABELED]:.0%} of the gap (target {TARGET:.0%}); "
        f"on its training rows alone {shares[PLAIN]:.0%}.",
        shares[UNLABELED] >= TARGET and sizes[UNLABELED] * 10 <= sizes["teacher"],
    )


def _train(file: Path, settings: list[str]) -> tuple[int, float]:
    """Parameters and test AUC."""
    config = compose(file, settings)
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
        experiment.load()
        size = sum(parameter.numel() for parameter in experiment.model.parameters())
        return size, evaluate(experiment.model, experiment.source("test")).metrics["label/auc"]


def _recovered(teacher: list[float], alone: list[float], taught: list[float]) -> float:
    """Share of the gap between the mean of the student alone and the mean of its teacher."""
    start, goal, reached = (statistics.mean(values) for values in (alone, teacher, taught))
    return (reached - start) / (goal - start)


def _write_with_made_up_rows(source: Path, out: Path) -> None:
    """Adds the column ``labeled``, and to the training rows ``MADE_UP`` copies of each with another item, where it is false."""
    for split in ("train", "validation", "test"):
        rows = pq.read_table(source / split)
        rows = rows.append_column("labeled", pa.array(np.ones(len(rows), bool)))
        if split == "train":
            generator = np.random.default_rng(0)
            rows = pa.concat_tables([rows, *(_with_other_items(rows, generator) for _ in range(MADE_UP))]).combine_chunks()
            rows = rows.take(pa.array(generator.permutation(len(rows))))
        (out / split).mkdir(parents=True)
        pq.write_table(rows, out / split / "part-00000.parquet", row_group_size=65_536)


def _with_other_items(rows: pa.Table, generator: np.random.Generator) -> pa.Table:
    """The same users in the same context before another item; what an item costs belongs to it."""
    items = rows["item"].to_numpy()
    cost_of_item = np.zeros(items.max() + 1, np.int64)
    cost_of_item[items] = rows["cost"].to_numpy()
    drawn = generator.integers(1, items.max() + 1, len(rows))
    columns = {"item": drawn, "cost": cost_of_item[drawn], "labeled": np.zeros(len(rows), bool)}
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values))
    return rows
