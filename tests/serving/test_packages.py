"""A package from end to end: exported, compared, opened, served over HTTP, logged, read by MLflow."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.errors import CheckpointError, ConfigError, GateError
from mlenv.serving.columns import RowsError
from mlenv.serving.export import ExportOptions, check_export, export
from mlenv.serving.package import open_package
from mlenv.serving.predictor import Predictor
from mlenv.serving.server import ServerOptions, make_app
from mlenv.training import train

pytestmark = pytest.mark.slow  # for a package of two formats, compared on every row, and a server

CONFIG = """
name: served
output: served
schema:
  row_key: [impression_id]
  segments: [placement]
  labels: {click: {}, conversion: {mask: click}}
  features:
    item_id: {kind: categorical}
    user_country: {kind: categorical, storage: string, default: unknown}
    device: {kind: categorical, storage: string}
    interests: {kind: multi_categorical, storage: string, table: topic}
    topic_weights: {kind: weighted, storage: string}
    history: {kind: sequence, max_length: 5, fields: {item: {table: item_id}, action: {storage: string}}}
    price: {kind: numeric, log1p: true, default: null}
    price_band: {kind: categorical}
    is_weekend: {kind: binary}
    item_vector: {kind: dense_vector, dim: 8}
  tables:
    item_id: {num_embeddings: 1000, embedding_dim: 4}
    user_country: {num_embeddings: 100, embedding_dim: 4, ids: hash}
    price_band: {num_embeddings: 20, embedding_dim: 4, ids: hash}
    device: {num_embeddings: 3, embedding_dim: 4, ids: vocabulary, vocabulary: [phone, desktop, tablet]}
    topic: {num_embeddings: 100, embedding_dim: 4, ids: hash, pooling: mean}
    topic_weights: {num_embeddings: 100, embedding_dim: 4, ids: hash}
    history_action: {num_embeddings: 10, embedding_dim: 4, ids: hash}
data:
  path: PATH
  transforms:
  - {kind: derive, column: price_band, sql: CAST(price / 10 AS BIGINT)}
  - {kind: clip, column: price, upper: 30}
  - {kind: filter, where: price IS NULL OR price >= 0}
  batch_size: 128
  train: {end: 2026-01-01}
  validation: {start: 2026-01-02, end: 2026-01-02}
  test: {start: 2026-01-03}
model: {kind: ranker, crossing: null, deep: {hidden: [8]}, heads: {hidden: []}}
calibration: {click: {kind: logistic, segments: [placement]}}
loop: {checkpoint_every_steps: 20, max_steps: 12}
tracking: {enabled: false}
"""


FORMS = ("onnx", "program", "aoti") if shutil.which("g++") else ("onnx", "program")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ads: Path) -> Path:
    folder = tmp_path_factory.mktemp("a trained model")
    (folder / "config.yaml").write_text(CONFIG.replace("PATH", f"'{ads}'"))
    train(compose(folder / "config.yaml", [f"output={folder / 'run'}"]))
    return folder / "run"


@pytest.fixture(scope="module")
def package(trained: Path) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = trained.parent / "package"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlenv.serving.parity.REPEATS", 3)
        _, parity = export(str(trained), ExportOptions(out=out, formats=FORMS))
    assert parity.rows == 2000
    return out


@pytest.fixture(scope="module")
def rows(package: Path, ads: Path) -> list[dict]:
    """Rows of the test window as JSON has them."""
    columns = open_package(package).columns.names
    found = pq.read_table(ads / "date=2026-01-03", columns=columns, partitioning=None).to_pylist()
    return [{**row, "topic_weights": row["topic_weights"] and dict(row["topic_weights"])} for row in found]


def test_every_row_is_scored_as_the_training_scored_it(package, trained, rows):
    report = json.loads((package / "parity.json").read_text())
    written = pq.read_table(trained / "predictions").to_pandas()[["prediction_click", "prediction_conversion"]].to_numpy()
    assert set(open_package(package).formats) == set(FORMS)
    for form in FORMS:
        served = Predictor(open_package(package), form).predict_rows(rows)
        assert np.abs(served - written).max() < 1e-5
        assert report["differences"][form] == pytest.approx(np.abs(served - written).max(), abs=1e-7)
        assert report["json_differences"][form] < 1e-5
        assert [latency["rows"] for latency in report["latency"][form]] == [1, 10, 100, 1000]
        assert report["metrics"][form]["click/auc"] == pytest.approx(report["trainer"]["click/auc"], abs=1e-4)
    assert report["written_difference"] < 1e-5


def test_transforms_of_the_config_run_on_raw_values(package, rows):
    assert "price_band" not in open_package(package).columns.names
    predictor = Predictor(open_package(package))
    prices = [row["price"] for row in rows if row["price"] is not None]
    assert max(prices) > 30 > min(prices)
    dear = [{**rows[0], "price": price} for price in (31.0, 35.0, 45.0)]
    first, same_band, other_band = predictor.predict_rows(dear).tolist()
    assert first == same_band  # clipped alike, and of the same band
    assert first != other_band
    with pytest.raises(RowsError, match="row 1, field 'price': expected a number"):
        predictor.predict_rows([rows[0], {**rows[1], "price": "30"}])


def test_a_row_alone_and_an_empty_one_are_scored_alike(package, rows):
    predictor = Predictor(open_package(package))
    together = predictor.predict_rows(rows[:5])
    for place in range(5):
        np.testing.assert_allclose(predictor.predict_rows(rows[place : place + 1]), together[place : place + 1], atol=1e-6)
    assert predictor.predict_rows([]).shape == (0, 2)
    nothing = dict.fromkeys(rows[0])
    assert np.isfinite(predictor.predict_rows([nothing])).all()
    # The default of the schema stands in for null, and bags may be empty.
    changed = {**nothing, "user_country": "unknown", "interests": [], "topic_weights": {}, "history_item": [], "history_action": []}
    np.testing.assert_array_equal(predictor.predict_rows([nothing]), predictor.predict_rows([changed]))


def test_wrong_rows_are_named(package, rows):
    predictor = Predictor(open_package(package))
    wrong = [{**rows[0]}, {**rows[1], "item_id": "seven"}, {**rows[2], "device": "abacus"}]
    del wrong[0]["price"]
    with pytest.raises(RowsError) as raised:
        predictor.predict_rows(wrong)
    assert [(one.row, one.field) for one in raised.value.problems] == [(0, "price"), (1, "item_id")]
    with pytest.raises(RowsError, match="row 0, field 'device': expected an id of the vocabulary"):
        predictor.predict_rows(wrong[2:])


def test_a_server_needs_no_torch(package, rows):
    code = f"""
import json, sys
from pathlib import Path
from mlenv.serving.package import open_package
from mlenv.serving.predictor import Predictor
from mlenv.serving.server import ServerOptions, make_app
from mlenv.serving.server import ServerOptions, make_app
make_app(Predictor(open_package(Path({str(package)!r}))), ServerOptions())
print(sorted({{"torch", "torchrec", "ray", "mlflow", "lightning"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_changed_file_and_another_folder_are_refused(package, tmp_path):
    with pytest.raises(ConfigError, match=r"package\.json"):
        open_package(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in package.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "schema.yaml").write_text((copy / "schema.yaml").read_text().replace("hash", "Hash"))
    with pytest.raises(CheckpointError, match=r"schema\.yaml"):
        open_package(copy)
    with pytest.raises(ConfigError, match="--out"):
        ExportOptions(out=tmp_path)
    with pytest.raises(ConfigError, match="--format"):
        ExportOptions(out=tmp_path / "new", formats=("coreml",))


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[tuple[int, Path]]:
    """A server in a process of its own, and the folder of its log."""
    log = package.parent / "served log"
    command = [sys.executable, "-m", "mlenv", "serve", str(package), "--port", "0", "--log", str(log), "--max-rows", "50"]
    process = subprocess.Popen([*command, "--max-bytes", "100000"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = next(line for line in process.stderr if "answers at" in line)
        yield int(address.rsplit(":", 1)[1].partition("/")[0]), log
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stderr.close()
    (file,) = log.iterdir()  # written when the server ends
    logged = pq.read_table(file)
    assert logged["served_request_id"].to_pylist()[:3] == ["mine"] * 3
    assert logged["served_row"].to_pylist()[:3] == [0, 1, 2]
    assert logged["impression_id"].to_pylist()[:3] == [5, 6, None]
    assert logged.select(open_package(package).columns.names).schema == open_package(package).columns


def call(port: int, body: bytes | str, method: str = "POST", path: str = "/predict", **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_answers_over_http(server, package, rows):
    port, _ = server
    known = [{**rows[0], "impression_id": 5}, {**rows[1], "impression_id": 6}, rows[2]]
    status, answer = call(port, json.dumps({"rows": known}), **{"X-Request-ID": "mine"})
    assert (status, answer["request_id"]) == (200, "mine")
    expected = Predictor(open_package(package)).predict_rows(rows[:3])
    np.testing.assert_allclose([[row["click"], row["conversion"]] for row in answer["predictions"]], expected, atol=1e-6)
    assert call(port, "", "GET", "/health")[1]["status"] == "ok"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as figures:
        families = list(text_string_to_metric_families(figures.read().decode()))
    samples = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    assert samples["mlenv_serve_requests_total", "200"] >= 1
    assert samples["mlenv_serve_rows_total",] >= 3
    assert samples["mlenv_serve_prediction_count", "click"] == samples["mlenv_serve_rows_total",]
    columns = {column["name"]: column["type"] for column in call(port, "", "GET", "/schema")[1]["columns"]}
    assert columns["topic_weights"] == "an object from a string to a number"
    assert columns["history_item"] == "a list of integers"
    assert columns["impression_id"] == "an integer"


def test_bad_requests_are_answered_with_the_reason(server, rows):
    port, _ = server
    status, answer = call(port, json.dumps({"rows": [rows[0], {**rows[1], "price": "dear"}]}))
    assert status == 422
    assert answer["errors"] == [{"row": 1, "field": "price", "expected": "a number", "received": "'dear'"}]
    answer = call(port, json.dumps({"rows": [{**rows[0], "impression_id": "five"}]}))[1]
    assert answer["errors"] == [{"row": 0, "field": "impression_id", "expected": "an integer", "received": "'five'"}]
    missing = {name: value for name, value in rows[0].items() if name != "item_id"}
    assert call(port, json.dumps({"rows": [missing]}))[1]["errors"][0]["field"] == "item_id"
    assert call(port, '{"rows": [')[0] == 400
    assert call(port, '{"rows": 3}')[0] == 400
    assert call(port, json.dumps({"rows": [{**rows[0], "price": float("nan")}]}))[0] == 400
    assert call(port, json.dumps({"rows": rows[:51]}))[0] == 413
    assert call(port, " " * 200_000)[0] == 413
    assert call(port, json.dumps({"rows": []}))[1]["predictions"] == []


async def ask(app, parts, *, before_the_last=None):
    """Status and headers of an answer to a body in parts, of which the last may have to wait for something."""
    sent = []
    waiting = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]

    async def receive():
        if len(waiting) == 1 and before_the_last is not None:
            await before_the_last.wait()
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [], "http_version": "1.1"}
    await app(scope | {"raw_path": b"/predict", "scheme": "http", "server": ("here", 80), "client": ("here", 1)}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def test_too_many_requests_are_told_to_come_again_and_too_long_ones_are_not_read(package, rows):
    app = make_app(Predictor(open_package(package)), ServerOptions(max_concurrent=2, max_bytes=10_000))
    body = json.dumps({"rows": rows[:1]}).encode()

    async def crowd():
        is_refused = asyncio.Event()
        early = [asyncio.create_task(ask(app, [b"", body], before_the_last=is_refused)) for _ in range(2)]
        await asyncio.sleep(0.05)
        late = await ask(app, [body])
        is_refused.set()
        return late, await asyncio.gather(*early), await ask(app, [body]), await ask(app, [b" " * 6000, b" " * 6000, b"never read"])

    (status, headers, answer), early, after, too_long = asyncio.run(crowd())
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert answer["message"] == "2 requests are under way; come again"
    assert [one[0] for one in early] == [200, 200]
    assert after[0] == 200
    assert (too_long[0], too_long[2]["message"]) == (413, "the request has more than the 10,000 bytes that are allowed")


def test_eight_clients_are_all_answered(server, rows):
    """A second of what a minute by hand did."""
    port, _ = server
    statuses: list[int] = []
    ends = time.monotonic() + 1

    def client(number: int) -> None:
        while time.monotonic() < ends:
            statuses.append(call(port, json.dumps({"rows": rows[number : number + 5]}), **{"X-Request-ID": "load"})[0])

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert len(statuses) >= 8
    assert set(statuses) == {200}


@pytest.mark.parametrize(("tables", "bound"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_small_tables_cost_little_and_the_report_says_how_much(trained, tmp_path, tables, bound, monkeypatch):
    monkeypatch.setattr("mlenv.serving.parity.REPEATS", 1)
    monkeypatch.setattr("mlenv.serving.parity.BATCH_SIZES", (1,))
    _, parity = export(str(trained), ExportOptions(out=tmp_path / "small", formats=("program",), tables=tables))
    assert 1e-7 < parity.differences["program"] < bound
    assert abs(parity.metrics["program"]["click/auc"] - parity.trainer["click/auc"]) < 0.01


def test_a_package_that_is_not_the_model_is_not_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mlenv.serving.parity.REPEATS", 1)
    monkeypatch.setattr("mlenv.serving.parity.BATCH_SIZES", (1,))
    monkeypatch.setattr("mlenv.serving.graph.Sigmoid.forward", lambda self, logits: (logits + 0.1).sigmoid())
    with pytest.raises(GateError, match="a prediction differs by"):
        export(str(trained), ExportOptions(out=tmp_path / "package", formats=("program",)))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_is_refused_with_the_operation(trained, tmp_path, monkeypatch):
    from mlenv.modules import Ranker

    forward = Ranker.forward
    monkeypatch.setattr(Ranker, "forward", lambda self, batch: forward(self, batch) * (2 if batch.dense.sum().item() > 0 else 1))
    with pytest.raises(ConfigError, match="model: expected a model that can be exported") as raised:
        export(str(trained), ExportOptions(out=tmp_path / "package", formats=("program",)))
    assert "item" in str(raised.value) or "data-dependent" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_the_checkpoint_and_writes_nothing(trained, tmp_path, capsys):
    assert check_export(str(trained), ExportOptions(out=tmp_path / "package")).name == "step-00000012"
    assert main(["export", str(trained), "--out", str(tmp_path / "package"), "--dry-run"]) == 0
    assert "would export" in capsys.readouterr().out
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "package"), "--dry-run"]) == 2
    assert main(["serve", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_mlflow_loads_the_folder(package, rows):
    mlflow = pytest.importorskip("mlflow")
    pandas = pytest.importorskip("pandas")
    model = mlflow.pyfunc.load_model(str(package))
    assert [column.name for column in model.metadata.signature.inputs.inputs] == open_package(package).columns.names
    full = [row for row in rows if all(value is not None for value in row.values())][:4]
    answer = model.predict(pandas.DataFrame(full))
    np.testing.assert_allclose(answer.to_numpy(), Predictor(open_package(package)).predict_rows(full), atol=1e-6)
    with pytest.raises(mlflow.exceptions.MlflowException, match="item_id"):
        model.predict(pandas.DataFrame(full).drop(columns="item_id"))
