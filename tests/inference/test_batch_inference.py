"""Stored models asked about logged rows: each row once, the same bytes after any kill, whoever scores."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv import compose, predict, train
from mlenv.cli import main
from mlenv.datasets.parquet_source import RowGroup
from mlenv.errors import WRONG_INPUT, ConfigError, DataError, MlenvError, Problems
from mlenv.inference.batch_inference import Inference, InferenceOptions, prepare, run
from mlenv.inference.part_scoring import Part, divide
from mlenv.inference.prediction_folder import MANIFEST, SUCCESS, PredictionFolder

GROUP_ROWS, ROWS = 300, 2000
PARTS = InferenceOptions(part_rows=500, workers=2)
"""Two row groups a part, four parts a day."""

PLAIN = """
name: plain
schema:
  row_key: [impression_id]
  request: request_id
  event_time: event_time
  segments: [placement]
  labels: {click: {}, conversion: {mask: click}}
  features:
    item_id: {kind: categorical}
    device: {kind: categorical, storage: string}
    price: {kind: numeric, log1p: true}
  tables:
    item_id: {num_embeddings: 1000, embedding_dim: 4}
    device: {num_embeddings: 100, embedding_dim: 4, ids: hash}
data:
  batch_size: 128
  train: {end: 2026-01-01}
  test: {start: 2026-01-03}
model: {kind: ranker, deep: {hidden: [8]}}
loop: {max_steps: 4}
tracking: {enabled: false}
"""
CALIBRATED = """
extends: plain.yaml
name: calibrated
data: {validation: {start: 2026-01-02, end: 2026-01-02}}
calibration: {click: {kind: logistic, segments: [placement]}}
"""
FILTERED = """
extends: plain.yaml
name: filtered
schema: {request: '', segments: [is_phone], labels: {conversion: {mask: click, weight: weight}}}
data:
  transforms:
    - {kind: filter, where: price < 20}
    - {kind: derive, column: is_phone, sql: "device = 'phone'"}
    - {kind: sample_negatives, negative: click = 0, rate: 0.5, weight_column: weight}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ads: Path) -> Path:
    """A log in small row groups, and three trainings on it."""
    folder = tmp_path_factory.mktemp("stored models")
    for day in sorted(ads.glob("date=*")):
        (folder / "ads" / day.name).mkdir(parents=True)
        pq.write_table(
            pq.ParquetFile(day / "part-00000.parquet").read(), folder / "ads" / day.name / "a.parquet", row_group_size=GROUP_ROWS
        )
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "calibrated.yaml").write_text(CALIBRATED)
    (folder / "filtered.yaml").write_text(FILTERED)
    for name in ("plain", "calibrated", "filtered"):
        train(compose(folder / f"{name}.yaml", [f"output={folder / name}", f"data.path={folder / 'ads'}"]))
    return folder


@pytest.fixture(scope="module")
def two_models(folder: Path) -> Inference:
    """Two models about all days."""
    return prepare([folder / "plain", folder / "calibrated"], all_days(folder))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, two_models: Inference) -> Path:
    """What they say, in one go."""
    run(two_models, folder / "undisturbed")
    return folder / "undisturbed"


def all_days(folder: Path, **changes: object) -> InferenceOptions:
    return replace(PARTS, path=str(folder / "ads"), **changes)


def table(folder: Path) -> pl.DataFrame:
    return pl.from_arrow(pa.concat_tables(pq.ParquetFile(file).read() for file in sorted(folder.glob("part-*"))))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(path: Path) -> dict[str, float]:
    return {key: value for key, value in json.loads(path.read_text()).items() if value is not None}


def test_parts_are_row_groups_of_one_file() -> None:
    sizes = {"a": [3, 3, 3, 1], "b": [9, 1], "c": [2]}
    groups = [RowGroup(file, index, rows) for file, of_file in sizes.items() for index, rows in enumerate(of_file)]
    expected = [groups[:2], groups[2:4], groups[4:5], groups[5:6], groups[6:]]
    assert divide(groups, 5) == [Part(f"part-0000{number}.parquet", tuple(part)) for number, part in enumerate(expected)]


@pytest.mark.parametrize("name", ["plain", "calibrated", "filtered"])
def test_predictions_and_metrics_are_those_of_the_evaluation(folder: Path, tmp_path: Path, name: str) -> None:
    predicted = predict([folder / name], tmp_path / "scored", replace(PARTS, keep=("history_item", "price", "date")))
    scored, evaluated = table(tmp_path / "scored"), table(folder / name / "predictions")
    logged = pl.read_parquet(folder / "ads" / "date=2026-01-03" / "a.parquet")
    assert (predicted.num_rows, predicted.num_parts, predicted.num_repeated) == (ROWS, 4, 0)
    assert scored["impression_id"].equals(logged["impression_id"])  # every row, those that a filter leaves out as well
    assert scored.select("history_item", "price").equals(logged.select("history_item", "price"))
    assert set(scored["date"]) == {"2026-01-03"}
    kept = scored.filter(pl.col("prediction_click").is_not_null())
    assert predicted.num_scored == {name: len(evaluated)} == {name: len(kept)}
    assert kept.select(evaluated.columns).drop("^prediction.*$").equals(evaluated.drop("^prediction.*$"))
    for task in ("click", "conversion"):
        np.testing.assert_allclose(kept[f"prediction_{task}"], evaluated[f"prediction_{task}"], rtol=1e-6)
    left_out = scored.filter(pl.col("prediction_click").is_null())
    assert left_out["impression_id"].to_list() == (
        logged.filter(~(pl.col("price") < 20).fill_null(False))["impression_id"].to_list() if name == "filtered" else []
    )
    assert left_out["weight_click"].sum() == left_out["weight_conversion"].sum() == left_out["prediction_conversion"].count() == 0
    assert figures(tmp_path / "scored" / "_metrics" / f"{name}.json") == pytest.approx(figures(folder / name / "metrics.json"), rel=1e-5)
    assert pq.read_table(tmp_path / "scored").num_rows == ROWS  # what is no part is passed over


def test_several_models_are_joined_and_rows_read_once_where_they_are_read_alike(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    models = [folder / "plain", folder / "filtered", f"twin={folder / 'calibrated'}"]
    inference = prepare(models, all_days(folder))
    assert [reading.models for reading in inference.scorer.readings] == [("plain", "twin"), ("filtered",)]
    predicted = run(inference, tmp_path / "three")
    three, two = table(tmp_path / "three"), table(undisturbed)
    assert predicted.num_rows == len(three) == 3 * ROWS
    columns = [f"{kind}_{task}" for task in ("click", "conversion") for kind in ("label", "weight", "prediction")]
    metadata = ["impression_id", "request_id", "event_time", "placement"]
    assert three.columns == [*metadata, "is_phone", *(f"{column}@{model}" for model in ("plain", "filtered", "twin") for column in columns)]
    renamed = {f"{column}@calibrated": f"{column}@twin" for column in columns}
    assert three.select(two.rename(renamed).columns).equals(two.rename(renamed))
    predict([folder / "filtered"], tmp_path / "one", all_days(folder))
    one = table(tmp_path / "one")
    assert three.select(f"{column}@filtered" for column in columns).equals(
        one.select(pl.col(column).alias(f"{column}@filtered") for column in columns)
    )
    for name, source in {"filtered": tmp_path / "one", "plain": undisturbed}.items():
        assert figures(tmp_path / "three" / "_metrics" / f"{name}.json") == figures(source / "_metrics" / f"{name}.json")


@pytest.mark.parametrize(("place", "number"), [("before", 1), ("before", 6), ("unfinished", 3), ("after", 2), ("after", 12)])
def test_a_run_that_fails_anywhere_goes_on_to_the_same_bytes(
    two_models: Inference, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    write, written, out = PredictionFolder.write, [], tmp_path / "out"

    def fail(self: PredictionFolder, name: str, file: pa.Buffer) -> None:
        written.append(name)
        if len(written) == number and place == "unfinished":
            (self.path / f".{name}.unfinished").write_bytes(file.to_pybytes()[:100])  # as a kill leaves it
        if len(written) == number and place != "after":
            raise KeyboardInterrupt
        write(self, name, file)
        if len(written) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictionFolder, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            run(two_models, out)
    assert not (out / SUCCESS).exists()
    assert len(list(out.glob("part-*"))) == number - (place != "after")
    again = run(replace(two_models, options=replace(two_models.options, workers=number)), out)
    assert files(out) == files(undisturbed)
    assert (again.num_rows, again.num_scored) == (3 * ROWS, {"plain": 3 * ROWS, "calibrated": 3 * ROWS})


def test_a_run_that_is_killed_leaves_whole_parts(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Killed while the fifth part is on its way to the disk; meanwhile a part is damaged, as by a machine that went down."""
    words = [f"plain={folder / 'plain'}", str(folder / "calibrated"), "--out", str(tmp_path / "out"), "--path", str(folder / "ads")]
    words += ["--part-rows", "500", "--workers", "1"]
    code = f"""
import os, signal, sys
from mlenv.cli import main
fsync, calls = os.fsync, []
def kill(number):
    calls.append(number)
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else fsync(number)
os.fsync = kill
main({["predict", *words]!r})
"""
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert process.returncode == -signal.SIGKILL, process.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        ".part-00004.parquet.unfinished",
        MANIFEST,
        *(f"part-0000{number}.parquet" for number in range(4)),
    ]
    (out / "part-00002.parquet").write_bytes((out / "part-00002.parquet").read_bytes()[:-10])
    assert main(["predict", *words]) == 0
    assert files(out) == files(undisturbed)


def test_a_complete_folder_is_left_as_it_is(folder: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    words = ["predict", str(folder / "plain"), str(folder / "calibrated"), "--out", str(undisturbed), "--path", str(folder / "ads")]
    assert main([*words, "--part-rows", "500", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"would score 6,000 rows of {folder / 'ads'}")
    assert main([*words, "--part-rows", "500"]) == 0
    assert "6,000 rows scored with plain, calibrated" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_other_models_rows_or_options_are_refused(folder: Path, two_models: Inference, undisturbed: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "ads"
    predict([folder / "plain"], out, all_days(folder))
    before = files(out)
    begun = r"out: expected the models, rows and options that it was begun with. Received: "
    with pytest.raises(ConfigError, match=rf"{begun}\"models\.plain: '\w+' became '\w+'\"\. Fix: name another folder, or remove"):
        predict([f"plain={folder / 'calibrated'}"], out, all_days(folder))
    shutil.copytree(folder / "ads", other)
    file = other / "date=2026-01-02" / "a.parquet"
    pq.write_table(pq.ParquetFile(file).read().slice(1), file, row_group_size=GROUP_ROWS)
    with pytest.raises(ConfigError, match=rf"{begun}.*files\.date=2026-01-02/a\.parquet\.rows: 2000 became 1999.*; and 1 more"):
        predict([folder / "plain"], out, replace(PARTS, path=str(other), keep=("price",)))
    assert files(out) == before
    with pytest.raises(ConfigError, match=r"expected a new folder, or one of predictions. Received: 'other files'"):
        run(two_models, other)
    with pytest.raises(ConfigError, match=r"expected a folder whose parent exists.* Fix: mkdir -p"):
        run(two_models, tmp_path / "none" / "out")
    with PredictionFolder(undisturbed, two_models.manifest), pytest.raises(MlenvError, match="another process writes predictions here"):
        run(two_models, undisturbed)


def test_rows_without_labels(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "served"
    logged = pq.ParquetFile(folder / "ads" / "date=2026-01-03" / "a.parquet").read()
    features = logged.drop_columns(["click", "conversion"])
    (log / "date=2026-01-03").mkdir(parents=True)
    pq.write_table(features, log / "date=2026-01-03" / "a.parquet", row_group_size=GROUP_ROWS)
    with pytest.raises(Problems, match=r"(?s)column 'click': expected a column of this name.*labels: .* Fix: .* --no-labels"):
        predict([folder / "plain"], tmp_path / "refused", replace(PARTS, path=str(log)))
    models = [folder / "plain", folder / "filtered"]
    unlabelled = predict(models, tmp_path / "without", replace(PARTS, path=str(log), has_labels=False))
    predict(models, tmp_path / "with", replace(PARTS, path=str(folder / "ads"), start="2026-01-03"))
    assert unlabelled.metrics == {}
    assert not (tmp_path / "without" / "_metrics").exists()
    columns = ["impression_id", *(f"prediction_{task}@{name}" for name in ("plain", "filtered") for task in ("click", "conversion"))]
    without = table(tmp_path / "without")
    assert without.columns == ["impression_id", "request_id", "event_time", "placement", "is_phone", *columns[1:]]
    assert without.select(columns).equals(table(tmp_path / "with").select(columns))


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(two_models: Inference, undisturbed: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    smallest = min(path.stat().st_size for path in undisturbed.glob("part-*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(two_models, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob(".*unfinished"))
    run(two_models, tmp_path / "out")
    assert files(tmp_path / "out") == files(undisturbed)


def test_keys_that_the_data_repeat_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pq.ParquetFile(folder / "ads" / "date=2026-01-03" / "a.parquet").read().slice(0, 500)
    for name, piece in (("a", rows), ("b", rows.slice(0, 7))):
        pq.write_table(piece, tmp_path / f"{name}.parquet")
    out = tmp_path / "out"
    predicted = predict([folder / "plain"], out, InferenceOptions(path=str(tmp_path)))
    assert (predicted.num_rows, predicted.num_repeated, len(table(out))) == (507, 7, 507)
    assert "7 rows have a row key that a row before them has" in caplog.text


def test_a_file_that_changes_meanwhile_is_an_error(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    shutil.copy(folder / "ads" / "date=2026-01-03" / "a.parquet", file)
    inference = prepare([folder / "plain"], replace(PARTS, path=str(tmp_path)))
    out = tmp_path / "out"
    scored = run(inference, out)
    (out / SUCCESS).unlink()
    pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=GROUP_ROWS + 1)
    with pytest.raises(DataError, match=r"a\.parquet: expected the file that it was when it was read"):
        run(inference, out)
    assert scored.num_rows == ROWS
    assert not (out / SUCCESS).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/nothing"], "MODEL: expected a checkpoint"),
        (["models:/nothing@champion", "--uri", "sqlite:///{tmp}/none.db"], "none.db: expected a database of tracked runs"),
        (
            ["{folder}/plain", "{folder}/plain"],
            "MODEL: expected models with different names. Received: ['plain', 'plain']. Fix: give them names",
        ),
        (["{folder}/plain", "seed=1"], "seed=1: expected no settings"),
        (["{folder}/plain", "--keep", "colour"], "column 'colour': expected a column of this name"),
        (
            ["{folder}/plain", "--path", "{tmp}/scored", "--keep", "prediction_click"],
            "column 'prediction_click': expected a column that no model gives",
        ),
        (["{folder}/plain", "--path", "{tmp}/no_price"], "column 'price': expected a column of this name"),
        (["{folder}/plain", "--path", "{tmp}/no_key"], "column 'impression_id': expected a column of this name"),
        (["{folder}/plain", "--start", "2027-01-01"], "expected Parquet files in 2027-01-01"),
        (["{folder}/plain", "--ray", "head"], "address: expected auto, host:port, or empty"),
        (["{folder}/plain", "--part-rows", "0"], "part_rows: expected a number >= 1"),
    ],
)
def test_wrong_input_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    rows = pq.ParquetFile(folder / "ads" / "date=2026-01-03" / "a.parquet").read().slice(0, 10)
    for name, missing in (("no_price", "price"), ("no_key", "impression_id")):
        (tmp_path / name).mkdir()
        pq.write_table(rows.drop_columns([missing]), tmp_path / name / "a.parquet")
    (tmp_path / "scored").mkdir()
    pq.write_table(rows.append_column("prediction_click", rows["price"]), tmp_path / "scored" / "a.parquet")
    filled = [word.format(folder=folder, tmp=tmp_path) for word in words]
    models = [word for word in filled if "=" in word and "://" not in word]  # a setting follows the options
    rest = [word for word in filled if word not in models]
    assert main(["predict", *rest, "--out", str(tmp_path / "out"), *models]) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
