"""A stored model on the rows of its test, and on rows that are not what they were."""

from __future__ import annotations

import datetime
import json
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlenv.cli import main
from mlenv.config import WindowConfig
from mlenv.errors import DONE, GATE, WRONG_INPUT, DataError, MlenvError
from mlenv.inference.stored_scorer import HeldOut, StoredScorer, open_scorer, rows_for
from mlenv.monitoring.check import MONITOR_FILE, MONITOR_PAGE, Checked, check_model
from mlenv.monitoring.observation import observe, read_observation, reference_of
from mlenv.monitoring.server import MonitorMetrics, serve_monitor

SOON = datetime.datetime(2026, 1, 4, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def scorer(stored_ranker: Path) -> StoredScorer:
    return open_scorer(str(stored_ranker))


@pytest.fixture(scope="module")
def reference(scorer, tmp_path_factory):
    file = tmp_path_factory.mktemp("monitor") / "reference.json"
    written = reference_of(scorer, file)
    read = reference_of(scorer, file)
    assert read.to_json() == written.to_json()
    assert {task: counts.rows for task, counts in read.scores.items()} == dict.fromkeys(scorer.schema.tasks, read.statistics.rows)
    return read


@pytest.fixture(scope="module")
def broken(ads: Path, tmp_path_factory) -> Path:
    """The rows of the test with prices of another unit, hardly any device, and no labels."""
    folder = tmp_path_factory.mktemp("broken") / "ads" / "date=2026-01-03"
    folder.mkdir(parents=True)
    table = pq.read_table(ads / "date=2026-01-03", partitioning=None).drop(["click", "conversion"])
    price, device = table.schema.get_field_index("price"), table.schema.get_field_index("device")
    table = table.set_column(price, "price", pa.compute.multiply(table["price"], 1000.0))
    some = pa.array([value if row % 10 == 0 else None for row, value in enumerate(table["device"].to_pylist())])
    pq.write_table(table.set_column(device, "device", some), folder / "part.parquet")
    return folder.parent


def check(scorer, reference, rows, at=SOON, **options) -> Checked:
    return check_model("ranker", scorer, rows, reference, at, **options)


def test_the_rows_of_the_test_pass(scorer, reference):
    checked = check(scorer, reference, rows_for(scorer))
    found = {(one.check, one.subject): one for one in checked.verdict.findings}
    assert [one for one in checked.verdict.findings if one.check.startswith(("score_psi", "score_distance")) and one.value > 0] == []
    assert found["data_age_hours", "rows"].value < 1
    assert found["model_age_days", "model"].value == 1
    assert ("score_calibration", "click") in found


def test_what_has_moved_is_found_and_named(scorer, reference, broken, tmp_path):
    checked = check(scorer, reference, HeldOut(path=str(broken), window=WindowConfig()), at=SOON.replace(year=2027), has_labels=False)
    raised = {(one.check, one.subject) for one in checked.verdict.raised}
    assert raised >= {("coverage_drop", "device"), ("out_of_range", "price"), ("data_age_hours", "rows"), ("model_age_days", "model")}
    assert checked.verdict.severity == "fail"
    assert not [one for one in checked.verdict.findings if one.check == "score_calibration"]
    checked.write(tmp_path / "out", scorer)
    assert json.loads((tmp_path / "out" / MONITOR_FILE).read_text())["severity"] == "fail"
    page = (tmp_path / "out" / MONITOR_PAGE).read_text()
    assert "A model in use" in page
    assert page.count("prediction</text>") == len(scorer.schema.tasks)
    assert "10.00% of the rows have it" in page


def test_scores_that_have_moved_are_found(scorer, reference):
    now = observe(scorer, rows_for(scorer))
    mirrored = {task: replace(counts, counts=counts.counts[::-1]) for task, counts in now.scores.items()}
    checked = check(scorer, replace(reference, scores=mirrored), rows_for(scorer))
    assert {one.subject for one in checked.verdict.raised if one.check == "score_psi"} == set(scorer.schema.tasks)


def test_prometheus_reads_the_last_check(scorer, reference, caplog):
    checked, stop, answers = check(scorer, reference, rows_for(scorer)), threading.Event(), []

    def checks() -> Checked:
        if len(answers) == 0:
            answers.append("first")
            return checked
        port = next(record.args[1] for record in caplog.records if "figures at" in record.msg)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            answers.append(answer.read().decode())
        stop.set()
        raise MlenvError("the log is away")

    caplog.set_level("INFO")
    serve_monitor(checks, host="127.0.0.1", port=0, every_seconds=0.01, stop=stop)
    families = text_string_to_metric_families(answers[1])
    samples = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    assert samples["mlenv_monitor_rows",] == checked.now.statistics.rows
    assert samples["mlenv_monitor_state", "model_age_days", "model"] == 0
    assert samples["mlenv_monitor_mean_prediction", "click"] == checked.now.scores["click"].mean
    assert "not checked: the log is away" in caplog.text


def test_a_check_that_fails_is_counted_and_the_last_figures_stay(scorer, reference):
    metrics = MonitorMetrics()
    metrics.update(check(scorer, reference, rows_for(scorer)))
    metrics.fail()
    assert metrics.registry.get_sample_value("mlenv_monitor_errors_total") == 1
    assert metrics.registry.get_sample_value("mlenv_monitor_rows") == reference.statistics.rows


def test_the_command(stored_ranker, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, now = str(stored_ranker), ["--now", "2026-01-04T00:00"]
    assert main(["monitor", name, *now, "--reference", "reference.json", "--out", "out"]) == DONE
    assert (tmp_path / "out" / MONITOR_PAGE).exists()
    assert main(["monitor", name, *now, "--reference", "reference.json", "--path", str(broken), "--no-labels"]) == GATE
    assert "FAIL  coverage_drop" in capsys.readouterr().out
    assert main(["monitor", name, "--last-days", "1", "--start", "2026-01-01"]) == WRONG_INPUT
    assert main(["monitor", name, *now, "--start", "2027-01-01"]) == WRONG_INPUT
    assert main(["monitor", name, "--out", "no/where"]) == WRONG_INPUT
    assert main(["monitor", name, "--path", str(broken), "--reference", "reference.json"]) == WRONG_INPUT
    assert "click" in capsys.readouterr().err  # the labels that are not there are named


def test_wrong_references_are_refused(scorer, tmp_path):
    file = tmp_path / "reference.json"
    file.write_text('{"format": 1, "model": "other"}')
    with pytest.raises(DataError, match="what a model saw in a window"):
        read_observation(file)
