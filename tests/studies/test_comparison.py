"""Finding what is to be compared, and refusing what cannot be; test_trials.py trains."""

from __future__ import annotations

import json

import pytest

from mlenv.cli import main
from mlenv.config import WindowConfig
from mlenv.datasets.stored_files import StoredFile
from mlenv.errors import DONE, WRONG_INPUT, DataError
from mlenv.records.dataset_record import DatasetRecord, WindowRecord
from mlenv.studies.comparison import compare


def write_run(folder, seed, auc, test_file="date=2026-01-03/part-0.parquet"):
    """What a finished training leaves, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"click/auc": auc, "click/grouped_auc": None, "click/calibration": 1.0}))
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    (folder / "dataset.json").write_text(record(test_file).to_json())


def record(test_file):
    files = (StoredFile(path=test_file, rows=1, row_groups=1, bytes=1, modified_ns=None, footer="x", content=None),)
    window = WindowRecord(
        window=WindowConfig(),
        days=("2026-01-03",),
        columns={},
        num_stored_rows=1,
        num_rows=1,
        fingerprint="print",
        joins={},
        passed_over=(),
        findings=(),
        files=files,
    )
    return DatasetRecord(
        path="ads", content_hash="footers", schema_fingerprint="schema", event_time="", transforms=[], windows={"test": window}
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (first, second) in enumerate([(0.7801, 0.7815), (0.7812, 0.7822), (0.7795, 0.7809), (0.7808, 0.7818), (0.7803, 0.7817)]):
        write_run(tmp_path / f"old/{seed}", seed, first)
        write_run(tmp_path / f"new-{seed}", seed, second)
    return tmp_path


def test_finished_runs_are_compared(runs, capsys):
    assert main(["compare", "old", "new-*", "--out", "versus"]) == DONE
    assert capsys.readouterr().out.startswith("new is better than old in click/auc by 0.0012 (95 % interval 0.00039 to 0.0021).\n")
    page = (runs / "versus/comparison.html").read_text()
    assert "0.78038" in page  # the mean of old
    assert "Welch" in page
    found = compare("old", "new-*", out=runs / "versus", is_paired=True).differences
    assert [(one.metric, one.is_paired, one.freedom) for one in found] == [("click/auc", True, 4)]
    assert "paired t test" in (runs / "versus/comparison.html").read_text()


def test_runs_that_were_measured_on_other_rows_are_refused(runs):
    write_run(runs / "old/5", 5, 0.78, "date=2026-01-04/part-0.parquet")
    with pytest.raises(DataError, match=r"old/5/dataset\.json: expected the test rows of old/0"):
        compare("old", "new-*", out=runs / "versus")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["old", "nothing"], "nothing: expected a config file, or two or more output folders with metrics.json. Received: '0 of them'"),
        (["old", "new-1"], "Received: '1 of them'. Fix: train with more seeds"),
        (["old", "new-*", "--metric", "click/acu"], "--metric: expected TASK/METRIC with a metric of"),
        (["old", "new-*", "--metric", "click/grouped_auc"], "click/grouped_auc: expected a metric that metrics.json of every run has"),
        (["old", "new-*", "loop.max_steps=3"], "expected no settings for trainings that are finished"),
        (["old", "new-[0-3]", "--paired"], "--paired: expected the same seeds of both models"),
        (["old", "new-*", "--out", "nowhere/versus"], "expected a folder whose parent exists"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, arguments, message, capsys):
    assert main(["compare", *(arguments if "--out" in arguments else [*arguments, "--out", "versus"])]) == WRONG_INPUT
    assert message in capsys.readouterr().err


def test_configs_with_other_test_windows_are_refused(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(tiny_config)
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nname: two\n")
    command = ["compare", "one.yaml", "two.yaml", "--out", "versus", "--dry-run"]
    assert main(command) == DONE
    assert main([*command, "--seeds", "1"]) == WRONG_INPUT
    assert "--seeds: expected at least 2" in capsys.readouterr().err
    assert main([*command, "data.test=null"]) == WRONG_INPUT
    assert "which the models are compared on" in capsys.readouterr().err
    (tmp_path / "two.yaml").write_text("extends: one.yaml\ndata: {test: {start: 2026-01-02, end: 2026-01-02}}\n")
    assert main(command) == WRONG_INPUT
    assert "expected the same test window of the same data in both" in capsys.readouterr().err
    assert not (tmp_path / "versus").exists()
