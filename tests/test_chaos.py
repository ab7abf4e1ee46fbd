"""One training by two processes, hit by twenty failures at random moments, against the same training left alone.

``make chaos`` runs it: it takes minutes, most of them for processes that start again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mlflow import MlflowClient

from mlenv.errors import DONE
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.journal import Journal
from tests.test_experiment import assert_identical
from tests.test_failures import fill, last_step, small_disk
from tests.test_tracking import is_healthy, port, wait_until

__all__ = ["port", "small_disk"]  # fixtures
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")]

FAILURES = {"rank": 5, "all": 3, "truncated checkpoint": 3, "Ray worker": 4, "MLflow server": 3, "full disk": 2}
SAID = {
    "rank": r"rank \d ended with exit code -9; all start again",
    "truncated checkpoint": r"step-\d+/\S+: expected \d+ bytes\. Received: '\d+ bytes'.* The checkpoint before it is used\.",
    "Ray worker": r"data\.workers: \w+; its rows are read again",
    "MLflow server": r"MLflow at http://\S+ ",
    "full disk": r"the checkpoint cannot be written",
}
"""What the log tells of each kind; that all processes were killed, it tells by where they go on."""
MOST_STEPS = 15
"""Between two failures."""
SETTINGS = [
    *("data.num_epochs=120", "data.batch_size=64", "embeddings.engine=torchrec", "embeddings.sharding=table_wise"),
    *("loop.keep_checkpoints=3", "launch.num_processes=2", "launch.max_restarts=100"),
]


class MlflowServer:
    """A real one that can be killed and come back with what it had."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.start()
        wait_until(lambda: is_healthy(port), timeout_seconds=120)

    def start(self) -> None:
        """Answers some seconds later, in which the training goes on."""
        options = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "files", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), *options]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self._process = subprocess.Popen(command, cwd=self._folder, env=environment, **quiet)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Training:
    """The command, whose words of all processes and tries stand in one log."""

    def __init__(self, arguments: list[str], output: Path, log: Path) -> None:
        self._arguments, self.output, self._log, self._noted = arguments, output, log, 0
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            command = [sys.executable, "-m", "mlenv", "train", *self._arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[int]:
        """Process ids of those that train."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"mlenv" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def wait_for_progress(self, steps: int) -> None:
        """Until so many steps more are in the journal; a restart takes some back first."""
        target = last_step(self.output) + steps
        wait_until(lambda: self.process.poll() is not None or last_step(self.output) >= target, timeout_seconds=400)
        assert self.process.poll() is None, self.said[-3000:]

    def note(self, text: str) -> None:
        """Writes a line of our own into the log."""
        with self._log.open("a") as log:
            log.write(text + "\n")
        self._noted = len(self.said)

    def wait_until_said(self, pattern: str) -> None:
        """Since the last note."""
        wait_until(lambda: re.search(pattern, self.said[self._noted :]) is not None, timeout_seconds=240)

    def kill_all(self) -> None:
        """The launcher and the processes that it started, which have sessions of their own."""
        for process in (self.process.pid, *self.ranks()):
            os.kill(process, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Any]:
    """On which the rows are read."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def server(tmp_path, port) -> Iterator[MlflowServer]:
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(tmp_path / "mlflow", port)
    yield server
    server.kill()


def ray_workers() -> list[int]:
    """Process ids of those of this test's cluster that run Ray tasks, or wait for one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::") and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
    return found


def ancestors(process: int) -> Iterator[int]:
    while process > 1:
        status = Path(f"/proc/{process}/status").read_text()
        process = int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])
        yield process


def test_twenty_failures_cost_no_bit_and_the_log_tells_of_each(demo_arguments, tmp_path, small_disk, cluster, server, port):
    undisturbed = subprocess.run(
        [sys.executable, "-m", "mlenv", "train", *demo_arguments(*SETTINGS, output="undisturbed")], capture_output=True, check=False
    )
    assert undisturbed.returncode == DONE, undisturbed.stderr.decode()

    disturbed = [*SETTINGS, "data.workers.kind=ray", "data.workers.num_workers=1", f"data.workers.address={cluster.address}"]
    disturbed += ["tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{port}"]
    output = small_disk / "run"
    training, random = Training(demo_arguments(*disturbed, output="small disk/run"), output, tmp_path / "log.txt"), Random(3)

    def kill_rank() -> None:
        wait_until(lambda: len(training.ranks()) == 2)
        os.kill(random.choice(training.ranks()), signal.SIGKILL)

    def kill_all() -> None:
        training.kill_all()
        training.start()

    def truncate_checkpoint() -> None:
        wait_until(lambda: len(list_checkpoints(output / "checkpoints")) > 1)
        training.kill_all()
        newest = list_checkpoints(output / "checkpoints")[-1]
        file = random.choice([file for file in newest.iterdir() if file.name.endswith(".safetensors")])
        os.truncate(file, file.stat().st_size - random.randint(1, file.stat().st_size))
        training.start()

    def kill_ray_worker() -> None:
        wait_until(lambda: bool(ray_workers()), timeout_seconds=60)
        for process in ray_workers():  # the one at work among them
            os.kill(process, signal.SIGKILL)

    def kill_server() -> None:
        server.kill()
        training.wait_for_progress(MOST_STEPS)
        server.start()

    def fill_disk() -> None:
        filler = fill(small_disk)
        training.wait_until_said(SAID["full disk"])
        filler.unlink()

    failures: dict[str, Callable[[], None]] = {
        "rank": kill_rank,
        "all": kill_all,
        "truncated checkpoint": truncate_checkpoint,
        "Ray worker": kill_ray_worker,
        "MLflow server": kill_server,
        "full disk": fill_disk,
    }
    order = [kind for kind, count in FAILURES.items() for _ in range(count)]
    random.shuffle(order)
    assert len(order) == 20
    try:
        for number, kind in enumerate(order):
            training.wait_for_progress(random.randint(1, MOST_STEPS))
            training.note(f"== failure {number + 1}, at step {last_step(output)}: {kind}")
            failures[kind]()
            if kind in ("rank", "truncated checkpoint"):
                training.wait_until_said(SAID[kind])
        assert training.process.wait(timeout=600) == DONE, training.said[-3000:]
    finally:
        if training.process.poll() is None:
            training.kill_all()

    assert_identical(tmp_path / "undisturbed", output)
    for kind, pattern in SAID.items():
        assert re.search(pattern, training.said), kind
    goes_on = len(re.findall(r"continues from \S.*, step \d+", training.said))
    assert goes_on >= FAILURES["rank"] + FAILURES["all"] + FAILURES["truncated checkpoint"]
    client = MlflowClient(f"http://127.0.0.1:{port}")
    (run,) = client.search_runs([client.get_experiment_by_name("mlenv").experiment_id])
    assert run.info.status == "FINISHED"
    tracked = {metric.step for metric in client.get_metric_history(run.info.run_id, "train/click/loss")}
    assert tracked == {line["step"] for line in Journal(output / "metrics.jsonl").read() if "train/click/loss" in line}
    assert json.loads((output / "metrics.json").read_text()) == json.loads((tmp_path / "undisturbed" / "metrics.json").read_text())
