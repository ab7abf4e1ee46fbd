"""MLflow tracking against a real SQLite file and a real server that comes and goes."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlenv.cli import main
from mlenv.errors import DONE, WRONG_INPUT, DataError, MlenvError
from mlenv.loops.journal import JOURNAL_FILE, Journal
from mlenv.records import tracking
from mlenv.records.tracking import MlflowTracker, run_tags, send_pending
from mlenv.server_conditions import mlflow_condition

# MLflow configures its SQLAlchemy models with an option that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder below the current folder, both with a space in the path."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.05)
    folder = tmp_path / "my work" / "run 1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        number: int = listener.getsockname()[1]
        return number


@pytest.fixture
def start_server(output: Path, port: int) -> Iterator[Callable[[], Callable[[], None]]]:
    """Starts ``mlflow server`` on the port, always with the same database; gives back what kills it."""
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        while running:
            process = running.pop()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start() -> Callable[[], None]:
        options = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "server files", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *options]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        running.append(
            subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        wait_until(lambda: is_healthy(port), timeout_seconds=90)
        return kill

    yield start
    kill()


def is_healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def make_tracker(output: Path, uri: str = "") -> MlflowTracker:
    return MlflowTracker(output, uri=uri, experiment="ads", run_name="baseline")


def local_client(output: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{output.parent}/mlflow.db")


def the_run(client: MlflowClient) -> Run:
    experiment = client.get_experiment_by_name("ads")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


def test_sqlite_by_default_holds_the_whole_run(output: Path) -> None:
    journal = Journal(output / JOURNAL_FILE)
    report = output / "report files"
    report.mkdir()
    (report / "index.html").write_text("<p>report</p>")
    (output / "config.yaml").write_text("name: baseline\n")
    tracker = make_tracker(output)
    assert tracker.run_id is None
    params = {f"data.feature[{index}].name": f"f{index}" for index in range(150)} | {"schema": "x" * 9_000, "empty": ""}
    tracker.start(params, {"git.revision": "abc"})
    tracker.log_artifact(output / "config.yaml")
    tracker.log_artifact(report, "report")
    for step in range(1, 301):
        journal.append(step, {f"train/click/metric_{index}": step / (index + 1) for index in range(10)})
    journal.append(
        300, {"validation/click/ndcg@10": 0.25, "validation/click/auc": math.nan, "validation/click/normalized_entropy": math.inf}
    )
    tracker.finish("FINISHED")

    client = local_client(output)
    run = the_run(client)
    assert run.info.run_id == tracker.run_id
    assert (run.info.run_name, run.info.status, tracker.url) == ("baseline", "FINISHED", None)
    assert run.info.start_time <= run.info.end_time
    assert len(run.data.params) == 152
    assert run.data.params["data.feature_7_.name"] == "f7"
    assert run.data.params["schema"] == "x" * 500
    assert run.data.tags["git.revision"] == "abc"
    assert history(client, run, "train/click/metric_2") == [(step, step / 3) for step in range(1, 301)]
    assert run.data.metrics["validation/click/ndcg_10"] == 0.25
    assert math.isnan(run.data.metrics["validation/click/auc"])
    assert run.data.metrics["validation/click/normalized_entropy"] > 1e308
    files = output.parent / "mlartifacts" / run.info.run_id / "artifacts"
    assert (files / "config.yaml").read_text() == "name: baseline\n"
    assert (files / "report" / "report files" / "index.html").read_text() == "<p>report</p>"


def test_a_resumed_run_is_the_same_run_and_no_step_is_sent_twice(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(output / JOURNAL_FILE)
    first = make_tracker(output)
    first.start({"loop.max_steps": "6"}, {"git.revision": "old"})
    for step in range(1, 7):
        journal.append(step, {"train/click/loss": 1 / step})
    first.finish("FAILED")

    # As after a kill between the creation of the run and the note of its name.
    record = json.loads((output / "tracking.json").read_text())
    (output / "tracking.json").write_text(json.dumps(record | {"run_id": ""}))
    monkeypatch.chdir(output)  # the folder knows where its run is
    journal.truncate(4)
    second = make_tracker(output)
    second.start({"loop.max_steps": "9", "seed": "0"}, {"git.revision": "new"})
    for step in range(5, 10):
        journal.append(step, {"train/click/loss": 1 / step})
    journal.append(9, {"test/click/auc": 0.75})
    second.finish("FINISHED")
    journal.append(9, {"test/click/auc": 0.75})  # the same command a third time evaluates again
    third = make_tracker(output)
    third.start({}, {})
    third.finish("FINISHED")

    client = local_client(output)
    run = the_run(client)
    assert run.info.run_id == first.run_id == second.run_id == third.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"loop.max_steps": "6", "seed": "0"}
    assert run.data.tags["git.revision"] == "new"
    assert history(client, run, "train/click/loss") == [(step, 1 / step) for step in range(1, 10)]
    assert history(client, run, "test/click/auc") == [(9, 0.75)]


def test_a_run_that_was_deleted_in_mlflow_is_sent_anew(output: Path) -> None:
    journal = Journal(output / JOURNAL_FILE)
    journal.append(1, {"train/click/loss": 0.5})
    first = make_tracker(output)
    first.start({}, {})
    first.finish("KILLED")
    client = local_client(output)
    client.delete_run(the_run(client).info.run_id)
    second = make_tracker(output)
    second.start({}, {})
    second.finish("FINISHED")
    run = the_run(client)
    assert run.info.run_id == second.run_id != first.run_id
    assert history(client, run, "train/click/loss") == [(1, 0.5)]


def test_a_dead_server_costs_no_time_and_one_warning(output: Path, port: int, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://user:secret@127.0.0.1:{port}"
    journal = Journal(output / JOURNAL_FILE)
    tracker = make_tracker(output, uri)
    began = time.monotonic()
    tracker.start({"seed": "0"}, {})
    assert time.monotonic() - began < 0.5
    wait_until(lambda: "does not take this run" in caplog.text)
    journal.append(1, {"train/click/loss": 0.5})
    time.sleep(0.5)
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 2
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"http://127.0.0.1:{port}" in warnings[0].getMessage()
    assert "secret" not in caplog.text + (output / "tracking.json").read_text()
    assert (tracker.run_id, tracker.url) == (None, None)
    with pytest.raises(MlenvError, match=rf"127\.0\.0\.1:{port}.*Fix: start the server"):
        send_pending(output)


def test_a_server_that_never_answers_holds_nobody(output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = make_tracker(output, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.start({}, {})
        began = time.monotonic()
        tracker.finish("FINISHED", timeout_seconds=0.3)
        assert time.monotonic() - began < 1
        assert "took too long" in caplog.text
    wait_until(lambda: "mlflow-tracker" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.slow
def test_a_server_that_comes_and_goes_gets_every_number_and_data_set_once(
    output: Path, port: int, start_server: Callable[[], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    journal = Journal(output / JOURNAL_FILE)
    (output / "config.yaml").write_text("name: baseline\n")
    parts = {"name": "log", "source_type": "local", "source": '{"uri": "/log"}', "schema": "", "profile": '{"num_rows": 3}'}
    inputs = [parts | {"context": name, "digest": f"digest of {name}"} for name in ("train", "validation", "test")]

    away = make_tracker(output)  # no server yet
    away.start({"seed": "0", "empty": ""}, {"git.revision": "abc"})
    away.log_inputs(inputs)
    away.log_artifact(output / "config.yaml", "configs")
    journal.append(1, {"train/click/loss": 0.5, "train/click/auc": math.nan, "train/click/worst": -math.inf})
    away.finish("KILLED")
    assert json.loads((output / "tracking.json").read_text())["inputs"] == inputs
    kill_server = start_server()
    send_pending(output)
    sent = json.loads((output / "tracking.json").read_text())
    assert sent["inputs"] == []
    # As after a kill between the answer of the server and the note of it.
    (output / "tracking.json").write_text(json.dumps(sent | {"inputs": inputs}))
    send_pending(output)
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    run = the_run(client)
    assert run.info.status == "KILLED"
    assert run.data.params == {"seed": "0", "empty": ""}
    assert math.isnan(run.data.metrics["train/click/auc"])
    assert run.data.metrics["train/click/worst"] < -1e308
    assert (client.list_artifacts(run.info.run_id, "configs")[0].path) == "configs/config.yaml"

    resumed = make_tracker(output)
    resumed.start({"seed": "0"}, {})
    resumed.log_inputs([*inputs[:2], parts | {"context": "test", "digest": "of other rows"}])
    journal.append(2, {"train/click/loss": 0.25})
    wait_until(lambda: history(client, run, "train/click/loss") == [(1, 0.5), (2, 0.25)])
    wait_until(lambda: the_run(client).info.status == "RUNNING")
    assert resumed.url == f"http://127.0.0.1:{port}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    kill_server()
    began = time.monotonic()
    for step in range(3, 103):
        journal.append(step, {"train/click/loss": 1 / step})
    assert time.monotonic() - began < 0.5
    resumed.finish("FINISHED", timeout_seconds=5)
    assert time.monotonic() - began < 6
    start_server()
    send_pending(output)
    send_pending(output)
    assert main(["runs", "send", str(output)]) == DONE
    assert mlflow_condition(os.environ["MLFLOW_TRACKING_URI"]).found == f"http://127.0.0.1:{port} answers"
    assert history(client, run, "train/click/loss") == [(1, 0.5), (2, 0.25), *((step, 1 / step) for step in range(3, 103))]
    run = the_run(client)
    assert run.info.status == "FINISHED"
    assert run.inputs is not None
    found = sorted((one.tags[0].key, one.tags[0].value, one.dataset.digest) for one in run.inputs.dataset_inputs)
    expected = [(one["context"], one["digest"]) for one in inputs] + [("test", "of other rows")]
    assert found == sorted(("mlflow.data.context", *pair) for pair in expected)
    first = run.inputs.dataset_inputs[0].dataset
    assert (first.name, first.source_type, first.source, first.profile) == ("log", "local", '{"uri": "/log"}', '{"num_rows": 3}')


@pytest.mark.slow
def test_a_run_killed_while_it_sends_continues(output: Path) -> None:
    training = """
import itertools, sys, time
from pathlib import Path
from mlenv.records import tracking
from mlenv.loops.journal import Journal
tracking._POLL_SECONDS = 0.02
tracker = tracking.MlflowTracker(Path(sys.argv[1]), uri="", experiment="ads", run_name="baseline")
tracker.start({}, {})
journal = Journal(Path(sys.argv[1]) / "metrics.jsonl")
for step in itertools.count(1):
    journal.append(step, {"train/click/loss": 1 / step})
    time.sleep(0.002)
    if step == 100:
        while tracker.run_id is None:
            time.sleep(0.01)
    if step == 400:
        print("now", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", training, str(output)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.kill()
    journal = Journal(output / JOURNAL_FILE)
    journal.truncate(200)
    tracker = make_tracker(output)
    tracker.start({}, {})
    for step in range(201, 501):
        journal.append(step, {"train/click/loss": 1 / step})
    tracker.finish("FINISHED")
    client = local_client(output)
    assert history(client, the_run(client), "train/click/loss") == [(step, 1 / step) for step in range(1, 501)]


def test_one_file_that_cannot_be_sent_stops_no_other(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    (output / "report.html").write_text("report")
    (output / "pipe").mkdir()
    (output / "pipe" / "closed").symlink_to(output / "nowhere")
    tracker = make_tracker(output)
    tracker.log_artifact(output / "pipe")
    tracker.log_artifact(output / "gone.txt")
    tracker.log_artifact(output / "report.html")
    tracker.start({}, {})
    wait_until(lambda: "does not take this run" in caplog.text)
    tracker.finish("FINISHED")
    client = local_client(output)
    assert "gone.txt: no longer there" in caplog.text
    assert json.loads((output / "tracking.json").read_text())["artifacts"] == [["pipe", ""]]
    assert "report.html" in [file.path for file in client.list_artifacts(the_run(client).info.run_id)]
    assert the_run(client).info.status == "FINISHED"
    (output / "pipe" / "closed").unlink()
    (output / "pipe" / "closed").write_text("open")
    send_pending(output)
    assert [file.path for file in client.list_artifacts(the_run(client).info.run_id, "pipe")] == ["pipe/closed"]


def test_a_damaged_record_begins_a_new_run(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    (output / "tracking.json").write_text('{"uri": "sqli')
    with pytest.raises(DataError, match=r"tracking\.json: expected what the tracker wrote"):
        send_pending(output)
    tracker = make_tracker(output)
    assert "A new MLflow run begins" in caplog.text
    tracker.start({}, {})
    tracker.finish("FINISHED")
    assert tracker.run_id == the_run(local_client(output)).info.run_id


def test_the_command_sends_what_is_pending(
    output: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Journal(output / JOURNAL_FILE).append(1, {"train/click/loss": 0.5})
    make_tracker(output).log_artifact(output / JOURNAL_FILE)  # the record is there, and nobody has sent anything
    assert main(["runs", "send", str(output), "--dry-run"]) == DONE
    assert not (output.parent / "mlflow.db").exists()
    assert main(["runs", "send", str(output)]) == DONE
    run = the_run(local_client(output))
    assert history(local_client(output), run, "train/click/loss") == [(1, 0.5)]
    printed = capsys.readouterr().out.splitlines()
    place = f"MLflow at sqlite:///{output.parent}/mlflow.db"
    assert printed == [f"would send what {place} has not got of {output}", f"{place} has all of run {run.info.run_id}"]


def test_sending_from_a_folder_without_a_run_is_an_error(output: Path) -> None:
    assert main(["runs", "send", str(output), "--dry-run"]) == WRONG_INPUT
    with pytest.raises(DataError, match=r"run 1: expected the output folder of a tracked run"):
        send_pending(output)


def test_the_terminal_stays_clean(output: Path) -> None:
    training = """
import sys
from pathlib import Path
from mlenv.records.tracking import MlflowTracker
tracker = MlflowTracker(Path(sys.argv[1]), uri="", experiment="ads", run_name="baseline")
assert not {"mlflow", "torch"} & set(sys.modules)
tracker.start({"seed": "0"}, {})
tracker.finish("FINISHED")
assert tracker.run_id
"""
    command = [sys.executable, "-c", training, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_tags_name_the_revision_and_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git.revision" not in run_tags()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    (tmp_path / "model.py").write_text("one")
    for command in (["init", "-q"], ["add", "model.py"], ["commit", "-q", "-m", "first"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    tags = run_tags()
    assert tags["git.revision"] == revision
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"version.torch", "version.mlflow", "version.pyarrow", "version.lightning"} <= tags.keys()
    (tmp_path / "model.py").write_text("two")
    assert run_tags()["git.revision"] == f"{revision}-dirty"
