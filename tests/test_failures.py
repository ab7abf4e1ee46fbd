"""What becomes of a training when something fails: real processes, signals, disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from mlenv import Experiment, compose, evaluate, train
from mlenv.cli import STOPPED
from mlenv.errors import StoppedError
from mlenv.loops.checkpoint import list_checkpoints
from tests.test_experiment import assert_identical


def config(arguments):
    return compose(arguments[0], arguments[1:])


def start(arguments, **options) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlenv", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def wait_for_step(process: subprocess.Popen[bytes], output: Path, step: int) -> None:
    """Until the step is in the journal."""
    journal = output / "metrics.jsonl"
    while not (journal.exists() and b'"step": %d,' % step in journal.read_bytes()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "engine"), [(signal.SIGTERM, "torchrec"), (signal.SIGUSR1, "torch")])
def test_a_training_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_bits(demo_arguments, tmp_path, number, engine):
    settings = [f"embeddings.engine={engine}", "data.num_epochs=8", "loop.checkpoint_every_steps=1000"]
    train(config(demo_arguments(*settings, output="undisturbed")))

    tracked = demo_arguments(*settings, "tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", output="stopped")
    process = start(tracked)
    wait_for_step(process, tmp_path / "stopped", 15)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == STOPPED == os.EX_TEMPFAIL
    (checkpoint,) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    step = int(checkpoint.name[5:])
    assert f"mlenv: stopped by {number.name} after step {step}; the same command goes on" in errors.decode()
    assert 15 <= step < 240
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
    with pytest.raises(StoppedError, match="SIGTERM"), Experiment(settings) as experiment:
        evaluate(Stopping(experiment.model), experiment.source("test"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
