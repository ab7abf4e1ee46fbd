"""From two trainings to a champion and back, on a real MLflow server over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient

from mlenv import compose, promotion, train
from mlenv.cli import main
from mlenv.errors import DONE, GATE, WRONG_INPUT, ConfigError
from mlenv.paired_scoring import check_row_key
from mlenv.promotion import PAGE, VERDICT
from mlenv.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from mlenv.schema import Schema
from tests.test_tracking import is_healthy, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")

LENIENT = {"limits": {}, "calibration": 9, "segment_calibration": 9, "resamples": 50, "data_checks": False, "latency_ratio": None}
"""Gates that a model of a few steps passes; how long it takes says nothing on a busy machine."""


class Server:
    """``mlflow server`` with a database of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "server files", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), *options]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, stdout=quiet, stderr=quiet)
        wait_until(lambda: is_healthy(self.port), timeout_seconds=90)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def work(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A folder with two trainings that a server tracks: a weak one, and a better one that began with it."""
    folder = tmp_path_factory.mktemp("models of a test")
    server = Server(folder)
    server.start()
    (folder / "gates.yaml").write_text(yaml.safe_dump(LENIENT))
    (folder / "config.yaml").write_text(tiny_config)
    settings = [f"tracking.uri={server.uri}", "schema.request=request_id", "schema.segments=[device]", "job.image=ranker:1"]
    settings += [
        "loop.checkpoint_every_steps=100",
        "embeddings.learning_rate=0.1",
        "schema.features.user_country={kind: categorical, storage: string}",
    ]
    settings += ["schema.tables.user_country={num_embeddings: 20, embedding_dim: 4, ids: hash}", "data.train.end=2026-01-02"]
    for name, own in (
        ("weak", ["loop.max_steps=2"]),
        ("better", ["loop.max_steps=0", "data.num_epochs=6", "optimizer.learning_rate=0.01", f"warm_start.checkpoint={folder / 'weak'}"]),
    ):
        train(compose(folder / "config.yaml", [*settings, *own, f"name={name}", f"output={folder / name}"]))
    yield folder, server
    server.stop()


@pytest.fixture
def run(work: tuple[Path, Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command in the folder; gives back its exit code and what it said."""
    monkeypatch.chdir(work[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", work[1].uri)

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


Run = Callable[..., tuple[int, str]]


@pytest.mark.slow
def test_the_whole_story(work: tuple[Path, Server], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, server = work
    assert run("models") == (DONE, f"no registered model in MLflow at {server.uri}; mlenv register OUTPUT --name NAME makes one\n")
    assert run("promote", "ranker")[0] == WRONG_INPUT
    assert run("register", "weak", "--name", "ranker") == (DONE, "ranker version 1 (@challenger)\n")
    assert run("register", "weak", "--name", "ranker") == (DONE, "ranker version 1 (@challenger), which was registered before\n")
    registry = Registry(server.uri)
    tags = registry.version("ranker", "1").tags
    metrics = json.loads((folder / "weak" / "metrics.json").read_text())
    assert float(tags["test/click/auc"]) == pytest.approx(metrics["click/auc"], rel=1e-5)
    assert (tags["image"], tags["name"], tags["step"], tags["train window"]) == ("ranker:1", "weak", "2", "earliest to 2026-01-02")

    # Two steps make no model: by its own gates it is held, and the history says so.
    code, said = run("promote", "ranker", "--out", "first")
    assert code == GATE
    assert "HELD  calibration  click/calibration" in said
    assert (folder / "first" / PAGE).read_text().count("held") > 2
    assert registry.model("ranker").aliases == {CHALLENGER: "1"}
    assert run("promote", "ranker", "--force")[0] == WRONG_INPUT
    assert run("promote", "ranker", "--force", "--reason", "something has to be served")[0] == DONE
    assert registry.model("ranker").aliases == {CHAMPION: "1"}
    assert run("promote", "ranker", "--version", "1")[0] == WRONG_INPUT

    assert run("register", "better", "--name", "ranker") == (DONE, "ranker version 2 (@challenger)\n")
    tags = registry.version("ranker", "2").tags
    assert (tags["warm start"], tags["warm start version"]) == (str(folder / "weak"), "models:/ranker/1")
    assert run("promote", "ranker", "--gates", "gates.yaml", "--trial", "--out", "trial")[0] == DONE
    assert registry.model("ranker").aliases == {CHAMPION: "1", CHALLENGER: "2"}
    # Somebody else's promotion ends while this one scores.
    measure_costs = promotion.measure_costs

    def meanwhile(*arguments: object) -> object:
        registry.client.set_registered_model_alias("ranker", CHALLENGER, "1")
        return measure_costs(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "measure_costs", meanwhile)
        code, said = run("promote", "ranker", "--gates", "gates.yaml")
    assert code == WRONG_INPUT
    assert "ranker@challenger: expected version 2, as it was when the gates ran. Received: 'version 1'" in said
    assert registry.model("ranker").aliases == {CHAMPION: "1", CHALLENGER: "1"}
    assert run("register", "better", "--name", "ranker")[1] == "ranker version 2 (@challenger), which was registered before\n"

    code, said = run("promote", "ranker", "--gates", "gates.yaml", "--out", "second")
    assert code == DONE
    assert "champion ranker version 2" in said
    assert registry.model("ranker").aliases == {CHAMPION: "2", PREVIOUS: "1"}
    verdict = json.loads((folder / "second" / VERDICT).read_text())
    assert (verdict["verdict"], verdict["decision"], verdict["champion"]) == ("pass", "promoted", "ranker version 1 (@champion)")
    assert {one["gate"] for one in verdict["judgements"]} == {"calibration", "regression", "gain", "cost", "missing features"}
    # The same figures as the trainings measured on the same rows.
    better = json.loads((folder / "better" / "metrics.json").read_text())
    (auc,) = (one["detail"] for one in verdict["judgements"] if (one["gate"], one["subject"]) == ("regression", "click/auc"))
    after, before = (float(auc.split()[place].rstrip(":")) for place in (0, 3))
    assert (after, before) == pytest.approx((better["click/auc"], metrics["click/auc"]), abs=5e-4)
    report = registry.model("ranker").moves[-1].report
    run_id, _, place = report.removeprefix("runs:/").partition("/")
    held = {Path(file.path).name for file in registry.client.list_artifacts(run_id, place)}
    assert held == {PAGE, VERDICT}

    assert run("promote", "ranker", "--version", "1", "--gates", "gates.yaml")[0] == GATE
    code, said = run("rollback", "ranker", "--reason", "it was slow")
    assert (code, said) == (DONE, "champion ranker version 1, instead of version 2\n")
    assert registry.model("ranker").aliases == {CHAMPION: "1"}
    assert run("rollback", "ranker")[0] == WRONG_INPUT
    moves = [(move.kind, move.version, move.before) for move in registry.model("ranker").moves]
    assert moves == [
        ("held", "1", ""),
        ("forced", "1", ""),
        ("promoted", "2", "1"),
        ("held", "1", "2"),
        ("rolled back", "1", "2"),
    ]
    code, said = run("models", "ranker")
    assert code == DONE
    assert "version 2  better" in said
    assert "rolled back instead of version 2 by" in said
    assert said.rstrip().endswith(": it was slow")
    assert "ranker: champion 1; 5. " in run("models")[1]

    server.stop()
    code, said = run("promote", "ranker", "--version", "2", "--gates", "gates.yaml")
    assert code == WRONG_INPUT
    assert f"MLflow at {server.uri}" in said
    assert "Fix: start the server" in said
    server.start()
    assert Registry(server.uri).model("ranker").aliases == {CHAMPION: "1"}


def test_rows_that_cannot_be_joined_leave_the_champion(work: tuple[Path, Server], run: Run, ads: Path) -> None:
    folder, server = work
    client = MlflowClient(server.uri)
    run("register", "weak", "--name", "joined")
    client.set_registered_model_alias("joined", CHAMPION, "1")
    run("register", "better", "--name", "joined")
    shutil.copytree(ads, folder / "keyless")
    shutil.copytree(ads, folder / "twice")
    for file in sorted((folder / "keyless").rglob("*.parquet")):
        pq.write_table(pq.read_table(file, partitioning=None).drop_columns("impression_id"), file)
    for file in sorted((folder / "twice").rglob("*.parquet")):
        shutil.copy(file, file.with_name(f"again-{file.name}"))
    for path, message in (("keyless", "impression_id"), ("twice", "expected each once in the rows to compare on")):
        code, said = run("promote", "joined", "--data", "config.yaml", f"data.path={folder / path}", "--gates", "gates.yaml")
        assert (code, message in said) == (WRONG_INPUT, True), said
    assert run("promote", "joined", "data.path=elsewhere")[0] == WRONG_INPUT
    assert run("promote", "joined", "--version", "7")[0] == WRONG_INPUT
    assert Registry(server.uri).model("joined").aliases == {CHAMPION: "1", CHALLENGER: "2"}
    assert Registry(server.uri).model("joined").moves == []
    with pytest.raises(ConfigError, match=r"ranker version 1, schema\.row_key: expected columns that identify a row"):
        check_row_key(
            Schema(
                features=compose("config.yaml").schema.features,
                tables=compose("config.yaml").schema.tables,
                labels=compose("config.yaml").schema.labels,
            ),
            "ranker version 1",
        )


def test_only_a_training_that_mlflow_has_whole_is_registered(work: tuple[Path, Server], run: Run) -> None:
    folder, _ = work
    shutil.copytree(folder / "weak", folder / "changed")
    record = json.loads((folder / "changed" / "tracking.json").read_text())
    for change, message in (
        ({"status": "RUNNING"}, "expected a training that has ended"),
        ({"artifacts": [["report.html", ""]]}, "1 files not sent yet"),
        ({"run_id": ""}, "a run that MLflow has not got"),
        ({"run_id": "0" * 32}, "the run of this training of MLflow"),
    ):
        (folder / "changed" / "tracking.json").write_text(json.dumps(record | change))
        code, said = run("register", "changed", "--name", "never")
        assert (code, message in said) == (WRONG_INPUT, True), said
    (folder / "changed" / "tracking.json").write_text(json.dumps(record))
    (checkpoint,) = (folder / "changed" / "checkpoints").iterdir()
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "as it is in" in run("register", "changed", "--name", "never")[1]
    (folder / "changed" / "tracking.json").unlink()
    assert run("register", "changed", "--name", "never")[0] == WRONG_INPUT
    assert "never" not in Registry(work[1].uri).models()
