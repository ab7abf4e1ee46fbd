"""What the tools against missing and skewed features find on the KuaiRand sample, where it was put in by hand.

Simulation: the loss of AUC with features missing in 20 % of the rows, for the example and for the same trained with feature dropout,
over three seeds; once against nulls in a copy of the data, scored anew, and the AUC by its definition. Skew and replay: the test days as a
server might have logged them, the history stale by a day in 5 % of the rows and the duration scaled by 1.1, floats as float32.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.comparison import Result, markdown_table
from mlenv.composition import compose
from mlenv.datasets.kuairand import convert_kuairand
from mlenv.experiment import Experiment
from mlenv.inference.stored_scorer import StoredScorer, open_scorer, rows_for
from mlenv.loops.fit import fit
from mlenv.robustness.corruptions import draw_rows
from mlenv.robustness.parquet_log import key_from
from mlenv.robustness.score_replay import ReplayOptions, replay_scores
from mlenv.robustness.simulation import Simulation, SimulationOptions, simulate
from mlenv.robustness.skew import SkewOptions, find_skew

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data")) / "kuairand"
SEEDS = range(3)
MODELS = {"as in the example": [], "with feature dropout, rate 0.2": ["model.feature_dropout.rate=0.2"]}
OPTIONS = SimulationOptions(kinds=("missing",), resamples=20)
BY_HAND, TEST_DAYS = "tab", ("2022-05-07", "2022-05-08")
STALE, SCALED, FACTOR = "hist_long_view", "duration_s", 1.1
TASKS = ("click", "long_view")


def measure(folder: Path) -> Result:
    data = folder / "data"
    convert_kuairand(DATA, data)
    scorers = {
        name: [_train(folder / f"{number}-{seed}", data, seed, settings) for seed in SEEDS]
        for number, (name, settings) in enumerate(MODELS.items())
    }
    found = {name: [simulate(one, name, rows_for(one), OPTIONS) for one in group] for name, group in scorers.items()}
    plain, prepared = found.values()
    example = scorers["as in the example"][0]
    simulated, by_hand = _effect(plain[0], BY_HAND, "click"), _by_hand(example, data, folder / "nulled")
    is_equal = abs(simulated - by_hand) < 1e-6
    loses_less = all(_lost(one) < _lost(other) for one, other in zip(prepared, plain, strict=True))

    served = _serve(example, data, folder / "served.parquet")
    options = SkewOptions(key=key_from(["impression_id"]), entities=("user_id", "video_id"), time="event_time")
    skew = find_skew(str(served), str(data), options)
    replayed = replay_scores(example, "example", str(served), rows_for(example), ReplayOptions())
    is_first = [one.feature for one in skew.features[:2]] == [SCALED, STALE] and len(skew.above) == 2
    skew_rows = [[one.feature, f"{one.differs:.2%}", f"{one.score:.4f}", one.guess] for one in skew.features[:3]]
    blames = [
        [one.feature or "all features of the log", one.task, f"{one.explained:.1%}"]
        for one in replayed.blames
        if abs(one.explained) >= 0.0005
    ]
    return Result(
        "Missing, stale and scaled features on the KuaiRand sample, test days 2022-05-07 and 08",
        "\n\n".join(
            [
                markdown_table(["AUC, mean ± standard deviation over three seeds", *MODELS], _losses(found)),
                markdown_table(["smallest stability", *MODELS], _stability(found)),
                markdown_table(["skew, ordered by score", "rows that differ", "score", "what mlenv guesses"], skew_rows),
                markdown_table(["replay: feature", "task", "explained"], blames),
            ]
        ),
        f"Loss of AUC of click without {BY_HAND} in 20 % of the rows: {simulated:+.6f} simulated, {by_hand:+.6f} with nulls in a copy of "
        f"the data; with feature dropout the single features together cost less with every seed: {'yes' if loses_less else 'no'}; "
        f"injected skew found, named and ranked first: {'yes' if is_first else 'no'}.",
        is_equal and loses_less and is_first,
    )


def _train(output: Path, data: Path, seed: int, settings: list[str]) -> StoredScorer:
    own = [f"data.path={data}", f"output={output}", f"seed={seed}", "tracking.enabled=false"]
    config = compose(ROOT / "examples/kuairand/dcn_v2.yaml", [*own, *settings])
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
    return open_scorer(str(output))


def _effect(found: Simulation, subject: str, task: str, kind: str = "missing") -> float:
    return next(one.auc_change for one in found.effects if (one.kind, one.subject, one.task) == (kind, subject, task))


def _lost(found: Simulation) -> float:
    """By single features, all of them and both tasks together."""
    return -sum(one.auc_change for one in found.effects if not one.is_group)


def _losses(found: dict[str, list[Simulation]]) -> list[list[str]]:
    def row(name: str, values: dict[str, list[float]]) -> list[str]:
        return [name, *(f"{statistics.mean(one):.4f} ± {statistics.stdev(one):.4f}" for one in values.values())]

    rows = []
    for task in TASKS:
        whole = {name: [one.whole[task]["auc"] for one in runs] for name, runs in found.items()}
        rows.append(row(f"{task}, every feature there", whole))
        for group in ("user features", "item features", "context features"):
            for kind, words in (("missing", "in 20 % of the rows"), ("missing at peak", "in the four busiest hours")):
                changes = {name: [_effect(one, group, task, kind) for one in runs] for name, runs in found.items()}
                rows.append(row(f"{task}, change without {group} {words}", changes))
    rows.append(
        row("both tasks, sum of the losses by single features", {name: [_lost(one) for one in runs] for name, runs in found.items()})
    )
    return rows


def _stability(found: dict[str, list[Simulation]]) -> list[list[str]]:
    """The features that matter most to the example."""
    means = [{feature: statistics.mean(one.stability[feature] for one in runs) for feature in runs[0].stability} for runs in found.values()]
    return [[feature, *(f"{mean[feature]:.4f}" for mean in means)] for feature in sorted(means[0], key=means[0].__getitem__)[:6]]


def _by_hand(scorer: StoredScorer, data: Path, folder: Path) -> float:
    """Change of the AUC of click when the column holds nulls in the rows that the simulation hits."""
    files = [next((data / f"date={day}").glob("*.parquet")) for day in TEST_DAYS]
    tables = [pq.read_table(file, partitioning=None) for file in files]
    hit = draw_rows(sum(table.num_rows for table in tables), OPTIONS.share, OPTIONS.seed)
    first = 0
    for day, table in zip(TEST_DAYS, tables, strict=True):
        here, first = hit[first : first + table.num_rows], first + table.num_rows
        column = table.column(BY_HAND).combine_chunks()
        nulled = pa.array(column.to_pylist(), column.type, mask=here)
        (folder / f"date={day}").mkdir(parents=True)
        copy = table.set_column(table.column_names.index(BY_HAND), BY_HAND, nulled)
        pq.write_table(copy, folder / f"date={day}" / "part.parquet")
    rows = rows_for(scorer)
    aucs = []
    for path in (str(data), str(folder)):
        scored = [(batch.labels[:, 0], scorer(batch)[:, 0]) for batch in scorer.source(replace(rows, path=path)).batches()]
        labels, predictions = (torch.cat(parts).numpy() for parts in zip(*scored, strict=True))
        ahead = predictions[labels > 0][:, None] - predictions[labels == 0][None, :]
        aucs.append(float((ahead > 0).mean() + (ahead == 0).mean() / 2))
    return aucs[1] - aucs[0]


def _serve(scorer: StoredScorer, data: Path, file: Path) -> Path:
    """The test days with their skew, and with the predictions of the model for them."""
    rows = pl.read_parquet(data / "**" / "*.parquet", hive_partitioning=True).with_row_index("place")
    test = rows.filter(pl.col("date").cast(pl.String).is_in(TEST_DAYS))
    past = rows.select("user_id", "event_time", old=STALE).sort("event_time")
    asked = test.select("place", "user_id", event_time=pl.col("event_time") - pl.duration(days=1)).sort("event_time")
    before = asked.join_asof(past, on="event_time", by="user_id", check_sortedness=False).select("place", "old")
    hit = pl.Series("hit", np.random.default_rng(0).random(len(test)) < 0.05)
    served = (
        test.with_columns(hit)
        .join(before, on="place", how="left", maintain_order="left")
        .with_columns(
            pl.when("hit").then(pl.coalesce("old", STALE)).otherwise(pl.col(STALE)).alias(STALE),
            (pl.col(SCALED) * FACTOR).cast(pl.Float32).alias(SCALED),
        )
        .drop("place", "hit", "old", "date")
    )
    served.write_parquet(file)
    path = rows_for(scorer, str(file))
    predictions = torch.cat([scorer(batch) for batch in scorer.source(path).batches()]).numpy()
    scores = [pl.Series(f"prediction_{task}", predictions[:, place]) for place, task in enumerate(scorer.schema.tasks)]
    outcomes = ["click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter", "play_s"]
    served.drop(outcomes).with_columns(scores).write_parquet(file)
    return file
