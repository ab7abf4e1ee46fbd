"""One training by two processes, hit by twenty failures at random moments, against the same training left alone.

``make long`` runs it: it takes minutes, most of them for processes that start again. ``CHAOS_SEED=7 make long`` has other moments.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from mlenv.errors import DONE
from mlenv.loops.checkpoint import checkpoint_name, list_checkpoints
from mlenv.loops.journal import Journal
from tests.records.test_tracking import is_healthy, port, wait_until
from tests.test_experiment import assert_identical
from tests.test_failures import fill, last_step, small_disk

__all__ = ["port", "small_disk"]  # fixtures
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")]

SEED = int(os.environ.get("CHAOS_SEED", "3"))
FAILURES = {"rank": 5, "all": 3, "truncated checkpoint": 3, "Ray worker": 4, "MLflow server": 3, "full disk": 2}
GOES_ON = r"continues from \S.*, step \d+"
SAID = {
    "rank": rf"rank \d ended with exit code -9; all start again(?s:.*){GOES_ON}",
    "all": GOES_ON,
    "truncated checkpoint": rf"step-\d+/\S+: expected \d+ bytes\. .* The checkpoint before it is used\.(?s:.*){GOES_ON}",
    "Ray worker": r"data\.workers: \w+; its rows are read again",
    "MLflow server": r"MLflow at http://\S+ does not take this run (?s:.*)MLflow at http://\S+ takes this run again",
    "full disk": r"step \d+: the checkpoint cannot be written \(.*No space left on device",
}
"""What the log tells after each failure of a kind, before the next one."""
MOST_STEPS = 10
"""Between two failures."""
SETTINGS = [
    *("data.num_epochs=40", "data.batch_size=64", "data.shuffle_rows=512", "embeddings.engine=torchrec", "embeddings.sharding=table_wise"),
    *("loop.log_every_steps=1", "loop.checkpoint_every_steps=5", "loop.keep_checkpoints=3"),
    *("launch.num_processes=2", "launch.max_restarts=100"),
    "data.transforms=[{kind: python, function: 'pace:wait', reads: [price], writes: [price]}]",
]
PACE = """
import pathlib
import time


def wait(rows):
    if rows.num_rows and pathlib.Path({flag!r}).exists():
        time.sleep(0.25)
    return rows
"""
"""Holds up every row group while there are failures to come: few steps see all of them, though the processes take seconds to start."""


class MlflowServer:
    """A real one that can be killed and come back with what it had."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.start()

    def start(self) -> None:
        """Answers some seconds later."""
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
        self._begun = time.monotonic()
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            command = [sys.executable, "-m", "mlenv", "train", *self._arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self._log.parent)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[int]:
        """Process ids of those that train."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"mlenv" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """While the training goes on."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, f"the training ended before {what}:\n{self.said[-3000:]}"
            assert time.monotonic() < deadline, f"waited too long for {what}:\n{self.said[-3000:]}"
            time.sleep(0.02)

    def wait_for_progress(self, steps: int) -> None:
        """Until so many steps more are in the journal; a restart takes some back first."""
        target = last_step(self.output) + steps
        self.wait_until(lambda: last_step(self.output) >= target, f"step {target}")

    def note(self, text: str) -> None:
        """Writes a line of our own into the log."""
        with self._log.open("a") as log:
            log.write(f"== {time.monotonic() - self._begun:.0f} s, step {last_step(self.output)}: {text}\n")
        self._noted = len(self.said)

    def wait_until_said(self, pattern: str) -> None:
        """Since the last note."""
        self.wait_until(lambda: re.search(pattern, self.said[self._noted :]) is not None, repr(pattern))

    def kill_all(self) -> None:
        """The launcher and the processes that it started, which have sessions of their own."""
        for process in (self.process.pid, *self.ranks()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def log(ads, tmp_path_factory) -> Path:
    """The small log in row groups of a batch."""
    folder = tmp_path_factory.mktemp("log of a test")
    for file in sorted(ads.rglob("*.parquet")):
        (folder / file.parent.name).mkdir()
        pq.write_table(pq.read_table(file, partitioning=None), folder / file.parent.name / file.name, row_group_size=64)
    return folder


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
    """Process ids of those of this test's cluster that read rows at this moment. The cluster's agents have a title of Ray's too,
    and one that is killed takes the whole node along."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_apply") and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
    return found


def ancestors(process: int) -> Iterator[int]:
    while process > 1:
        status = Path(f"/proc/{process}/status").read_text()
        process = int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])
        yield process


def test_twenty_failures_cost_no_bit_and_the_log_tells_of_each(demo_arguments, log, tmp_path, small_disk, cluster, server, port):
    flag = tmp_path / "hold up"
    (tmp_path / "pace.py").write_text(PACE.format(flag=str(flag)))
    settings = [*SETTINGS, f"data.path={log}"]
    command = [sys.executable, "-m", "mlenv", "train", *demo_arguments(*settings, output="undisturbed")]
    undisturbed = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert undisturbed.returncode == DONE, undisturbed.stderr.decode()
    wait_until(lambda: is_healthy(port), timeout_seconds=120)

    disturbed = [*settings, "data.workers.kind=ray", "data.workers.num_workers=1", f"data.workers.address={cluster.address}"]
    disturbed += ["tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{port}"]
    output, random = small_disk / "run", Random(SEED)
    training = Training(demo_arguments(*disturbed, output="small disk/run"), output, tmp_path / "log.txt")
    training.wait_for_progress(1)  # what is read before it, for the normalization, need not be held up
    flag.touch()

    def checkpoints() -> list[Path]:
        return list_checkpoints(output / "checkpoints")

    def kill_rank() -> None:
        os.kill(random.choice(training.ranks()), signal.SIGKILL)

    def kill_all() -> None:
        training.kill_all()
        training.start()

    def truncate_checkpoint() -> None:
        step = last_step(output)
        training.wait_until(lambda: len(checkpoints()) > 1 and checkpoints()[-1].name >= checkpoint_name(step), "a new checkpoint")
        training.kill_all()
        newest = checkpoints()[-1]
        file = random.choice(sorted(newest.glob("*.safetensors")))
        os.truncate(file, random.randrange(file.stat().st_size))
        training.start()
        training.wait_until_said(f"{newest.name}/{file.name}: expected ")

    def kill_ray_worker() -> None:
        def is_killed() -> bool:
            workers = ray_workers()
            if workers:
                os.kill(random.choice(workers), signal.SIGKILL)
            return bool(workers)

        training.wait_until(is_killed, "a Ray worker that reads rows")

    def kill_server() -> None:
        server.kill()
        training.wait_until_said("does not take this run")
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
            time.sleep(random.uniform(0, 0.1))  # anywhere in a step, or in the writing of a checkpoint
            training.note(f"failure {number + 1}, {kind}")
            failures[kind]()
            training.wait_until_said(SAID[kind])
        training.wait_for_progress(1)
        training.note("no more failures")
        flag.unlink()
        assert training.process.wait(timeout=300) == DONE, training.said[-3000:]
        training.note("done")
    finally:
        if training.process.poll() is None:
            training.kill_all()

    assert_identical(tmp_path / "undisturbed", output)
    client = MlflowClient(f"http://127.0.0.1:{port}")
    (run,) = client.search_runs([client.get_experiment_by_name("mlenv").experiment_id])
    assert run.info.status == "FINISHED"
    tracked = {metric.step for metric in client.get_metric_history(run.info.run_id, "train/click/loss")}
    assert tracked == {line["step"] for line in Journal(output / "metrics.jsonl").read() if "train/click/loss" in line}
