"""Trainings with a bad batch in the middle: what stops, what is passed over, what is run again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv import Experiment, compose, fit, replay, train
from mlenv.errors import CheckpointError, TrainingError
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.journal import Journal
from tests.test_experiment import assert_same_tensors, tensors_of

BAD_ROW = 1500
WEIGHTED = ["schema.labels.click.weight=click_weight", "loop.learning_rate_decay=none", "data.num_epochs=1", "data.shuffle_rows=0"]


@pytest.fixture
def poisoned(ads, tmp_path) -> list[str]:
    """Settings that train on a log of which two rows have weights so large that their sum is infinite."""
    folder = tmp_path / "poisoned"
    for day in ads.iterdir():
        table = pq.read_table(day / "part-00000.parquet")
        weights = [1.0] * len(table)
        if day.name == "date=2026-01-01":
            weights[BAD_ROW] = 3e38
            weights[BAD_ROW + 1] = 3e38
        (folder / day.name).mkdir(parents=True)
        pq.write_table(table.append_column("click_weight", pa.array(weights, pa.float32())), folder / day.name / "part-00000.parquet")
    return [*WEIGHTED, f"data.path={folder}"]


def config(arguments):
    return compose(arguments[0], arguments[1:])


def bad_steps(output: Path) -> list[Path]:
    return sorted(output.glob("bad_step-*"))


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_a_bad_step_stops_the_training_and_is_run_again(demo_arguments, tmp_path, poisoned, engine):
    changes = [*poisoned, f"embeddings.engine={engine}", "model.deep.normalization=batch"]
    settings = config(demo_arguments(*changes))
    output = tmp_path / "run of a test"
    with pytest.raises(
        TrainingError, match=r"step \d+: 'click/loss' is \S+ over a weight of inf; .*kept in .*bad_step-\d+, for mlenv\.replay\. Fix: "
    ) as error:
        train(settings)
    (folder,) = bad_steps(output)
    step = int(folder.name[-8:])
    assert step > 1
    assert f"step {step}: " in str(error.value)
    assert {path.name for path in folder.iterdir()} == {"batch-rank0.safetensors", "statistics-rank0.json", f"step-{step:08d}"}

    # What is kept is the state before the step: that of a training that ends there.
    shorter = config(demo_arguments(*changes, f"loop.max_steps={step - 1}", output="shorter"))
    with Experiment(shorter) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, shorter.loop)
    kept, expected = (tensors_of(list_checkpoints(path)[-1]) for path in (folder, tmp_path / "shorter" / "checkpoints"))
    assert_same_tensors(kept, {name: tensor for name, tensor in expected.items() if not name.startswith("run.")})

    again = replay(folder)
    stored = json.loads((folder / "statistics-rank0.json").read_text())
    replayed = json.loads(again.to_json())
    assert replayed["losses"] == stored["losses"]
    if engine == "torch":
        assert replayed == stored
    assert [module["activations"] for module in replayed["modules"] if module["module"] == "deep"] == [
        module["activations"] for module in stored["modules"] if module["module"] == "deep"
    ]
    assert again.parameters["deep.layers.0.weight"].gradient_norm is not None
    assert any("tables" in name and of.gradient_norm is not None for name, of in again.parameters.items())
    assert again.origin in str(error.value) or engine == "torchrec"
    assert bad_steps(output) == [folder]


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_a_bad_step_is_skipped_and_counted(demo_arguments, tmp_path, poisoned, engine, caplog):
    settings = [*poisoned, f"embeddings.engine={engine}", "loop.on_bad_loss=skip", "loop.log_every_steps=1"]
    result = train(config(demo_arguments(*settings)))
    output = tmp_path / "run of a test"
    (folder,) = bad_steps(output)
    step = int(folder.name[-8:])
    assert result.steps > step
    assert "The step is skipped." in caplog.text
    skipped = {line["step"]: line.get("train/skipped_steps", 0) for line in Journal(output / "metrics.jsonl").read() if "examples" in line}
    assert {at: count for at, count in skipped.items() if at < step} == dict.fromkeys(range(1, step), 0)
    assert {count for at, count in skipped.items() if at >= step} == {1}
    assert json.loads((list_checkpoints(output / "checkpoints")[-1] / "progress.json").read_text())["skipped_steps"] == 1


def test_too_many_skipped_steps_stop_the_training(demo_arguments, tmp_path):
    settings = config(demo_arguments("loop.on_bad_loss=skip", "loop.max_loss=0.001", "loop.max_skipped_steps=4"))
    with pytest.raises(TrainingError, match=r"step 5: .*4 steps were skipped before, as many as may be"):
        train(settings)
    assert [path.name for path in bad_steps(tmp_path / "run of a test")] == [f"bad_step-{step:08d}" for step in (3, 4, 5)]


@pytest.mark.parametrize("limit", [None, 50])
def test_a_loss_that_was_seen_too_late_is_found_by_running_again(demo_arguments, tmp_path, poisoned, monkeypatch, caplog, limit):
    """As on a GPU, where no step waits for its loss."""
    monkeypatch.setattr("mlenv.experiment.sees_loss_for_free", lambda device: False)
    limits = [] if limit is None else [f"loop.max_loss={limit}"]
    with pytest.raises(TrainingError, match=r"for mlenv\.replay"):
        train(config(demo_arguments(*poisoned, *limits)))
    assert "Now the steps since the last checkpoint run again" in caplog.text
    (folder,) = bad_steps(tmp_path / "run of a test")
    late = replay(folder)
    with pytest.raises(TrainingError):
        train(config(demo_arguments(*poisoned, *limits, output="seen")))
    assert bad_steps(tmp_path / "run of a test")[0].name == bad_steps(tmp_path / "seen")[0].name
    monkeypatch.undo()
    with pytest.raises(TrainingError):
        train(config(demo_arguments(*poisoned, output="seen at once")))
    (other,) = bad_steps(tmp_path / "seen at once")
    assert other.name == folder.name
    assert replay(other).to_json() == late.to_json()


def test_a_folder_without_a_bad_step_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a bad step"):
        replay(tmp_path)
