"""A search and a comparison on a real Ray cluster, tracked in a real MLflow: one cluster and one folder for all tests."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.config import ResourcesConfig
from mlenv.errors import DONE, STOPPED, ConfigError
from mlenv.loops.journal import Journal
from mlenv.studies.comparison import compare
from mlenv.studies.tuning import tune

# MLflow configures its SQLAlchemy models with an option that SQLAlchemy 2.1 deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")]

METRIC = "validation/click/auc"

SLOW_OPTIMIZER = """
import time
from dataclasses import dataclass

from mlenv.loops.dense_optimizers import AdamWConfig


@dataclass(frozen=True, kw_only=True)
class SlowConfig:
    learning_rate: float = 0.002
    gradient_clip_norm: float = 0.0

    def build(self, parameters):
        optimizer = AdamWConfig(learning_rate=self.learning_rate).build(parameters)
        optimizer.register_step_post_hook(lambda *arguments: time.sleep(0.05))  # time to be interrupted in
        return optimizer
"""


def write_configs(folder: Path, tiny_config: str) -> None:
    search = {
        "config": "base.yaml",
        "output": "search",
        "metric": "click/auc",
        "num_trials": 4,
        "search": "random",
        "seed": 55,  # draws 0.1, 0.1, 1e-9, 1e30
        "space": {"embeddings.learning_rate": {"kind": "choice", "values": [0.1, 1e-9, 1e30]}},
        "settings": {
            "data": {"validation": {"start": "2026-01-02", "end": "2026-01-02"}},
            "loop": {"evaluate_every_steps": 3},
            "optimizer": {"kind": "slow_optimizer:SlowConfig"},
        },
        "early_stopping": {"kind": "asha", "reduction_factor": 2},
        "resources": {"max_concurrent": 1},
    }
    (folder / "base.yaml").write_text(tiny_config)
    (folder / "tune.yaml").write_text(yaml.safe_dump(search))
    (folder / "slow_optimizer.py").write_text(SLOW_OPTIMIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: str) -> Iterator[Path]:
    """The current folder, with the configs in it, and a cluster whose workers are elsewhere."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("a folder")
    write_configs(folder, tiny_config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
        ray.shutdown()


def interrupt_when(ready) -> threading.Thread:
    """Sends this process SIGTERM as soon as ``ready`` says so."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def search(folder: Path) -> SimpleNamespace:
    """A search that SIGTERM ends in its second trial, and that is run again."""
    second = folder / "search/trials/002"
    thread = interrupt_when(lambda: any(line["step"] >= 5 for line in Journal(second / "metrics.jsonl").read()))
    code = main(["tune", "tune.yaml"])
    thread.join()
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("search/trials/*/trial.json"))]
    first_written = (folder / "search/trials/001/metrics.jsonl").stat().st_mtime_ns
    result = tune("tune.yaml")
    return SimpleNamespace(code=code, records=records, first_written=first_written, result=result, output=folder / "search")


def evaluations(search: SimpleNamespace, number: int) -> list[float]:
    return [line[METRIC] for line in Journal(search.output / f"trials/{number:03d}/metrics.jsonl").read() if METRIC in line]


def test_a_search_that_was_told_to_stop_goes_on(search):
    assert search.code == STOPPED
    assert [(record["number"], record["state"]) for record in search.records] == [(1, "finished"), (2, "running")]
    assert (search.output / "trials/001/metrics.jsonl").stat().st_mtime_ns == search.first_written
    assert "continues from" in (search.output / "trials/002/trial.log").read_text()
    assert [trial.values for trial in search.result.trials[:2]] == [record["values"] for record in search.records]


def test_good_trials_end_bad_ones_are_stopped_and_broken_ones_recorded(search):
    rates = {trial.number: trial.values["embeddings.learning_rate"] for trial in search.result.trials}
    assert set(rates.values()) == {0.1, 1e-9, 1e30}
    for trial in search.result.trials:
        measured = evaluations(search, trial.number)
        if rates[trial.number] == 0.1:
            assert trial.state == "finished"
            assert len(measured) == 4
        elif rates[trial.number] == 1e-9:
            assert trial.state == "stopped"
            assert len(measured) < 4
        else:
            assert trial.state == "failed"
            assert "Fix: lower the learning rates" in trial.error
        assert trial.best == (max(measured) if measured else None)
    best = max((trial for trial in search.result.trials if trial.state == "finished"), key=lambda trial: trial.best)
    assert search.result.best == best


def test_the_best_config_is_the_trial_with_its_test_window(search):
    best = compose(search.result.config)
    assert (best.name, best.output, best.loop.monitor) == ("tiny-best", "search/best", "click/auc")
    assert best.embeddings.learning_rate == 0.1
    assert best.data.test is not None
    trained = compose(search.output / f"trials/{search.result.best.number:03d}/config.yaml")
    assert trained == replace(best, name=trained.name, output=trained.output, data=replace(best.data, test=None))
    assert not list(search.output.glob("trials/*/predictions"))


def test_trials_are_runs_nested_under_the_one_of_the_search(search, folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mlenv'")
    runs = client.search_runs([experiment.experiment_id], "tags.mlenv.kind = 'search'")
    assert len(runs) == 1  # the same one when the search went on
    (parent,) = runs
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.info.run_name: run.info.status for run in children} == {
        f"search/{trial.number:03d}": {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[trial.state]
        for trial in search.result.trials
    }
    assert parent.info.status == "FINISHED"
    assert json.loads(parent.data.params["space.embeddings.learning_rate"])["values"] == [0.1, 1e-9, 1e30]
    assert parent.data.tags["best.embeddings.learning_rate"] == "0.1"
    assert parent.data.metrics["best/click/auc"] == search.result.best.best
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"best.yaml", "tuning.html"}


def test_the_page_names_every_trial(search):
    page = search.result.page.read_text()
    assert f"{search.result.best.best:.5f} at best" in page
    for words in ("stopped early", "failed", "1e+30", "Fix: lower the learning rates"):
        assert words in page


def test_a_finished_search_trains_nothing_and_another_one_is_refused(search, folder):
    assert tune("tune.yaml").trials == search.result.trials
    with pytest.raises(ConfigError, match=r"search\.seed: 55 became 2.*Fix: put them back, or choose another output folder"):
        tune("tune.yaml", ["seed=2"])


def test_two_configs_are_trained_with_the_same_seeds(folder):
    (folder / "worse.yaml").write_text("extends: base.yaml\nname: worse\nembeddings: {learning_rate: 1.0e-9}\n")
    result = compare(
        "worse.yaml", "base.yaml", out=folder / "versus", num_seeds=2, is_paired=True, resources=ResourcesConfig(max_concurrent=1)
    )
    runs = {side: [folder / f"versus/{side}/seed-{seed}" for seed in (0, 1)] for side in ("a", "b")}
    metrics = {side: [json.loads((run / "metrics.json").read_text())["click/auc"] for run in runs[side]] for side in runs}
    (auc,) = (one for one in result.differences if one.metric == "click/auc")
    assert (auc.first, auc.second, auc.is_paired) == (tuple(metrics["a"]), tuple(metrics["b"]), True)
    assert len(set(metrics["b"])) == 2  # the seed matters
    assert [compose(run / "config.yaml").seed for run in runs["b"]] == [0, 1]
    written = json.loads((folder / "versus/comparison.json").read_text())
    assert [row["sentence"] for row in written["differences"]] == list(result.sentences)
    assert json.loads((folder / "versus/b/seed-1/tracking.json").read_text())["parent"] == "../.."

    # The same runs, found as finished ones: nothing is trained, and the figures are the same.
    assert main(["compare", "versus/a", "versus/b/seed-*", "--out", "again", "--metric", "click/auc"]) == DONE
    again = json.loads((folder / "again/comparison.json").read_text())["differences"]
    assert [(row["mean"], row["confidence"]) for row in again] == [(auc.mean, 0.95)]
