"""What a training read: written with the run, held against the files, compared with another run, told by ``mlenv data show``."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xxhash

from mlenv import compose, train
from mlenv.cli import main
from mlenv.errors import DONE, GATE, WRONG_INPUT, CheckpointError, DataError
from mlenv.records.dataset_record import changes_since, differences, mlflow_inputs, read_dataset_record

SHORT = ["loop.max_steps=2", "loop.learning_rate_decay=none"]
PARTS = [f"date=2026-01-0{day}/part-00000.parquet" for day in (1, 2, 3)]


@pytest.fixture
def log(ads: Path, tmp_path: Path) -> Path:
    """A copy of the log that a test may change."""
    return Path(shutil.copytree(ads, tmp_path / "log"))


@pytest.fixture
def run(demo_arguments, log, tmp_path):
    """Trains two steps on the copy; gives the output folder."""

    def begin(*overrides: str, output: str = "one") -> Path:
        arguments = demo_arguments(*SHORT, f"data.path={log}", *overrides, output=output)
        train(compose(arguments[0], arguments[1:]))
        return tmp_path / output

    return begin


def change_values(file: Path) -> None:
    """Other prices in the same rows and row groups, which the fingerprint of the data does not see."""
    metadata = pq.read_metadata(file)
    table = pq.read_table(file, partitioning=None)
    place = table.column_names.index("price")
    table = table.set_column(place, "price", pc.add(table["price"], 1.0))
    pq.write_table(table, file, row_group_size=metadata.row_group(0).num_rows)
    assert [pq.read_metadata(file).row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)
    ]


def test_the_record_tells_what_was_read(run, log):
    record = json.loads((run() / "dataset.json").read_text())
    assert record["path"] == str(log)
    assert record["content_hash"] == "bytes"
    assert record["transforms"] == []
    assert record["windows"].keys() == {"train", "test"}
    window = record["windows"]["train"]
    assert window["window"] == {"path": "", "start": "", "end": "2026-01-02", "skip_dates": []}
    assert window["days"] == ["2026-01-01", "2026-01-02"]
    assert (window["num_stored_rows"], window["num_rows"]) == (4000, 4000)
    assert [(file["path"], file["content"]) for file in window["files"]] == [
        (part, xxhash.xxh3_128_hexdigest((log / part).read_bytes())) for part in PARTS[:2]
    ]
    assert window["columns"]["price"] == "double"
    assert "truth_click" not in window["columns"]


def test_transforms_and_joined_tables_are_told(run, log, tmp_path):
    table = pa.table({"user_id": pa.array(range(200)), "score": pa.array([0.5] * 200)})
    (tmp_path / "scores").mkdir()
    pq.write_table(table, tmp_path / "scores" / "a.parquet")
    join = f"{{kind: join, table: {tmp_path}/scores, key: [user_id], columns: [score]}}"
    transforms = f"data.transforms=[{join}, {{kind: filter, where: 'user_id % 2 = 0 and score = 0.5'}}]"
    record = read_dataset_record(run(transforms) / "dataset.json")
    users = pq.read_table(log / PARTS[2], columns=["user_id"], partitioning=None)["user_id"].to_pylist()
    assert record.windows["test"].num_stored_rows == 2000
    assert record.windows["test"].num_rows == sum(user % 2 == 0 for user in users)
    assert [transform["kind"] for transform in record.transforms] == ["join", "filter"]
    joined = record.windows["train"].joins["data.transforms[0]"]
    assert joined["table"] == f"{tmp_path}/scores"
    assert changes_since(record) == []
    pq.write_table(table.slice(1), tmp_path / "scores" / "a.parquet")
    changes = changes_since(record)
    assert [line.partition(", ")[0] for line in changes] == [
        f"{split}: table of data.transforms[0] changed: {tmp_path}/scores" for split in ("train", "test")
    ]
    other = read_dataset_record(run(transforms, output="two") / "dataset.json")
    found = [line for line in differences(record, other) if "table of" in line]
    assert found == [
        f"{split}: table of data.transforms[0]: {tmp_path}/scores ({joined['fingerprint']}) became "
        f"{tmp_path}/scores ({other.windows['train'].joins['data.transforms[0]']['fingerprint']})"
        for split in ("train", "test")
    ]


def test_what_was_passed_over_is_told(run, log):
    (log / "date=2026-01-01" / "part-00001.parquet").write_bytes(b"half a file")
    record = read_dataset_record(run("data.on_bad_file=skip", "data.max_bad_row_groups=1") / "dataset.json")
    assert record.windows["train"].passed_over == ("date=2026-01-01/part-00001.parquet",)
    assert [file.path for file in record.windows["train"].files] == PARTS[:2]
    assert changes_since(record) == []


def test_values_that_changed_inside_a_training_file_are_refused_by_a_resumed_training(run, log):
    output = run()
    before = (output / "dataset.json").read_text()
    change_values(log / PARTS[1])
    with pytest.raises(
        CheckpointError, match=rf"training data: expected the files.*Received: '{PARTS[1]}, with other.*Fix: put the files back"
    ):
        run("loop.max_steps=4")
    assert (output / "dataset.json").read_text() == before
    run("loop.max_steps=4", output="another")


def test_a_test_window_may_change_between_two_trainings_and_the_record_says_so(run, log):
    before = read_dataset_record(run() / "dataset.json")
    change_values(log / PARTS[2])
    after = read_dataset_record(run("loop.max_steps=4") / "dataset.json")
    assert differences(before, after) == [f"test: 1 file changed: {PARTS[2]}"]


def test_a_resumed_training_reads_untouched_files_no_further_than_their_footers(run, log, monkeypatch):
    from mlenv.datasets import stored_files

    output = run()
    read = []
    hash_bytes = stored_files._hash_bytes
    monkeypatch.setattr(stored_files, "_hash_bytes", lambda filesystem, place: read.append(place) or hash_bytes(filesystem, place))
    os.utime(log / PARTS[0])
    before = read_dataset_record(output / "dataset.json")
    run("loop.max_steps=4")
    assert read == [str(log / PARTS[0])]
    assert differences(before, read_dataset_record(output / "dataset.json")) == []


def test_footers_alone_when_asked_for(run, log):
    record = read_dataset_record(run("data.content_hash=footers") / "dataset.json")
    assert {file.content for window in record.windows.values() for file in window.files} == {None}
    assert changes_since(record) == []
    change_values(log / PARTS[0])  # the statistics in the footer are others now
    assert changes_since(record) == [f"train: 1 file changed: {PARTS[0]}"]


def test_a_record_that_is_damaged_or_of_another_version_is_refused(run):
    file = run() / "dataset.json"
    record = json.loads(file.read_text())
    for text, message in (("{", "what a training wrote"), (json.dumps(record | {"version": 99}), "a record of version 1")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_dataset_record(file)


def test_two_inputs_of_mlflow_for_one_window_that_is_read_twice(run):
    record = read_dataset_record(
        run("loop.evaluate_every_steps=2", "data.validation.start=2026-01-03", "data.validation.end=2026-01-03", "data.test.end=2026-01-03")
        / "dataset.json"
    )
    inputs = {one["context"]: one for one in mlflow_inputs(record)}
    assert inputs.keys() == {"train", "validation", "test"}
    assert len({one["digest"] for one in inputs.values()}) == 3
    assert json.loads(inputs["train"]["profile"])["num_rows"] == 4000
    assert json.loads(inputs["train"]["source"]) == {"uri": record.path}
    assert {"name": "price", "type": "double"} in json.loads(inputs["train"]["schema"])["mlflow_colspec"]


def test_show_summary_files_and_verify(run, log, capsys):
    output = str(run())
    capsys.readouterr()
    assert main(["data", "show", output]) == DONE
    shown = capsys.readouterr().out
    assert "train: earliest to 2026-01-02\n  2 days, 2026-01-01 to 2026-01-02; 4,000 rows\n" in shown
    assert PARTS[0] not in shown
    assert main(["data", "show", output, "--files", "--verify"]) == DONE
    shown = capsys.readouterr().out
    assert re.search(rf"{xxhash.xxh3_128_hexdigest((log / PARTS[0]).read_bytes())} .* 2,000 rows .* {PARTS[0]}\n", shown)
    assert shown.endswith("the files are as they were\n")
    change_values(log / PARTS[0])
    (log / PARTS[1]).rename(log / "date=2026-01-02" / "new.parquet")
    assert main(["data", "show", output, "--verify"]) == GATE
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "train: 1 file added: date=2026-01-02/new.parquet",
        f"train: 1 file removed: {PARTS[1]}",
        f"train: 1 file changed: {PARTS[0]}",
    ]


def test_show_against_another_run(run, log, capsys):
    one = run()
    moved = shutil.copytree(log, log.parent / "moved")
    same = run(f"data.path={moved}", output="same")
    other = run("data.train.end=2026-01-01", "data.transforms=[{kind: filter, where: 'user_id % 2 = 0'}]", output="other")
    capsys.readouterr()
    assert main(["data", "show", str(one), "--against", str(same)]) == DONE
    assert capsys.readouterr().out == "both read the same\n"
    assert main(["data", "show", str(one), "--against", str(other)]) == DONE
    lines = capsys.readouterr().out.splitlines()
    left = read_dataset_record(other / "dataset.json").windows["train"].num_rows
    assert lines[:5] == [
        "train: window: earliest to 2026-01-02 became earliest to 2026-01-01",
        "train: days removed: 2026-01-02",
        "train: rows stored: 4,000 became 2,000",
        f"train: rows read: 4,000 became {left:,}",
        f"train: 1 file removed: {PARTS[1]}",
    ]
    assert lines[-1].startswith("data.transforms[0]: none became")


def test_show_finds_runs_and_models_in_mlflow(run, tmp_path, monkeypatch, capsys):
    import mlflow

    monkeypatch.chdir(tmp_path)
    output = run("tracking.enabled=true")
    run_id = json.loads((output / "tracking.json").read_text())["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    inputs = client.get_run(run_id).inputs.dataset_inputs
    assert sorted((one.tags[0].key, one.tags[0].value) for one in inputs) == [("mlflow.data.context", name) for name in ("test", "train")]
    client.create_registered_model("ranker")
    client.create_model_version("ranker", source=f"{tmp_path}/model", run_id=run_id)
    client.set_registered_model_alias("ranker", "champion", "1")
    capsys.readouterr()
    for name in (run_id, f"runs:/{run_id}", "models:/ranker@champion", "models:/ranker/1"):
        assert main(["data", "show", str(output), "--against", name]) == DONE
        assert capsys.readouterr().out == "both read the same\n"

    older = client.create_run("0").info.run_id
    for name, message in (
        ("0" * 32, "a run or a model of MLflow"),
        ("models:/ranker@nobody", "a run or a model of MLflow"),
        ("models:/nothing/1", "a run or a model of MLflow"),
        ("neither", "expected an output folder"),
        (older, "one of an older version did not"),
        (str(tmp_path), "one of an older version did not"),
    ):
        assert main(["data", "show", name]) == WRONG_INPUT
        assert message in capsys.readouterr().err
    assert main(["data", "show", run_id, "--uri", "sqlite:///nowhere.db"]) == WRONG_INPUT
    assert "no such file" in capsys.readouterr().err
    assert not Path("nowhere.db").exists()
    assert main(["data", "show", run_id, "--uri", "http://127.0.0.1:9"]) == WRONG_INPUT
    assert "Fix: start the server, or set --uri." in capsys.readouterr().err


def test_show_dry_run_looks_nowhere(capsys):
    assert main(["data", "show", "nothing", "--against", "other", "--dry-run"]) == DONE
    assert capsys.readouterr().out == "would show what nothing was trained on, against other\n"
