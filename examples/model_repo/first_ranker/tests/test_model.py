"""The model scores, and learns from a small simulated log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlenv import Experiment, compose, evaluate, fit
from mlenv.datasets.simulated_ads import SimulationConfig, simulate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    folder = tmp_path_factory.mktemp("training")
    simulate(SimulationConfig(num_days=3, rows_per_day=1000), folder / "ads")
    days = "{end_date: 2026-01-03, num_train_days: 2, num_test_days: 1}"
    small = [f"data.path={folder / 'ads'}", f"output={folder / 'run'}", f"data.days={days}", "data.batch_size=128"]
    with Experiment(compose(ROOT / "config.yaml", [*small, "tracking.enabled=false"])) as experiment:
        yield experiment


def test_every_row_gets_one_finite_logit_for_each_task(experiment: Experiment) -> None:
    batch = next(iter(experiment.source("test").batches()))
    with torch.no_grad():
        logits = experiment.model(batch)
    assert logits.shape == (128, len(experiment.config.schema.tasks))
    assert torch.isfinite(logits).all()


def test_a_short_training_beats_chance(experiment: Experiment) -> None:
    progress = fit(experiment.step, experiment.source("train"), experiment.run, experiment.config.loop)
    metrics = evaluate(experiment.model, experiment.source("test")).metrics
    assert progress.step > 0
    for task in experiment.config.schema.tasks:
        assert metrics[f"{task}/auc"] > 0.5
