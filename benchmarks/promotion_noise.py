"""How often the gates promote a model that is no better: two seeds of one config, many times, on a log of another simulated world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from mlenv.composition import compose
from mlenv.config import GatesConfig
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.experiment import Experiment
from mlenv.inference.stored_scorer import open_scorer, rows_for
from mlenv.loops.fit import fit
from mlenv.models.gates import GateVerdict, Judgement, judge_calibration, judge_gain, judge_limits, judge_regression
from mlenv.models.gates import measure as measure_figures
from mlenv.models.paired_scoring import Scored, pair, score
from mlenv.schema import Schema

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "ranker.yaml"
LOG = SimulationConfig(num_days=4, rows_per_day=25_000, seed=20_260)
PAIRS = 40
FIRST_SEED = 7_000
ALLOWED = 0.05
GATES = GatesConfig(missing_rows=0)
"""As they are by default. What a model loses without features, its time and its size are not judged: they could only hold more."""


def measure(folder: Path) -> Result:
    simulate(LOG, folder / "ads")
    verdicts = []
    for number in range(PAIRS):
        (champion, schema), (challenger, _) = (_trained(folder, FIRST_SEED + 2 * number + side) for side in (0, 1))
        verdicts.append(GateVerdict(judgements=list(_judged(challenger, champion, schema))))
    promoted = sum(verdict.is_passed for verdict in verdicts)
    held = Counter(gate for verdict in verdicts for gate in {one.gate for one in verdict.failures})
    gains = sum(one.is_passed for verdict in verdicts for one in verdict.judgements if one.gate == "gain")
    rows = [["promoted", f"{promoted}"], ["a gain, whatever the other gates say", f"{gains}"]]
    rows += [[f"held by {gate}", f"{count}"] for gate, count in sorted(held.items())]
    return Result(
        f"Challengers that differ from the champion by their seed alone: {PAIRS} pairs of the demo, gates as by default",
        markdown_table(["verdict", "pairs"], rows),
        f"Trained on two days of {LOG.rows_per_day:,} rows, compared on the next two. Claim: noise brings at most {ALLOWED:.0%} a gain: "
        f"{gains / PAIRS:.1%}; promoted {promoted / PAIRS:.1%}.",
        gains <= ALLOWED * PAIRS,
    )


def _trained(folder: Path, seed: int) -> tuple[Scored, Schema]:
    """What a model of this seed says of the test days."""
    output = folder / f"{seed}"
    windows = ["data.train.end=2026-01-02", "data.test.start=2026-01-03", f"data.path={folder / 'ads'}", f"output={output}"]
    small = ["model.deep.hidden=[32,16]", "embeddings.engine=torch", "tracking.enabled=false", "data.batch_size=512", f"seed={seed}"]
    config = compose(DEMO, [*windows, *small])
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
    scorer = open_scorer(str(output))
    with closing(scorer.source(rows_for(scorer), scorer.schema)) as source:
        return score(scorer, source, GATES), scorer.schema


def _judged(challenger: Scored, champion: Scored, schema: Schema) -> Iterator[Judgement]:
    figures = measure_figures(pair(challenger, champion, schema, schema.tasks, GATES.common_rows), GATES)
    yield from judge_limits(challenger.metrics, schema.tasks, GATES)
    yield from judge_calibration(figures, GATES)
    yield from judge_regression(figures, (), GATES)
    yield from judge_gain(figures, GATES)
