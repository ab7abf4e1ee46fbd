"""What every test runs under: one thread, no telemetry, nobody's tracking server, the same examples each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch, Arrow and Polars are imported: the test processes share the cores, and threads that wait for each other
# spin. Processes that a test starts inherit all of this.
os.environ.update(OMP_NUM_THREADS="1", POLARS_MAX_THREADS="1")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", RAY_USAGE_STATS_ENABLED="0", MPLBACKEND="Agg")
os.environ.pop("MLFLOW_TRACKING_URI", None)

settings.register_profile("mlenv", derandomize=True, deadline=None, database=None)
settings.load_profile("mlenv")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated ads log of three days; nobody writes to it."""
    from mlenv.datasets.simulated_ads import SimulationConfig, simulate

    folder = tmp_path_factory.mktemp("data of a test") / "ads"
    simulate(SimulationConfig(num_days=3, rows_per_day=2000, num_users=200, num_items=100), folder)
    return folder


@pytest.fixture
def demo_arguments(ads: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line arguments after the verb: the demo's config on the small log, into a folder of the test."""

    def arguments(*overrides: str, output: str = "run of a test") -> list[str]:
        small = ["batch_size=128", "num_epochs=4", "train.end=2026-01-02", "test.start=2026-01-03", f"path={ads}"]
        loop = ["log_every_steps=5", "checkpoint_every_steps=10"]
        settings = [*(f"data.{setting}" for setting in small), *(f"loop.{setting}" for setting in loop), "tracking.enabled=false"]
        defaults = ["embeddings.engine=torch", "model.deep.dropout=0.1", f"output={tmp_path / output}"]
        return [str(ROOT / "examples/demo/ranker.yaml"), *settings, *defaults, *overrides]

    return arguments


@pytest.fixture(scope="session")
def stored_ranker(ads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the demo's model, trained on the small log just long enough to know something; nobody writes to it."""
    from mlenv import Experiment, compose, fit

    output = tmp_path_factory.mktemp("ranker of a test") / "ranker"
    settings = [f"data.path={ads}", f"output={output}", "data.train.end=2026-01-02", "data.test.start=2026-01-03", "data.batch_size=128"]
    settings += ["data.num_epochs=2", "embeddings.engine=torch", "tracking.enabled=false", "loop.checkpoint_every_steps=100"]
    config = compose(ROOT / "examples/demo/ranker.yaml", settings)
    with Experiment(config) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
    return output


@pytest.fixture(scope="session")
def tiny_config(ads: Path) -> str:
    """A config of three features on the small log, which composes and trains in no time."""
    return f"""
name: tiny
output: tiny
schema:
  row_key: [impression_id]
  labels: {{click: {{}}}}
  features:
    item_id: {{kind: categorical}}
    device: {{kind: categorical, storage: string}}
    price: {{kind: numeric, log1p: true}}
  tables:
    item_id: {{num_embeddings: 1000, embedding_dim: 4}}
    device: {{num_embeddings: 100, embedding_dim: 4, ids: hash}}
data: {{path: '{ads}', batch_size: 128, train: {{end: 2026-01-01}}, test: {{start: 2026-01-03}}}}
model: {{kind: ranker, deep: {{hidden: [8]}}}}
loop: {{log_every_steps: 5, checkpoint_every_steps: 2, max_steps: 12}}
"""
