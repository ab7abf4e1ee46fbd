"""Negative downsampling in the config, corrected in either way, beside all rows: the demo on the simulated log, on unsampled days."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison import Result, markdown_table
from mlenv.composition import compose
from mlenv.datasets.simulated_ads import SimulationConfig, simulate
from mlenv.training import train

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "ranker.yaml"
RATE, SEEDS = 0.1, (0, 1, 2)
SAMPLER = f"kind: sample_negatives, negative: click = 0, rate: {RATE}"
CORRECTION = f"calibration={{click: {{kind: negative_sampling, rate: {RATE}}}}}"
ALL = "all rows"
SMALLER = "data.batch_size=256"
"""A fifth of the rows is left: so the training has about as many steps."""
CORRECTED, WEIGHTED = "a tenth of the negatives, predictions corrected", "a tenth of the negatives, weighted"
WAYS: dict[str, list[str]] = {
    ALL: [],
    CORRECTED: [SMALLER, f"data.transforms=[{{{SAMPLER}}}]", CORRECTION],
    WEIGHTED: [SMALLER, f"data.transforms=[{{{SAMPLER}, weight_column: click_weight}}]", "schema.labels.click.weight=click_weight"],
}
LARGEST_CALIBRATION, LARGEST_AUC = 0.02, 0.003


def measure(folder: Path) -> Result:
    simulate(SimulationConfig(), folder / "ads")
    figures = {
        way: [_figures(folder, f"{number}-{seed}", seed, settings) for seed in SEEDS] for number, (way, settings) in enumerate(WAYS.items())
    }
    means = {way: [sum(values) / len(SEEDS) for values in zip(*found, strict=True)] for way, found in figures.items()}
    rows = [[way, f"{steps:,.0f}", f"{auc:.4f}", f"{calibration:.4f}"] for way, (steps, auc, calibration) in means.items()]
    _, auc, calibration = means[ALL]
    off, lost = (
        {way: difference(means[way]) for way in (CORRECTED, WEIGHTED)}
        for difference in (lambda figures: abs(figures[2] / calibration - 1), lambda figures: auc - figures[1])
    )
    return Result(
        f"A tenth of the negatives: clicks on unsampled test days, means over {len(SEEDS)} seeds",
        markdown_table(["training rows", "steps", "AUC", "calibration"], rows),
        f"Corrected, calibration is {off[CORRECTED]:.2%} from that of all rows (target: {LARGEST_CALIBRATION:.0%}), and AUC "
        f"{lost[CORRECTED]:.4f} below (target: {LARGEST_AUC}). Weights in the loss, which make its gradients noisier: "
        f"{off[WEIGHTED]:.2%} and {lost[WEIGHTED]:.4f}.",
        off[CORRECTED] <= LARGEST_CALIBRATION and lost[CORRECTED] <= LARGEST_AUC,
    )


def _figures(folder: Path, name: str, seed: int, settings: list[str]) -> tuple[float, float, float]:
    """Steps, and AUC and calibration of clicks on the test days."""
    common = [f"data.path={folder / 'ads'}", f"output={folder / name}", f"seed={seed}", "tracking.enabled=false"]
    result = train(compose(DEMO, [*common, *settings]))
    assert result.evaluation is not None
    return result.steps, result.evaluation.metrics["click/auc"], result.evaluation.metrics["click/calibration"]
