"""Which models a run keeps as the best, with values in the place of evaluations."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from mlenv.batch import START
from mlenv.errors import TrainingError
from mlenv.loops.checkpoint import Retention, list_checkpoints, newest_checkpoint, verify
from mlenv.loops.fit import Progress
from mlenv.loops.journal import Journal
from mlenv.loops.stop_signals import StopSignals
from mlenv.loops.train_step import StepOutput
from mlenv.loops.training_run import PROGRESS, RunOptions, TrainingRun, newest_to_go_on_from


def run_of(folder, values, monitor="click/auc"):
    options = RunOptions(
        terms=("click/loss",),
        log_every_steps=1,
        retention=Retention(newest=2),
        monitor=monitor,
        total_steps=10,
        config="a: 1",
        fingerprints={},
    )
    values = iter(values)
    run = TrainingRun(
        folder,
        options,
        find=lambda: newest_to_go_on_from(folder, None, lambda path, text: None),
        state=lambda: {"weight": torch.zeros(1)},
        begin=lambda: None,
        check=lambda path, text: None,
        started=lambda: None,
        validate=lambda: {monitor or "click/auc": next(values)},
        gauges=dict,
        signals=StopSignals(),
    )
    return run, run.restore()


def best(folder):
    return [int(path.name[5:]) for path in list_checkpoints(folder / "best")]


def test_the_best_evaluation_is_kept_and_those_a_checkpoint_goes_on_from(tmp_path):
    run, progress = run_of(tmp_path, [0.5, 0.7, 0.6, 0.8, 0.9, 0.9, 0.7])
    kept = []
    for step in range(1, 8):
        progress = run.evaluate(Progress(step, best=progress.best, stale_evaluations=progress.stale_evaluations, decays=progress.decays))
        if step in (3, 6, 7):
            run.save(progress)
        run.wait()
        kept.append(best(tmp_path))
    # Checkpoint 3 knows of the best step 2, which therefore stays until checkpoints 6 and 7 have taken its place.
    assert kept == [[1], [2], [2], [2, 4], [2, 5], [2, 5], [5]]
    assert (progress.best, progress.stale_evaluations, progress.decays) == (0.9, 2, 3)


def test_a_best_model_that_is_a_checkpoint_too_is_written_once(tmp_path):
    run, _ = run_of(tmp_path, [0.5, 0.4])
    for step in (1, 2):
        progress = run.evaluate(Progress(step, best=0.5 if step == 2 else None))
        run.save(progress)
    run.wait()
    files = [sorted((tmp_path / folder / "step-00000001").iterdir()) for folder in ("best", "checkpoints")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(one.samefile(other) for one, other in zip(*files, strict=True))
    verify(tmp_path / "checkpoints" / "step-00000001")
    assert json.loads((tmp_path / "checkpoints" / "step-00000002" / PROGRESS).read_text())["stale_evaluations"] == 1


def test_a_killed_run_forgets_the_best_of_lost_steps_and_still_has_the_one_before(tmp_path):
    run, progress = run_of(tmp_path, [0.5, 0.6])
    progress = run.evaluate(Progress(1))
    run.save(progress)
    run.evaluate(Progress(2, best=progress.best))
    run.wait()
    assert best(tmp_path) == [1, 2]
    again, progress = run_of(tmp_path, [0.45, 0.55])
    assert (progress, best(tmp_path)) == (Progress(1, best=0.5), [1])
    progress = again.evaluate(Progress(2, best=progress.best))
    again.wait()
    assert (progress.stale_evaluations, best(tmp_path)) == (1, [1])


def test_lower_is_better_where_it_is_and_nothing_is_kept_without_a_monitor(tmp_path):
    (tmp_path / "loss").mkdir()
    run, progress = run_of(tmp_path / "loss", [0.5, 0.6], monitor="click/log_loss")
    for step in (1, 2):
        progress = run.evaluate(Progress(step, best=progress.best))
    run.wait()
    assert best(tmp_path / "loss") == [1]
    run, _ = run_of(tmp_path, [0.5], monitor="")
    assert run.evaluate(Progress(1)) == Progress(1)
    assert best(tmp_path) == []


@pytest.mark.parametrize(("saved_at", "written"), [([2], [2, 3]), ([2, 3], [2, 3]), ([], [3])])
def test_the_last_checkpoint_is_written_once(tmp_path, saved_at, written):
    run, _ = run_of(tmp_path, [])
    for step in saved_at:
        run.save(Progress(step))
    run.finish(Progress(3))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")] == written
    inode = (tmp_path / "checkpoints" / "step-00000003").stat().st_ino
    again, progress = run_of(tmp_path, [])
    again.finish(progress)
    assert (tmp_path / "checkpoints" / "step-00000003").stat().st_ino == inode


@pytest.fixture
def full_disk():
    """Lets no file grow, or lets all grow again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda is_full: resource.setrlimit(resource.RLIMIT_FSIZE, (0 if is_full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_checkpoint_with_one_warning_and_no_line_of_the_journal(tmp_path, full_disk, caplog):
    run, _ = run_of(tmp_path, [])
    output = StepOutput(4, START, torch.ones(1), torch.ones(1))
    run.log(Progress(1), output)
    run.save(Progress(1))
    run.wait()
    full_disk(True)
    for step in (2, 3):
        run.log(Progress(step), output)
        run.save(Progress(step))
    with pytest.raises(TrainingError, match=r"step 3: the last checkpoint cannot be written \(.*File too large.*\)\. Fix: make room"):
        run.finish(Progress(3))
    full_disk(False)
    assert [record.message.partition(" (")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path / 'metrics.jsonl'}: cannot be written",
        "step 2: the checkpoint cannot be written",
    ]
    assert "a kill would take it back to step 1" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    run.finish(Progress(3))
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"
    assert [line["step"] for line in Journal(tmp_path / "metrics.jsonl").read()] == [1, 2, 3]


def test_a_best_model_that_cannot_be_written_stops_the_training(tmp_path, full_disk):
    run, _ = run_of(tmp_path, [0.5, 0.5])
    full_disk(True)
    with pytest.raises(TrainingError, match="step 1: the best model cannot be written"):
        run.evaluate(Progress(1))  # the journal cannot either, and that is known at once
    full_disk(False)
    (tmp_path / "best").write_text("in the way")
    progress = run.evaluate(Progress(1))
    run.save(progress)
    with pytest.raises(TrainingError, match="step 1: the best model cannot be written"):
        run.finish(progress)
    assert list_checkpoints(tmp_path / "checkpoints") == []
    (tmp_path / "best").unlink()
    assert best(tmp_path) == []


def test_a_monitor_that_is_no_number_stops_the_training(tmp_path):
    run, _ = run_of(tmp_path, [float("nan")])
    with pytest.raises(TrainingError, match=r"step 1: validation/click/auc is nan\. Fix: choose a validation window with both labels"):
        run.evaluate(Progress(1))
