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
WAYS: dict[str, list[str]] = {
    ALL: [],
    "a tenth of the negatives, weighted": [
        f"data.transforms=[{{{SAMPLER}, weight_column: click_weight}}]",
        "schema.labels.click.weight=click_weight",
    ],
    "a tenth of the negatives, predictions corrected": [f"data.transforms=[{{{SAMPLER}}}]", CORRECTION],
    "the same, not corrected": [f"data.transforms=[{{{SAMPLER}}}]"],
}
CORRECTED = list(WAYS)[1:3]
LARGEST_CALIBRATION, LARGEST_AUC = 0.02, 0.003


def measure(folder: Path) -> Result:
    simulate(SimulationConfig(), folder / "ads")
    figures = {
        way: [_figures(folder, f"{number}-{seed}", seed, settings) for seed in SEEDS] for number, (way, settings) in enumerate(WAYS.items())
    }
    means = {way: [sum(values) / len(SEEDS) for values in zip(*found, strict=True)] for way, found in figures.items()}
    rows = [[way, f"{steps:,.0f}", f"{auc:.4f}", f"{calibration:.4f}"] for way, (steps, auc, calibration) in means.items()]
    _, auc, calibration = means[ALL]
    off = max(abs(means[way][2] / calibration - 1) for way in CORRECTED)
    lost = max(auc - means[way][1] for way in CORRECTED)
    return Result(
        f"A tenth of the negatives: clicks on unsampled test days, means over {len(SEEDS)} seeds",
        markdown_table(["training rows", "steps", "AUC", "calibration"], rows),
        f"Corrected, calibration is within {off:.2%} of that of all rows (target: {LARGEST_CALIBRATION:.0%}), and AUC at most "
        f"{lost:.4f} below (target: {LARGEST_AUC}).",
        off <= LARGEST_CALIBRATION and lost <= LARGEST_AUC,
    )


def _figures(folder: Path, name: str, seed: int, settings: list[str]) -> tuple[float, float, float]:
    """Steps, and AUC and calibration of clicks on the test days."""
    common = [f"data.path={folder / 'ads'}", f"output={folder / name}", f"seed={seed}", "tracking.enabled=false"]
    result = train(compose(DEMO, [*common, *settings]))
    assert result.evaluation is not None
    return result.steps, result.evaluation.metrics["click/auc"], result.evaluation.metrics["click/calibration"]
