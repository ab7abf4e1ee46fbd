"""Training from Parquet through the whole of mlenv, beside a loop written by hand over tensors in memory, and beside other libraries.

Each way trains in a process of its own, in turn. ``make peers`` installs the libraries; without them only the limit is measured.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.comparison import Result, markdown_table
from benchmarks.criteo_shaped import NUM_CATEGORICAL, write_set
from benchmarks.crossing_peers import FOLDER
from benchmarks.mlenv_training import Precision, config_of
from benchmarks.training_turns import Contender, median_ratio, rates_in_turn
from mlenv.config import WindowConfig
from mlenv.training import train

NUM_ROWS, BATCH_SIZE, REPETITIONS, SECONDS = 8 * 65_536, 4096, 5, 2.5
LIMIT, AUC_DIFFERENCE, AUC_SEEDS = 0.9, 0.0005, 3
PEERS = ("FuxiCTR", "Torch-RecHub", "DeepCTR-Torch")


@dataclass(frozen=True)
class Case:
    """One model, in tables of one size."""

    title: str
    model: str
    rows_a_table: int
    precisions: tuple[Precision, ...]
    times_peers: float
    """What the last precision of mlenv is held to, beside the fastest peer."""


CASES = (
    Case("DeepFM, deep network 64-32, 260 k ids", "deepfm", 10_000, ("32-true",), 3.0),
    Case("DeepFM, deep network 64-32, 5 M ids", "deepfm", 5_000_000 // NUM_CATEGORICAL, ("32-true",), 12.0),
    Case("DCN-V2, 3 crosses beside 500-500-500, 260 k ids", "dcn_v2", 10_000, ("32-true", "bf16-mixed"), 2.2),
)


def measure(folder: Path) -> Result:
    peers = PEERS if FOLDER.is_dir() else ()
    if not peers:
        print(f"{FOLDER.name} is not there: other libraries are left out. Fix: make peers", file=sys.stderr)
    rows, verdicts, reached = [], [], []
    for case in CASES:
        place = folder / f"{case.model}-{case.rows_a_table}"
        place.mkdir()
        write_set(place, NUM_ROWS, case.rows_a_table)
        rates = _rates(case, place, peers)
        for name in rates:
            rows.append([f"{case.title}: {name}", f"{statistics.median(rates[name]) / 1e3:.1f} k", f"{_beside_limit(rates, name):.2f}"])
        limits = [_beside_limit(rates, f"mlenv, {precision}") for precision in case.precisions]  # as it is, not compiled
        verdicts.append(f"{case.title}: {' and '.join(f'{ratio:.2f}' for ratio in limits)} of the limit (target: {LIMIT})")
        reached += [ratio >= LIMIT for ratio in limits]
        if peers:
            fastest = max(peers, key=lambda name: statistics.median(rates[name]))
            ours = [name for name in rates if name.startswith(f"mlenv, {case.precisions[-1]}")]
            plain, times = (median_ratio(rates, name, fastest) for name in ours)
            verdicts[-1] += f", {plain:.1f} times the fastest peer, {fastest}, and {times:.1f} times compiled (target: {case.times_peers})"
            reached.append(times >= case.times_peers)
    difference, aucs = _bf16_auc(place, case)  # of the last case, DCN-V2
    verdicts.append(
        f"AUC of DCN-V2 in bf16 beside float32, mean of {AUC_SEEDS} seeds: {difference:+.5f} ({aucs}; target: within {AUC_DIFFERENCE})"
    )
    reached.append(abs(difference) <= AUC_DIFFERENCE)
    return Result(
        "Training: rows/s from Parquet through mlenv, of a loop by hand with fused tables over tensors in memory, and of other libraries",
        markdown_table(["model: way", "rows/s", "of the limit in the same precision"], rows),
        "; ".join(verdicts) + ". Peers take their rows from memory, without their loaders. First-order terms: mlenv, the limit and "
        "Torch-RecHub read them off the vectors, FuxiCTR and DeepCTR-Torch have tables of their own for them.",
        all(reached),
    )


def _rates(case: Case, folder: Path, peers: tuple[str, ...]) -> dict[str, list[float]]:
    file = [str(folder / "part-00000.parquet"), str(case.rows_a_table)]
    passive = {"OMP_WAIT_POLICY": "PASSIVE"}  # what the command line of mlenv sets; others run as they come
    commands = {
        **{f"limit, {precision}": ("bare_training", [case.model, precision], {}) for precision in case.precisions},
        **{
            f"mlenv, {precision}{said}": ("mlenv_training", [case.model, precision, compile], passive)
            for precision in case.precisions
            for compile, said in (("none", ""), ("kernels", ", compiled"))
        },
        **{name: ("training_peers", [name, case.model], {}) for name in peers},
    }
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(["-m", f"benchmarks.{module}", *words, *file], environment, folder / f"{name}.log"))
            for name, (module, words, environment) in commands.items()
        }
        return rates_in_turn(contenders, REPETITIONS, SECONDS, BATCH_SIZE)


def _beside_limit(rates: dict[str, list[float]], name: str) -> float:
    precision = name.split(", ")[1] if ", " in name else "32-true"
    return median_ratio(rates, name, f"limit, {precision}")


def _bf16_auc(folder: Path, case: Case) -> tuple[float, str]:
    """Mean difference of the AUC on held-out rows; both precisions start from the same weights and see the same rows in the same order."""
    whole, cut = pq.read_table(folder / "part-00000.parquet"), NUM_ROWS * 3 // 4
    data = folder / "auc"
    data.mkdir()
    for name, rows in (("train", whole.slice(0, cut)), ("test", whole.slice(cut))):
        pq.write_table(rows, data / f"{name}.parquet", row_group_size=65_536)
    aucs: dict[str, list[float]] = {}
    for seed in range(AUC_SEEDS):
        for precision in case.precisions:
            output = folder / f"auc-{precision}-{seed}"
            config = config_of(case.model, precision, "none", data / "train.parquet", case.rows_a_table, output)
            data_config = replace(config.data, num_epochs=1, test=WindowConfig(path="test.parquet"))
            result = train(replace(config, seed=seed, data=data_config))
            assert result.evaluation is not None
            aucs.setdefault(precision, []).append(result.evaluation.metrics["click/auc"])
    differences = [ours - other for ours, other in zip(aucs["bf16-mixed"], aucs["32-true"], strict=True)]
    told = "; ".join(f"{precision} {', '.join(f'{auc:.5f}' for auc in values)}" for precision, values in aucs.items())
    return statistics.mean(differences), told
