"""The command line: what it prints, and how it refuses. Every refusal is one message, exit code 2, and nothing half written."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.errors import DONE, FAILED, GATE, WRONG_INPUT, MlenvError, require


@pytest.fixture
def refuse(capsys, tmp_path):
    """Runs a command that must be refused; gives the message."""

    def run(*arguments):
        before = sorted(path for path in tmp_path.rglob("*"))
        assert main(arguments) == WRONG_INPUT
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("mlenv: ")
        assert "Traceback" not in output.err
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return output.err

    return run


def test_dry_run_prints_a_config_that_composes_to_itself(demo_arguments, capsys, tmp_path):
    assert main(["train", *demo_arguments("loop.max_steps=3"), "--dry-run"]) == DONE
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert compose(tmp_path / "printed.yaml") == compose(demo_arguments()[0], demo_arguments("loop.max_steps=3")[1:])
    assert "max_steps: 3" in printed
    assert not (tmp_path / "run of a test").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.crossing={kind: transformer, token_dim: 16, num_heads: 3}",
            "model.crossing.num_heads: expected a divisor of token_dim = 16",
        ),
        (
            "model.sequences.history={kind: din, candidate: [itm_id]}",
            "model.sequences.history.candidate: expected features with an embedding",
        ),
        ("model.entire_space.conversion=clic", "model.entire_space.conversion: expected a task of schema.labels. Received: 'clic'"),
        ("model.experts={kind: mmoe, num_experts: 0}", "model.experts.num_experts: expected a number >= 1. Received: 0"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_by_a_dry_run(demo_arguments, refuse, setting, message):
    assert message in refuse("train", *demo_arguments(setting), "--dry-run")


def test_train_evaluate_and_predict(demo_arguments, capsys, tmp_path):
    output = tmp_path / "run of a test"
    assert main(["train", *demo_arguments("loop.max_steps=30")]) == DONE
    trained = capsys.readouterr().out
    assert "trained 30 steps" in trained
    assert trained.splitlines()[1].split() == ["task", "AUC", "NE", "calibration", "best", "AUC", "best", "NE"]
    figures = json.loads((output / "metrics.json").read_text())
    assert f"{figures['click/auc']:.4f}" in trained
    (output / "report.html").unlink()
    assert main(["evaluate", *demo_arguments("loop.max_steps=30")]) == DONE
    assert trained.splitlines()[1:4] == capsys.readouterr().out.splitlines()[1:4]
    assert (output / "report.html").exists()
    assert main(["predict", str(output), "--out", str(tmp_path / "scored")]) == DONE
    scored = capsys.readouterr().out
    assert scored.splitlines()[-1] == f"2,000 rows scored with demo-ranker -> {tmp_path / 'scored'}"
    assert f"{figures['click/auc']:.4f}" in scored
    assert pq.read_table(tmp_path / "scored").equals(pq.read_table(output / "predictions"))


def test_a_tracked_training_is_in_mlflow(demo_arguments, tmp_path, monkeypatch, capsys):
    import mlflow

    monkeypatch.chdir(tmp_path)
    assert main(["train", *demo_arguments("loop.max_steps=12", "tracking.enabled=true")]) == DONE
    assert "MLflow   run" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mlenv").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["loop.max_steps"] == "12"
    assert {"schema fingerprint", "train window", "version.torch"} <= run.data.tags.keys()
    figures = json.loads((tmp_path / "run of a test" / "metrics.json").read_text())
    assert run.data.metrics["test/click/auc"] == pytest.approx(figures["click/auc"])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/click/loss")] == [5, 10]
    assert main(["register", "run of a test", "--name", "ranker"]) == DONE
    assert main(["predict", "models:/ranker@challenger", f"by-run=runs:/{run.info.run_id}/model", "--out", "scored"]) == DONE
    scored, evaluated = pq.read_table("scored"), pq.read_table("run of a test/predictions")
    assert scored["prediction_click@demo-ranker"].equals(evaluated["prediction_click"])
    assert scored["prediction_click@by-run"].equals(evaluated["prediction_click"])
    assert main(["predict", "models:/ranker@nobody", "--out", "refused"]) == WRONG_INPUT
    assert "MODEL: expected a model that MLflow keeps. Received: 'models:/ranker@nobody'" in capsys.readouterr().err
    kept = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert kept == {
        "config.yaml",
        "dataset.json",
        "sharding.json",
        "metrics.json",
        "report.html",
        "statistics.json",
        "features.json",
        "model",
    }


def rewrite(ads: Path, folder: Path, change) -> str:
    """The small log with one day changed, as a setting."""
    for day in ads.iterdir():
        (folder / day.name).mkdir(parents=True)
        table = pq.read_table(day / "part-00000.parquet")
        table = change(table) if day.name == "date=2026-01-02" else table
        pq.write_table(table, folder / day.name / "part-00000.parquet", row_group_size=512)
    return f"data.path={folder}"


def replaced(table: pa.Table, column: str, values) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


def with_value(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    return replaced(table, column, pa.array(values, table[column].type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["price"]), "date=2026-01-02/part-00000.parquet, column 'price': expected a column of this name"),
        (
            lambda table: replaced(table, "user_id", table["user_id"].cast(pa.string())),
            "date=2026-01-02/part-00000.parquet, column 'user_id': expected int64. Received: 'string'",
        ),
        (
            lambda table: with_value(table, "click", 700, None),
            "date=2026-01-02/part-00000.parquet, row group 1, row 188, column 'click': expected a label 0 or 1. Received: None.",
        ),
        (
            lambda table: with_value(table, "device", 3, "toaster"),
            "date=2026-01-02/part-00000.parquet, row group 0, row 3, column 'device': expected an id of the vocabulary of table 'device'. "
            "Received: 'toaster'. Fix: add it to the vocabulary, or set its out_of_range to 'hash'.",
        ),
        (
            lambda table: with_value(table, "item_id", 5, 500),
            "row group 0, row 5, column 'item_id': expected an id in [0, 500). Received: 500. Fix: raise num_embeddings of table 'item'",
        ),
    ],
)
def test_wrong_data_are_refused(ads, demo_arguments, tmp_path, capsys, change, message):
    setting = rewrite(ads, tmp_path / "changed", change)
    assert main(["train", *demo_arguments(setting, "data.shuffle_rows=0", "data.batch_size=2000")]) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run of a test").glob("checkpoints/*"))


def test_a_truncated_file_is_refused(ads, demo_arguments, tmp_path, refuse):
    setting = rewrite(ads, tmp_path / "changed", lambda table: table)
    file = tmp_path / "changed" / "date=2026-01-02" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refuse("train", *demo_arguments(setting))
    assert "date=2026-01-02/part-00000.parquet: expected a whole Parquet file" in message
    assert "Fix: write the file again" in message


def test_wrong_configs_are_refused(demo_arguments, refuse, tmp_path):
    assert "loop.max_step: expected a key of LoopConfig. Received: 3. Fix: did you mean 'max_steps'." in refuse(
        "train", *demo_arguments("loop.max_step=3")
    )
    message = refuse("train", *demo_arguments("data.train.start=2025-01-01", "data.train.end=2025-01-07"))
    assert "expected Parquet files in 2025-01-01 to 2025-01-07. Received: 'days 2026-01-01 to 2026-01-03'" in message
    missing = tmp_path / "missing" / "folder"
    message = refuse("train", *demo_arguments(f"output={missing}"))
    assert f"output: expected a folder whose parent exists. Received: '{missing}'. Fix: mkdir -p '{missing.parent}'" in message
    assert "missing.yaml: expected a readable YAML file" in refuse("train", "missing.yaml")
    assert "expected a checkpoint. Received: 'none'. Fix: train first" in refuse("evaluate", *demo_arguments())


def test_what_is_the_users_is_not_replaced(demo_arguments, refuse, tmp_path, capsys):
    assert main(["train", *demo_arguments("loop.max_steps=12")]) == DONE
    capsys.readouterr()
    mine = tmp_path / "mine"
    mine.mkdir()
    pq.write_table(pa.table({"a": [1]}), mine / "part-00000.parquet")
    output = tmp_path / "run of a test"
    assert "expected a new folder, or one of predictions" in refuse("predict", str(output), "--out", str(mine))
    (mine / "config.yaml").write_text("name: mine\n")
    assert "output: expected a folder for the run alone" in refuse("train", *demo_arguments(f"output={mine}"))
    assert (mine / "config.yaml").read_text() == "name: mine\n"


def test_a_training_that_diverges_stops_and_keeps_its_last_good_checkpoint(demo_arguments, tmp_path, capsys):
    diverging = ["optimizer.learning_rate=1e30", "loop.checkpoint_every_steps=1", "loop.log_every_steps=1", "loop.learning_rate_decay=none"]
    assert main(["train", *demo_arguments(*diverging)]) == FAILED
    assert "'click/loss' is nan" in capsys.readouterr().err
    assert len(list((tmp_path / "run of a test" / "checkpoints").iterdir())) >= 1


def test_a_schema_without_ids_trains(demo_arguments, tmp_path):
    lines = ["schema: {features: {price: {kind: numeric}, is_weekend: {kind: binary}}, labels: {click: {}}}"]
    lines += ["name: plain", "model: {kind: ranker}", "data: {path: x, train: {end: 2026-01-02}}"]
    (tmp_path / "plain.yaml").write_text("\n".join(lines))
    arguments = [argument for argument in demo_arguments("loop.max_steps=12")[1:] if not argument.startswith("model.")]
    assert main(["train", str(tmp_path / "plain.yaml"), *arguments]) == DONE


def write_side_table(folder, ads):
    """A row for every user of the log but the first, who is one of two hundred."""
    users = sorted({user for file in ads.rglob("*.parquet") for user in pq.ParquetFile(file).read(["user_id"]).column(0).to_pylist()})
    table = pa.table({"user_id": users[1:], "clicks": [float(user) for user in range(1, len(users))]})
    pq.write_table(table, folder / "users.parquet")


def test_a_join_is_told_kept_and_backfilled(ads, demo_arguments, tmp_path, capsys, refuse):
    write_side_table(tmp_path, ads)
    join = f"{{kind: join, table: '{tmp_path / 'users.parquet'}', key: [user_id], columns: [clicks]}}"
    settings = [f"data.transforms=[{join}]", "schema.features.clicks={kind: numeric}", "loop.max_steps=4"]
    assert main(["train", *demo_arguments(*settings)]) == DONE
    joins = json.loads((tmp_path / "run of a test" / "joins.json").read_text())
    assert sorted(joins) == ["test", "train"]
    found = joins["train"]["data.transforms[0]"]
    assert 0.9 < found["match_rate"] < 1
    assert sorted(found["days"]) == ["2026-01-01", "2026-01-02"]

    small = f"data.transforms=[{join[:-1]}, memory_rows: 50}}]"
    capsys.readouterr()
    assert main(["train", *demo_arguments(small, *settings[1:], output="on disk")]) == DONE
    assert json.loads((tmp_path / "on disk" / "joins.json").read_text()) == joins
    backfill = ["data", "backfill", *demo_arguments(small, settings[1]), "--out", str(tmp_path / "ads with clicks")]
    assert main([*backfill, "--dry-run"]) == DONE
    assert not (tmp_path / "ads with clicks").exists()
    assert main(backfill) == DONE
    assert main(["train", *demo_arguments(*settings[1:], f"data.path={tmp_path / 'ads with clicks'}", output="later")]) == DONE
    before, *others = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run of a test", "on disk", "later"))
    assert others == [before, before]

    capsys.readouterr()
    strict = f"data.transforms=[{join[:-1]}, min_match_rate: 1.0}}]"
    assert "min_match_rate" in refuse("train", *demo_arguments(strict, settings[1], output="third"))


def test_wrong_usage_ends_with_the_same_code(capsys):
    for arguments in ([], ["trian"], ["train"], ["train", "c.yaml", "--max-steps", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == WRONG_INPUT
    assert "Settings are given as key=value" in capsys.readouterr().err


def test_torchrec_that_is_missing_or_broken_is_named_with_its_fix(demo_arguments, refuse, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrec", None)
    message = refuse("train", *demo_arguments("embeddings.engine=torchrec"))
    assert "embeddings.engine: expected an engine that is installed. Received: 'torchrec'. Fix: pip install 'mlenv[torchrec]'" in message

    (tmp_path / "built_for_another_torch.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(MlenvError, match=r"built_for_another_torch: cannot be imported \(OSError: undefined symbol.*Fix: pip install"):
        require("built_for_another_torch", extra="torchrec")


def test_simulate_says_what_it_would_do_and_refuses_what_it_cannot(capsys, refuse, tmp_path):
    assert main(["data", "simulate", "--out", str(tmp_path / "ads"), "num_days=2", "--dry-run"]) == DONE
    assert "num_days: 2" in capsys.readouterr().out
    assert "num_dys: expected a key of SimulationConfig" in refuse("data", "simulate", "--out", str(tmp_path / "ads"), "num_dys=2")
    assert "expected" in refuse("data", "convert", "kuairand", "--source", str(tmp_path), "--out", str(tmp_path / "out"))


def test_validate_ends_with_3_when_the_data_fail(demo_arguments, ads, capsys, tmp_path):
    assert main(["validate", *demo_arguments("checks.may_drift=[is_weekend,history,item_age_days]")]) == DONE
    assert capsys.readouterr().out.startswith("pass: 0 of ")
    prices = rewrite(ads, tmp_path / "changed", lambda table: replaced(table, "price", pc.multiply(table["price"], 1000.0)))
    days = ["data.train.end=2026-01-01", "data.test.start=2026-01-02", "data.test.end=2026-01-02"]
    assert main(["validate", *demo_arguments(prices, *days), "--out", str(tmp_path / "found")]) == GATE
    printed = capsys.readouterr().out
    assert re.search(r"FAIL  out_of_range +price  \S+ \(limit 0\.05\)\n .*To do: look for a changed unit", printed)
    assert f"page     {tmp_path / 'found' / 'validation.html'}" in printed
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["statistics.json", "validation.html", "validation.json"]


def test_a_training_can_be_made_to_depend_on_its_data(ads, demo_arguments, capsys, tmp_path):
    assert main(["train", *demo_arguments("loop.max_steps=12")]) == DONE
    baseline = f"checks.baseline={tmp_path / 'run of a test'}"
    prices = rewrite(ads, tmp_path / "changed", lambda table: replaced(table, "price", pc.multiply(table["price"], 1000.0)))
    window = ["data.train.start=2026-01-02", "checks.before_training=true", "checks.may_drift=[item_age_days]"]
    capsys.readouterr()
    assert main(["train", *demo_arguments(prices, *window, baseline, "loop.max_steps=12", output="another")]) == GATE
    assert "data.train failed" in (message := capsys.readouterr().err)
    assert "- out_of_range of price: " in message
    assert not (tmp_path / "another").exists()
    assert main(["train", *demo_arguments(*window, baseline, "loop.max_steps=12", output="another")]) == DONE
    stored = [json.loads((tmp_path / run / "statistics.json").read_text()) for run in ("run of a test", "another")]
    assert [entry["rows"] for entry in stored] == [4000, 2000]


def test_a_vocabulary_composes_with_the_schema_that_it_is_for(demo_arguments, capsys, refuse, tmp_path):
    assert main(["data", "vocabulary", demo_arguments()[0], "device", "--min-count", "600", *demo_arguments()[1:]]) == DONE
    (tmp_path / "device.yaml").write_text(capsys.readouterr().out)
    (tmp_path / "both.yaml").write_text(f"extends: [{demo_arguments()[0]}, device.yaml]")
    table = compose(tmp_path / "both.yaml").schema.tables["device"]
    assert 1 <= len(table.vocabulary) < 3
    assert (table.num_embeddings, table.embedding_dim, table.out_of_range) == (len(table.vocabulary) + 1, 16, "hash")
    assert "Fix: did you mean 'device'" in refuse("data", "vocabulary", demo_arguments()[0], "devise", *demo_arguments()[1:])


def test_ui_starts_mlflow(capsys, monkeypatch):
    assert main(["ui", "--dry-run", "--port", "5001"]) == DONE
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5001" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["ui"]) == DONE
    assert "http://127.0.0.1:9" in capsys.readouterr().out
