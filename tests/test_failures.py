"""What becomes of a training when something fails: real processes, signals, disks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from processes import Command

from mlenv import Experiment, compose, evaluate, train
from mlenv.errors import DONE, FAILED, STOPPED, StoppedError
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.training import evaluate_and_report
from tests.test_experiment import assert_identical, has_step


def config(arguments):
    return compose(arguments[0], arguments[1:])


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Command]]:
    """Starts a training in a process of its own."""
    started = []

    def start(arguments: list[str]) -> Command:
        started.append(Command(["train", *arguments], tmp_path / f"said {len(started)}"))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "engine"), [(signal.SIGTERM, "torchrec"), (signal.SIGUSR1, "torch")])
def test_a_training_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_bits(demo_arguments, tmp_path, start, number, engine):
    settings = [f"embeddings.engine={engine}", "loop.checkpoint_every_steps=1000"]
    train(config(demo_arguments(*settings, output="undisturbed")))

    tracked = demo_arguments(*settings, "tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", output="stopped")
    command = start(tracked)
    command.wait_until(lambda: has_step(tmp_path / "stopped", 15))
    command.send(number)
    assert command.wait() == STOPPED == os.EX_TEMPFAIL
    (checkpoint,) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    step = int(checkpoint.name[5:])
    assert f"mlenv: stopped by {number.name} after step {step}; the same command goes on" in command.said
    assert 15 <= step < 120
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mlenv").experiment_id])
    assert run.info.status == "KILLED"

    train(config(tracked))
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert_identical(tmp_path / "undisturbed", tmp_path / "stopped")


class Stopping(torch.nn.Module):
    """Gets a signal when it is first used."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return self.model(batch)


def test_a_signal_after_the_last_step_ends_the_evaluation(demo_arguments, tmp_path):
    settings = config(demo_arguments("loop.max_steps=3"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM"), Experiment(settings) as experiment:
        evaluate(Stopping(experiment.model), experiment.source("test"))
    assert signal.getsignal(signal.SIGTERM) == before


NUM_KILLS = 5


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(demo_arguments, tmp_path, start):
    """Anywhere in the steps, half of whose time goes into checkpoints."""
    settings = ["data.num_epochs=8", "loop.log_every_steps=1", "loop.checkpoint_every_steps=2"]
    train(config(demo_arguments(*settings, output="undisturbed")))

    output, random = tmp_path / "killed", Random(1)
    reached = []
    for _ in range(NUM_KILLS):
        command, before = start(demo_arguments(*settings, output="killed")), last_step(output)
        command.wait_until(lambda before=before: last_step(output) > before)
        time.sleep(random.uniform(0, 0.3))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        reached.append(last_step(output))
    assert reached == sorted(set(reached))

    train(config(demo_arguments(*settings, output="killed")))
    assert_identical(tmp_path / "undisturbed", output)
    assert not list(output.rglob("*.part"))


def last_step(output: Path) -> int:
    """The last step of the journal; 0 before there is any."""
    try:
        lines = (output / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own with room for a few checkpoints."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"x" * 4096):
            pass
    return file


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_the_training_goes_on_when_there_is_room(demo_arguments, tmp_path, small_disk, start):
    train(config(demo_arguments(output="undisturbed")))

    command, output = start(demo_arguments(output="small disk/run")), small_disk / "run"
    command.wait_until(lambda: has_step(output, 15) and bool(list_checkpoints(output / "checkpoints")))
    filler = fill(small_disk)
    assert command.wait() == FAILED, command.said
    assert command.said.count("the checkpoint cannot be written") == 1
    assert command.said.count("metrics.jsonl: cannot be written") == 1
    assert re.search(r"mlenv: step \d+: the last checkpoint cannot be written \(.*No space left on device.*Fix: make room", command.said)
    assert list_checkpoints(output / "checkpoints")
    assert not list(output.rglob("*.part"))

    filler.unlink()
    train(config(demo_arguments(output="small disk/run")))
    assert_identical(tmp_path / "undisturbed", output)


@pytest.mark.parametrize("bytes_left", [0, 2_000, 30_000])
def test_results_are_written_whole_or_not_at_all(demo_arguments, tmp_path, bytes_left):
    settings = config(demo_arguments("loop.max_steps=12"))
    train(settings)
    output = tmp_path / "run of a test"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with Experiment(settings) as experiment:
        experiment.load()
        with files_of_at_most(bytes_left), pytest.raises(OSError, match="File too large"):
            evaluate_and_report(experiment)
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert json.loads((output / "metrics.json").read_text())
    assert pq.read_table(output / "predictions").num_rows == 2000
    assert (output / "report.html").read_bytes() == before[output / "report.html"]


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_training_whose_source_hangs_is_ended_and_goes_on_when_it_is_started_again(demo_arguments, tmp_path, start, monkeypatch):
    settings = demo_arguments("loop.max_steps=30", "loop.hang_timeout_seconds=3")
    (tmp_path / "hangs.py").write_text(HANGING)
    blocked = [*settings, "data.transforms=[{kind: python, function: 'hangs:block', reads: [price], writes: [price]}]"]
    (tmp_path / "block").touch()
    monkeypatch.chdir(tmp_path)
    command, output = start(blocked), tmp_path / "run of a test"
    assert command.wait() == FAILED
    assert "no step has ended for 3 s" in command.said
    assert " in block" in (output / "stacks-rank0.txt").read_text()
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == []

    (tmp_path / "block").unlink()
    assert start(blocked).wait() == DONE


HANGING = """
import pathlib
import threading
import time


def block(rows):
    while pathlib.Path("block").exists() and "watchdog" in {thread.name for thread in threading.enumerate()}:
        time.sleep(0.05)
    return rows
"""
"""Once steps are trained, no row comes until the file is gone."""
