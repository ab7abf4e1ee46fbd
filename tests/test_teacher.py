"""Teachers by checkpoint, by MLflow, by column: what they say, what they are refused for, how a student learns from them."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient

from mlenv import Experiment, compose, train
from mlenv.cli import main
from mlenv.config import DistillationConfig, HiddenDistillationConfig
from mlenv.errors import DONE, WRONG_INPUT, ConfigError
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.evaluate import score
from mlenv.loops.journal import Journal
from mlenv.teacher import Teacher

SHORT = ("loop.max_steps=6", "loop.learning_rate_decay=none", "loop.log_every_steps=2", "loop.checkpoint_every_steps=3")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(ads, tmp_path_factory):
    """The output folder of a trained teacher, tracked in MLflow, its predictions calibrated."""
    folder = tmp_path_factory.mktemp("a teacher")
    uri = f"sqlite:///{folder}/mlflow.db"
    settings = [f"data.path={ads}", "data.batch_size=256", "data.train.end=2026-01-01", f"output={folder / 'big'}", *SHORT]
    windows = ["data.test=null", "data.validation={start: 2026-01-02, end: 2026-01-02}", "calibration.click.kind=platt"]
    tracked = ["tracking.enabled=true", f"tracking.uri={uri}", "embeddings.engine=torch", "model.deep.dropout=0.1"]
    train(compose("examples/demo/ranker.yaml", [*settings, *windows, *tracked]))
    return folder / "big", uri


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    from tests.conftest import ROOT

    monkeypatch.chdir(ROOT)


def student(demo_arguments, *settings, output="student"):
    arguments = demo_arguments(*SHORT, *settings, output=output)
    return compose(arguments[0], arguments[1:])


def wide_tables(schema):
    """The student's tables, twice as wide."""
    return [f"schema.tables.{name}.embedding_dim={2 * table.embedding_dim}" for name, table in schema.tables.items()]


def test_a_teacher_says_what_its_own_evaluation_says(teacher, demo_arguments):
    config = student(demo_arguments)
    with Experiment(replace(config, output=str(teacher[0]))) as experiment:
        experiment.load()
        batch, expected = next(score(experiment.model, experiment.source("test")))
    found = Teacher(DistillationConfig(teacher=str(teacher[0])), config.schema, CPU, tracking_uri="")(batch)
    torch.testing.assert_close(found.logits, expected)
    assert not found.logits.requires_grad

    checkpoint = list_checkpoints(teacher[0] / "checkpoints")[-1]
    hidden = DistillationConfig(teacher=str(checkpoint), hidden=HiddenDistillationConfig(), precision="bf16-mixed")
    found = Teacher(hidden, config.schema, CPU, tracking_uri="")(batch)
    assert found.hidden.shape[0] == len(batch)
    torch.testing.assert_close(found.logits, expected, atol=0.05, rtol=0.05)

    calibrated = Teacher(DistillationConfig(teacher=str(teacher[0]), calibrated=True), config.schema, CPU, tracking_uri="")(batch)
    fitted = json.loads((checkpoint / "calibrators.json").read_text())["click"]["buffers"]
    torch.testing.assert_close(calibrated.logits[:, 0], expected[:, 0] * fitted["scale"] + fitted["offset"], atol=1e-4, rtol=1e-4)


def test_a_student_with_other_tables_more_features_and_another_order_reads_the_teacher_alike(teacher, demo_arguments):
    config = student(demo_arguments)
    schema = config.schema
    wider = {name: replace(table, embedding_dim=8 * (1 + place)) for place, (name, table) in enumerate(schema.tables.items())}
    features = dict(reversed(schema.features.items()))
    fewer = dict(list(schema.labels.items())[::-1])
    other = replace(schema, features=features, tables=wider, labels=fewer)
    settings = DistillationConfig(teacher=str(teacher[0]))
    with Experiment(replace(config, schema=other)) as experiment, Experiment(config) as plain:
        batch = next(experiment.source("test").batches())
        expected = Teacher(settings, schema, CPU, tracking_uri="")(next(plain.source("test").batches())).logits
    torch.testing.assert_close(Teacher(settings, other, CPU, tracking_uri="")(batch).logits, expected.flip(1))


@pytest.mark.parametrize("loss", ["soft_labels", "pairwise"])
def test_a_student_learns_from_it_and_continues_to_the_bit(teacher, demo_arguments, tmp_path, loss):
    distillation = f"{{teacher: {teacher[0]}, loss: {loss}, temperature: 2, weight: 2, final_weight: 0, hidden: {{weight: 0.1}}}}"
    settings = [f"objective.distillation={distillation}", "objective.balance.kind=pcgrad"]
    whole = student(demo_arguments, *settings, output="whole")
    train(whole)
    with Experiment(student(demo_arguments, *settings, output="stopped")) as experiment:
        from mlenv.loops.fit import fit

        fit(experiment.step, experiment.source("train"), experiment.run, replace(whole.loop, max_steps=4))
    train(student(demo_arguments, *settings, output="stopped"))
    terms = ("click/loss", "click/distillation", "hidden_distillation")
    lines, again = (
        [
            {term: line[f"train/{term}"] for term in terms}
            for line in Journal(tmp_path / name / "metrics.jsonl").read()
            if "examples" in line
        ]
        for name in ("whole", "stopped")
    )
    assert lines == again
    assert len(lines) == 3
    assert all(value > 0 for line in lines for value in line.values())


def test_mlflow_keeps_teachers_too(teacher, demo_arguments):
    folder, uri = teacher
    client = MlflowClient(uri)
    run = client.search_runs([client.get_experiment_by_name("mlenv").experiment_id])[0].info.run_id
    config = student(demo_arguments)
    local = Teacher(DistillationConfig(teacher=str(folder)), config.schema, CPU, tracking_uri="")
    stored = Teacher(DistillationConfig(teacher=f"runs:/{run}/model"), config.schema, CPU, tracking_uri=uri)
    with Experiment(config) as experiment:
        batch = next(experiment.source("test").batches())
    torch.testing.assert_close(stored(batch).logits, local(batch).logits)
    with pytest.raises(ConfigError, match=r"objective\.distillation\.teacher: expected a model that MLflow keeps"):
        Teacher(DistillationConfig(teacher="runs:/0123/model"), config.schema, CPU, tracking_uri=uri)
    assert "MLFLOW_TRACKING_URI" not in os.environ  # nobody after it is sent to the teacher's MLflow


def test_columns_teach(ads, demo_arguments, tmp_path):
    folder = tmp_path / "with teacher"
    for file in ads.glob("*/*.parquet"):
        rows = pq.read_table(file)
        target = folder / file.relative_to(ads)
        target.parent.mkdir(parents=True)
        pq.write_table(rows.append_column("said", rows["true_click_probability"]), target)
    settings = [f"data.path={folder}", "schema.labels.click.teacher=said", "objective.distillation.weight=1"]
    train(student(demo_arguments, *settings))
    line = next(line for line in Journal(tmp_path / "student" / "metrics.jsonl").read() if "train/click/distillation" in line)
    assert line["train/click/distillation"] > 0
    assert math.isnan(line["train/conversion/distillation"])  # no column says anything about it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["schema.features.user_country=null", "schema.tables.user_country=null"], "features.user_country: the student has none"),
        (["schema.tables.item.num_embeddings=600"], "tables.item.num_embeddings: 500 became 600"),
        (["schema.labels={click: null, conversion: null, other: {column: click}}"], "a teacher of one of the tasks ['other']"),
        (
            ["objective.distillation.hidden={teacher_part: tower}"],
            "objective.distillation.hidden.teacher_part: expected the name of a part",
        ),
        (
            ["objective.distillation.hidden={student_part: tower}"],
            "objective.distillation.hidden.student_part: expected the name of a part",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_by_the_dry_run(teacher, demo_arguments, capsys, change, message):
    settings = [f"objective.distillation.teacher={teacher[0]}", *change]
    assert main(["train", *demo_arguments(*settings), "--dry-run"]) == WRONG_INPUT
    assert message in capsys.readouterr().err


def test_the_dry_run_loads_the_teacher(teacher, demo_arguments, capsys, tmp_path):
    assert main(["train", *demo_arguments(f"objective.distillation.teacher={teacher[0]}"), "--dry-run"]) == DONE
    distillation = yaml.safe_load(capsys.readouterr().out)["objective"]["distillation"]
    assert distillation["calibrated"] is False
    for nothing in (tmp_path, tmp_path / "missing"):
        assert main(["train", *demo_arguments(f"objective.distillation.teacher={nothing}"), "--dry-run"]) == WRONG_INPUT
        assert "objective.distillation.teacher: expected a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.distillation.weight=1"], "schema.labels: expected a teacher column for at least one task"),
        (["objective.losses.click.kind=pairwise", "schema.request=''"], "schema.request: expected a column"),
        (["objective.losses.clik.kind=focal"], "did you mean 'click'"),
        (["objective.losses.click.kind=foxal"], "did you mean 'focal'"),
        (["objective.balance.kind=pcgrad", "objective.balance.part=heds"], "objective.balance.part: expected the name of a part"),
    ],
)
def test_an_objective_that_cannot_be_built_is_refused_by_the_dry_run(demo_arguments, capsys, settings, message):
    assert main(["train", *demo_arguments(*settings), "--dry-run"]) == WRONG_INPUT
    assert message in capsys.readouterr().err


def test_of_a_training_that_chose_its_best_step_that_one_teaches(teacher, demo_arguments, tmp_path):
    copy = tmp_path / "chose"
    last = list_checkpoints(teacher[0] / "checkpoints")[-1]
    shutil.copytree(last, copy / "checkpoints" / "step-00000009")
    shutil.copytree(last, copy / "best" / "step-00000003")
    for file in (copy / "checkpoints" / "step-00000009").glob("*.safetensors"):
        file.write_bytes(b"not this one")
    Teacher(DistillationConfig(teacher=str(copy)), student(demo_arguments).schema, CPU, tracking_uri="")
