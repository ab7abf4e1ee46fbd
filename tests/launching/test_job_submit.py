"""A training that is submitted to a Ray cluster of its own: head, dashboard and job server, as ``ray start --head`` starts them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from mlenv.condition import Condition
from mlenv.errors import DONE, FAILED, WRONG_INPUT
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.server_conditions import ray_condition

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a cluster that asks for a token, and the environment of those who have it."""
    pytest.importorskip("ray.dashboard.optional_deps", reason="the job server needs ray[default]")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text(secrets.token_hex(32))
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, dashboard = first.getsockname()[1], second.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--object-store-memory=100000000", "--disable-usage-stats"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env = os.environ | token | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # the job finds mlenv
    head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(url, head)
        yield url, env
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # an orderly end of a cluster takes half a minute
        head.wait()


def wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert head.poll() is None
        try:
            requests.get(f"{url}/api/version", timeout=5)
        except requests.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)


def test_a_training_is_submitted_and_its_end_is_told(cluster, demo_arguments, tmp_path):
    address, env = cluster
    assert ray_condition(address) == Condition("Ray", "pass", f"{address} answers, and asks for a token")
    file, *settings = demo_arguments("launch=ray", "loop.max_steps=3", "job.env={MLFLOW_NOTE: here}")
    (tmp_path / "repo").mkdir()
    for source in Path(file).parent.glob("*.yaml"):
        (tmp_path / "repo" / source.name).write_text(source.read_text())

    def submit(env: dict[str, str], *settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlenv", "job", "submit", "ranker.yaml", "--address", address, "--follow", *settings]
        return subprocess.run(command, cwd=tmp_path / "repo", env=env, capture_output=True, text=True, check=False)

    process = submit(env, *settings)
    assert process.returncode == DONE, process.stdout + process.stderr
    assert process.stdout.startswith("raysubmit_")
    assert "trained 3 steps" in process.stdout
    assert [path.name for path in list_checkpoints(tmp_path / "run of a test" / "checkpoints")] == ["step-00000003"]
    process = submit(env, *settings, "data.train.end=2025-01-01")
    assert process.returncode == FAILED
    assert "expected Parquet files in" in process.stdout
    process = submit({**env, "RAY_AUTH_MODE": "disabled"}, *settings)
    assert process.returncode == WRONG_INPUT
    assert "Authentication required" in process.stderr
