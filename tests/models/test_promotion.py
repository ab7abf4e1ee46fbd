"""From two trainings to a champion and back, on a real MLflow server over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from numpy.typing import NDArray
from scipy.optimize import brentq

from mlenv import compose, train
from mlenv.cli import main
from mlenv.config import WindowConfig
from mlenv.errors import DONE, GATE, WRONG_INPUT, ConfigError
from mlenv.inference.stored_model import find_checkpoint, fingerprint_of
from mlenv.inference.stored_scorer import HeldOut, open_scorer
from mlenv.insight.model_card import PAGE as CARD_PAGE
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_to_json
from mlenv.loops.checkpoint import add_document
from mlenv.models import promotion
from mlenv.models.bootstrap import Floats
from mlenv.models.paired_scoring import check_row_key
from mlenv.models.promotion import PAGE, VERDICT
from mlenv.models.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from mlenv.modules import AffineCalibrator, SegmentCalibrator
from mlenv.records.tracking import tracked_run
from mlenv.schema import Schema
from mlenv.serving.graph import ServedGraph
from mlenv.serving.package import open_package
from mlenv.serving.predictor import Predictor
from tests.records.test_tracking import is_healthy, wait_until

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
    assert run("rollback", "ranker")[0] == WRONG_INPUT
    assert run("export", "models:/ranker@champion", "--out", "package")[0] == WRONG_INPUT
    server.start()
    assert Registry(server.uri).model("ranker").aliases == {CHAMPION: "1"}


class Injector:
    """Puts a trained model into the registry with a calibrator in it that makes it worse in a way that is known, or puts it right."""

    def __init__(self, folder: Path, server: Server, rows: Path) -> None:
        self._folder, self._registry, self._rows = folder, Registry(server.uri), rows
        self._registry.client.create_registered_model("injected")

    def calibrated(self, output: str, calibration: float) -> str:
        """The version whose predictions are so many times as large as the labels, in the order in which they were."""
        logits, labels, _ = self._scored(output)
        return self._version(output, Calibrator("platt", AffineCalibrator(1.0, offset_for(logits, labels, calibration)), {}))

    def upside_down(self, output: str, device: str) -> str:
        """The version that has the order of the rows of one device upside down, if weakly, and predicts as much as there is, on each."""
        logits, labels, devices = self._scored(output)
        there = devices == device
        offset, turned = (offset_for(sign * logits[rows], labels[rows], 1.0) for sign, rows in ((1, ~there), (-0.2, there)))
        calibrator = SegmentCalibrator(1.0, offset, scales=[[0.0, -1.2]], offsets=[[0.0, turned - offset]])
        return self._version(output, Calibrator("logistic", calibrator, {"device": (device,)}))

    def _scored(self, output: str) -> tuple[Floats, Floats, NDArray[np.str_]]:
        scorer = open_scorer(str(self._folder / output))
        with closing(scorer.source(HeldOut(path=str(self._rows), window=WindowConfig()))) as source:
            parts = [(scorer(batch), batch.labels, batch.metadata.column("device").to_pylist()) for batch in source.batches()]
        predictions, labels, devices = zip(*parts, strict=True)
        logits = torch.cat(predictions)[:, 0].double().logit().numpy()
        return logits, torch.cat(labels)[:, 0].double().numpy(), np.concatenate(devices)

    def _version(self, output: str, calibrator: Calibrator) -> str:
        client, run_id = self._registry.client, tracked_run(self._folder / output).run_id
        with tempfile.TemporaryDirectory() as copy:
            checkpoint = shutil.copytree(find_checkpoint(str(self._folder / output), "", "MODEL"), Path(copy, "checkpoint"))
            add_document(checkpoint, CALIBRATORS_FILE, calibrators_to_json({"click": calibrator}))
            place = f"model/{fingerprint_of(checkpoint)}"
            client.log_artifacts(run_id, str(checkpoint), place)
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        return str(client.create_model_version("injected", source, run_id=run_id).version)

    def make_champion(self, version: str) -> None:
        self._registry.client.set_registered_model_alias("injected", CHAMPION, version)

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._registry.model("injected").aliases


def offset_for(logits: Floats, labels: Floats, calibration: float) -> float:
    return float(brentq(lambda offset: (1 / (1 + np.exp(-logits - offset))).sum() / labels.sum() - calibration, -9, 9))


@pytest.mark.slow
def test_injected_regressions_are_held(work: tuple[Path, Server], run: Run, ads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, server = work
    injector = Injector(folder, server, ads)
    injector.make_champion(injector.calibrated("weak", 1.0))
    gates = LENIENT | {"calibration": 0.05, "segment_calibration": 0.2, "resamples": 200, "missing_rows": 0}
    (folder / "strict.yaml").write_text(yaml.safe_dump(gates))
    (folder / "exported.yaml").write_text(yaml.safe_dump(gates | {"export": "program", "size_bytes": 1_000_000}))

    def failures(version: str, gates: str = "strict.yaml") -> tuple[int, dict[tuple[str, str], str]]:
        rows = ("--data", "config.yaml", "data.test.start=2026-01-01", "data.train={start: 2025-12-31, end: 2025-12-31}")
        code, said = run("promote", "injected", "--version", version, "--gates", gates, "--out", "injected", *rows)
        assert code in (DONE, GATE), said
        judged = json.loads((folder / "injected" / VERDICT).read_text())["judgements"]
        gains = [one["is_passed"] for one in judged if one["gate"] == "gain"]
        assert gains == [True]  # over all rows the order is better than the champion's in every case
        return code, {(one["gate"], one["subject"]): one["detail"] for one in judged if not one["is_passed"]}

    code, held = failures(injector.calibrated("better", 1.2))
    assert code == GATE
    assert {("calibration", "click/calibration"), ("regression", "click/calibration")} <= set(held)
    assert held["calibration", "click/calibration"].startswith("1.200, ")
    assert not {subject for _, subject in held if "auc" in subject}

    code, held = failures(injector.upside_down("better", "desktop"))
    assert code == GATE
    assert ("regression", "click/auc@device=desktop") in held
    assert all(subject.endswith("@device=desktop") for _, subject in held), held
    assert injector.aliases == {CHAMPION: "1"}

    # A good one, whose package says something else.
    monkeypatch.setattr("mlenv.serving.parity.REPEATS", 1)
    good, forward = injector.calibrated("better", 1.0), ServedGraph.forward

    def other(graph: ServedGraph, ids: Any, lengths: Any, weights: Any, dense: Any, codes: Any) -> Any:
        return 0.999 * forward(graph, ids, lengths, weights, dense, codes)

    with monkeypatch.context() as patch:
        patch.setattr(ServedGraph, "forward", other)
        code, held = failures(good, "exported.yaml")
    assert (code, [*held]) == (GATE, [("export", f"injected version {good} to program")])
    assert "a prediction differs by" in held["export", f"injected version {good} to program"]
    assert injector.aliases == {CHAMPION: "1"}

    code, held = failures(good, "exported.yaml")
    assert (code, held) == (DONE, {})
    assert injector.aliases == {CHAMPION: good, PREVIOUS: "1"}
    judged = json.loads((folder / "injected" / VERDICT).read_text())["judgements"]
    assert [one["subject"] for one in judged if one["gate"] == "cost"] == [
        "milliseconds for 1,000 rows, exported to program",
        "bytes, exported to program",
    ]
    assert [one["detail"].split(" on ")[1] for one in judged if one["gate"] == "export"] == ["6,000 rows, may be 1e-05"] * 2


@pytest.mark.slow
def test_mlflow_serves_a_package_of_the_run_and_answers_over_http(work: tuple[Path, Server], run: Run, ads: Path) -> None:
    folder, server = work
    code, said = run("export", "better", "--out", "package", "--format", "program", "--log-to-run")
    assert code == DONE, said
    address = f"runs:/{tracked_run(folder / 'better').run_id}/package"
    assert f"MLflow   {address}" in said
    code, said = run("export", "models:/nobody/1", "--out", "nothing")
    assert (code, (folder / "nothing").exists()) == (WRONG_INPUT, False)
    assert "MODEL: expected a model that MLflow keeps. Received: 'models:/nobody/1'" in said

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local", "--port", str(port)]
    (folder / "bin").mkdir()
    (folder / "bin" / "uvicorn").write_text(f"#!/bin/sh\nexec '{sys.executable}' -m uvicorn \"$@\"\n")  # MLflow looks for it on the path
    (folder / "bin" / "uvicorn").chmod(0o755)
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd="/", env=environment, start_new_session=True, stdout=quiet, stderr=quiet)
    try:
        wait_until(lambda: is_healthy(port), timeout_seconds=90)
        package = open_package(folder / "package")
        rows = pq.read_table(ads / "date=2026-01-03", columns=package.columns.names, partitioning=None).slice(0, 50).to_pylist()
        rows = [row for row in rows if None not in row.values()]
        status, answer = invoke(port, rows)
        assert status == 200
        expected = Predictor(package).predict_rows(rows)[:, 0]
        assert [one["click"] for one in answer["predictions"]] == pytest.approx(expected.tolist(), abs=1e-6)
        status, answer = invoke(port, [{**rows[0], "price": "dear"}])
        assert (status, "price" in answer["message"]) == (400, True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def invoke(port: int, rows: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("POST", "/invocations", json.dumps({"dataframe_records": rows}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_the_card_of_a_version_says_where_it_comes_from(work: tuple[Path, Server], run: Run) -> None:
    folder, server = work
    run("register", "weak", "--name", "ranker")
    run("register", "better", "--name", "ranker")
    version = Registry(server.uri).version("ranker", "2")
    code, said = run("card", "models:/ranker/2", "--out", "card", "--rows", "100", "--repeats", "2", "--log-to-run")
    assert code == DONE, said
    assert f"MLflow   runs:/{version.run_id}/model card" in said
    text = (folder / "card" / CARD_PAGE).read_text()
    for part in ("ranker version 2", version.run_id, "models:/ranker/1", "ranker:1", version.tags["train window"]):
        assert part in text, part
    kept = {file.path for file in Registry(server.uri).client.list_artifacts(version.run_id, "model card")}
    assert kept == {"model card/model_card.html", "model card/model_card.json"}
    assert run("card", "better", "--out", "again", "--rows", "100", "--repeats", "2")[0] == DONE
    assert "ranker version 2" in (folder / "again" / CARD_PAGE).read_text()
    assert "expected a model that MLflow keeps" in run("card", "models:/ranker/9", "--out", "never")[1]


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
