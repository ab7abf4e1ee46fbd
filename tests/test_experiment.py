"""Training end to end: what is trained, what is kept, what continues, what is refused."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from processes import Command
from safetensors.torch import load_file
from sklearn.metrics import log_loss, roc_auc_score

from mlenv import Experiment, compose, evaluate, fit, predict, train
from mlenv.errors import DONE, CheckpointError, ConfigError, MlenvError
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.fit import Progress
from mlenv.loops.journal import Journal
from mlenv.loops.training_state import model_tensors

ENGINES = ["torch", "torchrec"]
TIMED = {"time", "train/examples_per_second", "train/tflops_per_second", "train/data_wait_share"}
"""What a journal says of the clock."""


def config(arguments):
    return compose(arguments[0], arguments[1:])


def comparable(metrics):
    """Metrics without nan, which equals nothing, not even itself."""
    return {key: None if value is not None and math.isnan(value) else value for key, value in metrics.items()}


def tensors_of(checkpoint: Path):
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def final_state(output: Path):
    checkpoint = list_checkpoints(output / "checkpoints")[-1]
    journal = [
        {key: value for key, value in comparable(line).items() if key not in TIMED} for line in Journal(output / "metrics.jsonl").read()
    ]
    return checkpoint.name, tensors_of(checkpoint), journal, json.loads((output / "metrics.json").read_text())


def has_step(output: Path, step: int) -> bool:
    """Whether the step is in the journal."""
    journal = output / "metrics.jsonl"
    return journal.exists() and b'"step": %d,' % step in journal.read_bytes()


def assert_same_tensors(tensors, others):
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, others[key]), key


def assert_identical(one: Path, other: Path):
    (name, tensors, journal, metrics), (other_name, other_tensors, other_journal, other_metrics) = final_state(one), final_state(other)
    assert name == other_name
    assert_same_tensors(tensors, other_tensors)
    assert journal == other_journal
    assert metrics == other_metrics
    best, other_best = (list_checkpoints(output / "best")[-1:] for output in (one, other))
    assert len(best) == len(other_best)
    for path, other_path in zip(best, other_best, strict=True):
        assert path.name == other_path.name
        assert_same_tensors(tensors_of(path), tensors_of(other_path))
        assert (path / "progress.json").read_text() == (other_path / "progress.json").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_training_is_identical_to_the_bit(demo_arguments, tmp_path, engine):
    for output in ("one", "two"):
        train(config(demo_arguments(f"embeddings.engine={engine}", output=output)))
    assert_identical(tmp_path / "one", tmp_path / "two")


BEST_STEP = [
    *("data.train.end=2026-01-01", "data.validation.start=2026-01-02", "data.validation.end=2026-01-02", "data.num_epochs=8"),
    *("loop.evaluate_every_steps=7", "loop.monitor=click/auc", "loop.learning_rate_decay=plateau", "loop.stop_after_evaluations=4"),
]
"""Evaluations fall between the checkpoints."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["embeddings.engine=torch"],
        ["embeddings.engine=torchrec"],
        [*BEST_STEP, "embeddings.optimizer=adam", "embeddings.weight_decay=0.01", "optimizer.gradient_clip_norm=1"],
        [*BEST_STEP, "embeddings.engine=torchrec"],
        ["optimizer={kind: lion, weight_decay: 0.1}", "embeddings.tables={user: {optimizer: adam, learning_rate: 0.01}}"],
        ["optimizer.kind=sgd", "embeddings={engine: torchrec, tables: {item: {optimizer: sgd, learning_rate: 10}}}"],
    ],
    ids=["torch", "torchrec", "best step, torch", "best step, torchrec", "lion", "sgd"],
)
def test_a_killed_training_ends_as_if_it_had_never_been_killed(demo_arguments, tmp_path, settings):
    train(config(demo_arguments(*settings, output="undisturbed")))

    output, arguments = tmp_path / "killed", ["train", *demo_arguments(*settings, output="killed")]
    command, checkpoints = Command(arguments, tmp_path / "said"), output / "checkpoints"
    try:
        # The checkpoint of step 10 is written while the steps go on.
        command.wait_until(lambda: has_step(output, 15) and bool(list_checkpoints(checkpoints)))
    finally:
        command.end()
    assert command.exit_code == -signal.SIGKILL
    stopped_at = list_checkpoints(checkpoints)[-1].name

    again = Command(arguments, tmp_path / "said again")
    assert again.wait() == DONE, again.said
    assert f"continues from {checkpoints / stopped_at}, step " in again.said
    assert_identical(tmp_path / "undisturbed", tmp_path / "killed")


class KilledError(Exception):
    pass


def train_until_killed(settings, killed_after):
    """Trains up to a step, and leaves everything as it is then."""

    def advance_until_killed(batches, progress):
        if progress.step == killed_after:
            raise KilledError
        return advance(batches, progress)

    with Experiment(settings) as experiment:
        advance = experiment.step.advance
        experiment.step.advance = advance_until_killed
        with pytest.raises(KilledError):
            fit(experiment.step, experiment.source("train"), experiment.run, settings.loop)


@pytest.mark.parametrize("killed_after", [9, 19, 26])
def test_the_best_step_does_not_depend_on_a_training_being_killed(demo_arguments, tmp_path, killed_after):
    settings = [*BEST_STEP, "embeddings.optimizer=adam", "loop.max_steps=40"]
    train(config(demo_arguments(*settings, output="undisturbed")))
    killed = config(demo_arguments(*settings, output="killed"))
    train_until_killed(killed, killed_after)
    train(killed)
    assert_identical(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer.kind=adam", "loop.accumulate_batches=3", "loop.learning_rate_decay=cosine"],
        ["optimizer.kind=sgd", "loop.accumulate_batches=2", "loop.ema_decay=0.9", "embeddings.optimizer=sgd"],
        ["optimizer.kind=lion", "embeddings.engine=torchrec", "loop.ema_decay=0.99"],
    ],
    ids=["adam, accumulated, cosine", "sgd, accumulated, averaged", "lion, averaged, torchrec"],
)
def test_what_the_optimizers_keep_survives_a_kill(demo_arguments, tmp_path, settings):
    settings = [*BEST_STEP, "loop.warmup_steps=12", "loop.max_steps=25", *settings]
    train(config(demo_arguments(*settings, output="undisturbed")))
    killed = config(demo_arguments(*settings, output="killed"))
    train_until_killed(killed, 17)
    train(killed)
    assert_identical(tmp_path / "undisturbed", tmp_path / "killed")


def test_small_batches_that_make_one_step_train_as_large_ones(demo_arguments, tmp_path):
    settings = ["loop.max_steps=12", "loop.log_every_steps=1", "model.deep.dropout=0", "loop.warmup_steps=4", "data.num_epochs=1"]
    sizes = {"large": ["data.batch_size=256"], "small": ["data.batch_size=64", "loop.accumulate_batches=4"]}
    for output, size in sizes.items():
        assert train(config(demo_arguments(*settings, *size, output=output))).steps == 12
    (large, large_tensors, large_lines, _), (small, small_tensors, small_lines, _) = (final_state(tmp_path / output) for output in sizes)
    assert large == small
    for line, other in zip(large_lines, small_lines, strict=True):
        figures = {key: value for key, value in line.items() if key.startswith("train/") and key not in TIMED}
        assert {key: other[key] for key in figures} == pytest.approx(figures, rel=1e-4)
    for name, tensor in large_tensors.items():
        torch.testing.assert_close(small_tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_data_may_end_within_a_step(demo_arguments, tmp_path):
    whole = train(config(demo_arguments("data.batch_size=512", output="whole"))).steps
    accumulated = train(config(demo_arguments("data.batch_size=512", "loop.accumulate_batches=5", output="accumulated"))).steps
    assert accumulated == -(-whole // 5)
    assert whole % 5
    examples = [
        json.loads((list_checkpoints(tmp_path / name / "checkpoints")[-1] / "progress.json").read_text())["examples"]
        for name in ("whole", "accumulated")
    ]
    assert examples[0] == examples[1] == 4 * 4000


@pytest.mark.parametrize("engine", ENGINES)
def test_the_averaged_weights_are_evaluated_and_kept_as_the_model(demo_arguments, tmp_path, engine):
    settings = [*BEST_STEP[:3], "loop.evaluate_every_steps=15", f"embeddings.engine={engine}", "loop.ema_decay=0.7", "loop.max_steps=15"]
    with Experiment(config(demo_arguments(*settings, output="by hand"))) as experiment:
        batches = experiment.source("train").batches()
        experiment.run.restore()
        name = next(name for name in model_tensors(experiment.model) if name.endswith("heads.click.1.weight"))
        weight = dict(experiment.model.named_parameters())[name]
        expected = weight.detach().double()
        for step in range(15):
            experiment.step.advance(batches, Progress(step=step))
            decay = min(0.7, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weight.detach().double()
        last = weight.detach().clone()
    train(config(demo_arguments(*settings)))
    output = tmp_path / "run of a test"
    tensors = tensors_of(list_checkpoints(output / "checkpoints")[-1])
    torch.testing.assert_close(tensors[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(tensors[f"trained.{name}"], last)
    assert not any(key.startswith("trained.") and "tables." in key for key in tensors)

    # Another training's config, without the average, reads the averaged model as well.
    validated = next(line for line in Journal(output / "metrics.jsonl").read() if "validation/click/auc" in line)
    for loaded in (settings, [*settings[:-2], settings[-1]]):
        with Experiment(config(demo_arguments(*loaded))) as experiment:
            experiment.load()
            assert torch.equal(dict(experiment.model.named_parameters())[name], tensors[name])
            assert evaluate(experiment.model, experiment.source("validation")).metrics["click/auc"] == validated["validation/click/auc"]
    with pytest.raises(CheckpointError, match=r"loop\.ema_decay: 0\.7 became 0\.0"):
        train(config(demo_arguments(*settings[:-2], settings[-1])))


def test_a_warm_up_longer_than_the_training_is_refused_before_anything_is_written(demo_arguments, tmp_path):
    with pytest.raises(ConfigError, match=r"loop\.warmup_steps: expected fewer than the 125 steps of the training"):
        train(config(demo_arguments("loop.warmup_steps=125")))
    assert list(tmp_path.iterdir()) == []


def test_the_best_step_is_measured_and_a_training_that_stopped_stays_stopped(demo_arguments, tmp_path):
    settings = config(demo_arguments(*BEST_STEP, "embeddings.learning_rate=0.5", "loop.stop_after_evaluations=2"))
    result = train(settings)
    output = tmp_path / "run of a test"
    lines = Journal(output / "metrics.jsonl").read()
    curve = {line["step"]: line["validation/click/auc"] for line in lines if "validation/click/auc" in line}
    best = max(curve, key=curve.get)
    assert result.steps == max(curve) == best + 14
    with Experiment(settings) as experiment:
        assert experiment.load() == output / "best" / f"step-{best:08d}"
        assert evaluate(experiment.model, experiment.source("validation")).metrics["click/auc"] == curve[best]
        assert comparable(evaluate(experiment.model, experiment.source("test")).metrics) == comparable(result.evaluation.metrics)
    before = final_state(output)
    assert train(settings).steps == result.steps
    assert (before[0], *before[2:]) == (final_state(output)[0], *final_state(output)[2:])
    longer = [*BEST_STEP, "embeddings.learning_rate=0.5", "loop.stop_after_evaluations=3"]
    assert train(config(demo_arguments(*longer))).steps > result.steps
    for change in ("loop.monitor=conversion/auc", "loop.evaluate_every_steps=9", "data.validation.end=2026-01-03"):
        with pytest.raises(CheckpointError, match=change.partition("=")[0]):
            train(config(demo_arguments(*longer, change)))


def test_a_training_too_short_to_be_evaluated_has_no_best_step(demo_arguments, tmp_path):
    with pytest.raises(ConfigError, match=r"loop\.evaluate_every_steps: expected at most the 5 steps of the training"):
        train(config(demo_arguments(*BEST_STEP, "loop.max_steps=5")))
    assert list(tmp_path.iterdir()) == []


def test_both_engines_have_the_same_curve_and_read_each_others_checkpoints(demo_arguments, tmp_path):
    curves = {}
    for engine in ENGINES:
        train(config(demo_arguments(f"embeddings.engine={engine}", output=engine)))
        lines = Journal(tmp_path / engine / "metrics.jsonl").read()
        curves[engine] = [line["train/click/loss"] for line in lines if "train/click/loss" in line]
    assert len(curves["torch"]) > 20
    np.testing.assert_allclose(curves["torch"], curves["torchrec"], rtol=1e-5)

    with Experiment(config(demo_arguments("embeddings.engine=torchrec", output="torch"))) as experiment:
        experiment.load()
        metrics = evaluate(experiment.model, experiment.source("test")).metrics
    expected = json.loads((tmp_path / "torch" / "metrics.json").read_text())
    assert metrics["click/log_loss"] == pytest.approx(expected["click/log_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        ["embeddings.tables={item: {learning_rate: 0.03, eps: 0.001}, user: {optimizer: sgd, learning_rate: 20}}"],
        [
            *("embeddings.optimizer=sgd", "embeddings.learning_rate=10"),
            "embeddings.tables={item: {learning_rate: 30}, user: {optimizer: row_wise_adagrad, learning_rate: 0.1}}",
        ],
    ],
    ids=["row_wise_adagrad", "sgd"],
)
def test_both_engines_have_the_same_curve_with_an_optimizer_for_each_table(demo_arguments, tmp_path, settings):
    curves, tables = {}, {}
    for engine in ENGINES:
        train(
            config(demo_arguments(*settings, f"embeddings.engine={engine}", "loop.max_steps=25", "loop.log_every_steps=1", output=engine))
        )
        lines = Journal(tmp_path / engine / "metrics.jsonl").read()
        curves[engine] = [line["train/click/loss"] for line in lines if "train/click/loss" in line]
        tensors = tensors_of(list_checkpoints(tmp_path / engine / "checkpoints")[-1])
        tables[engine] = {name: tensor for name, tensor in tensors.items() if "embeddings.tables." in name}
    assert len(curves["torch"]) == 25
    np.testing.assert_allclose(curves["torch"], curves["torchrec"], rtol=1e-5)
    assert tables["torch"].keys() == tables["torchrec"].keys()
    for name, tensor in tables["torch"].items():
        torch.testing.assert_close(tensor, tables["torchrec"][name], rtol=1e-4, atol=1e-6)
    moved = {name: tensor.std() for name, tensor in tables["torch"].items() if not name.startswith("optimizer.")}
    assert min(moved.values()) > 0.0105  # more than the initial rows differ


def test_every_figure_follows_from_the_predictions_file(demo_arguments, tmp_path):
    result = train(config(demo_arguments()))
    output = tmp_path / "run of a test"
    rows = pl.from_arrow(pq.read_table(output / "predictions"))
    assert rows.height == rows["impression_id"].n_unique() == 2000
    assert result.report.exists()
    metrics = json.loads((output / "metrics.json").read_text())
    for task in ("click", "conversion"):
        slices = {"": rows} | {f"@placement={value}": part for (value,), part in rows.group_by("placement")}
        for suffix, part in slices.items():
            part = part.filter(pl.col(f"weight_{task}") > 0)
            label, prediction = part[f"label_{task}"].to_numpy(), part[f"prediction_{task}"].to_numpy().astype(np.float64)
            if not 0 < label.sum() < len(label):
                continue
            base = label.mean()
            loss = log_loss(label, prediction)
            entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
            assert metrics[f"{task}/examples{suffix}"] == len(label)
            assert metrics[f"{task}/log_loss{suffix}"] == pytest.approx(loss, rel=1e-6)
            assert metrics[f"{task}/normalized_entropy{suffix}"] == pytest.approx(loss / entropy, rel=1e-6)
            assert metrics[f"{task}/calibration{suffix}"] == pytest.approx(prediction.sum() / label.sum(), rel=1e-6)
            assert metrics[f"{task}/auc{suffix}"] == pytest.approx(roc_auc_score(label, prediction), abs=2e-3 if suffix else 1e-4)
    truth = rows.filter(pl.col("weight_click") > 0)
    best = roc_auc_score(truth["label_click"], truth["true_click_probability"])
    assert result.evaluation.best["click/auc"] == pytest.approx(best, abs=1e-4)


def test_the_same_from_python(demo_arguments, tmp_path):
    settings = config(demo_arguments("loop.max_steps=12"))
    with Experiment(settings) as experiment:
        progress = fit(experiment.step, experiment.source("train"), experiment.run, settings.loop)
        evaluation = evaluate(experiment.model, experiment.source("test"))
    predicted = predict([experiment.output], tmp_path / "scored")
    assert (progress.step, progress.examples) == (12, 12 * 128)
    assert 0 < evaluation.metrics["click/auc"] < 1
    assert predicted.num_rows == pq.read_table(tmp_path / "scored").num_rows == 2000
    assert comparable(predicted.metrics["demo-ranker"]) == pytest.approx(comparable(evaluation.metrics))
    with Experiment(settings) as experiment:
        assert experiment.load().name == "step-00000012"
        assert comparable(evaluate(experiment.model, experiment.source("test")).metrics) == comparable(evaluation.metrics)


def test_a_complete_training_is_left_as_it_is(demo_arguments, tmp_path):
    first = train(config(demo_arguments("loop.max_steps=12")))
    before = final_state(tmp_path / "run of a test")
    again = train(config(demo_arguments("loop.max_steps=12")))
    assert comparable(again.evaluation.metrics) == comparable(first.evaluation.metrics)
    after = final_state(tmp_path / "run of a test")
    assert (before[0], before[2], before[3]) == (after[0], after[2], after[3])
    with pytest.raises(CheckpointError, match=r"loop\.max_steps: 12 became 20"):  # the learning rate falls to the last step
        train(config(demo_arguments("loop.max_steps=20")))


def test_a_training_with_constant_rates_may_go_on_longer(demo_arguments):
    for steps in (12, 20):
        assert train(config(demo_arguments("loop.learning_rate_decay=none", f"loop.max_steps={steps}"))).steps == steps


def test_validation_and_decay_are_logged(demo_arguments, tmp_path):
    settings = ["data.train.end=2026-01-01", "data.validation.start=2026-01-02", "data.validation.end=2026-01-02"]
    train(config(demo_arguments(*settings, "loop.evaluate_every_steps=20", "data.num_epochs=3")))
    lines = Journal(tmp_path / "run of a test" / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "validation/click/auc" in line] == [20, 40]


HELD_OUT = ["data.train.end=2026-01-01", "data.validation.start=2026-01-02", "data.validation.end=2026-01-02"]
CALIBRATED = [
    *HELD_OUT,
    "data.num_epochs=8",
    "calibration.click={kind: logistic, segments: [placement]}",
    "calibration.conversion.kind=platt",
]


def test_predictions_are_calibrated_on_the_validation_window(demo_arguments, tmp_path, caplog):
    settings = config(demo_arguments(*CALIBRATED, "loop.learning_rate_decay=none"))
    result = train(settings)
    output = tmp_path / "run of a test"
    checkpoint = list_checkpoints(output / "checkpoints")[-1]
    saved = json.loads((checkpoint / "calibrators.json").read_text())
    assert {task: entry["kind"] for task, entry in saved.items()} == {"click": "logistic", "conversion": "platt"}
    assert len(saved["click"]["segments"]["placement"]) == 6
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["click/ece"] == result.evaluation.metrics["click/ece"] < result.evaluation.uncalibrated["click/ece"]
    assert "before" in result.report.read_text()
    rows = pl.from_arrow(pq.read_table(output / "predictions"))
    predictions, labels = (rows[f"{name}_click"].to_numpy().astype(np.float64) for name in ("prediction", "label"))
    assert metrics["click/calibration"] == pytest.approx(predictions.sum() / labels.sum(), rel=1e-6)

    # Later commands go by the checkpoint, whatever the config says now.
    with Experiment(config(demo_arguments(*HELD_OUT, "loop.evaluate_every_steps=5"))) as experiment:
        assert experiment.load() == checkpoint
        assert set(experiment.calibrators) == {"click", "conversion"}
        assert "calibrated with {'click': 'logistic', 'conversion': 'platt'}, not with the config's nothing" in caplog.text
        again = evaluate(experiment.model, experiment.source("test"), calibrators=experiment.calibrators)
    assert comparable(again.metrics) == comparable(result.evaluation.metrics)
    assert comparable(again.uncalibrated) == comparable(result.evaluation.uncalibrated)
    predict([checkpoint], tmp_path / "scored")
    scored = pl.from_arrow(pq.read_table(tmp_path / "scored"))["prediction_click"]
    assert scored.equals(rows["prediction_click"])
    with Experiment(config(demo_arguments(*HELD_OUT, "loop.evaluate_every_steps=5", "schema.segments=[]"))) as experiment:
        experiment.load()
        with pytest.raises(CheckpointError, match=r"calibrator of 'click': expected 'placement' in schema\.segments"):
            experiment.calibrators  # noqa: B018

    # A complete training with other calibrators fits those; without any, there are none.
    other = train(config(demo_arguments(*CALIBRATED[:4], "loop.learning_rate_decay=none", "calibration.click.kind=isotonic")))
    # One task instead of two is summed in another order.
    assert comparable(other.evaluation.uncalibrated)["click/ece"] == pytest.approx(result.evaluation.uncalibrated["click/ece"], rel=1e-12)
    assert set(json.loads((checkpoint / "calibrators.json").read_text())) == {"click"}
    train(config(demo_arguments(*HELD_OUT, "data.num_epochs=8", "loop.learning_rate_decay=none", "loop.evaluate_every_steps=50")))
    assert json.loads((checkpoint / "calibrators.json").read_text()) == {}


def test_a_task_that_cannot_be_calibrated_is_measured_without(demo_arguments, caplog):
    few = ["calibration.click.kind=platt", "calibration.conversion.kind=temperature", "schema.labels.conversion.mask=is_weekend"]
    result = train(config(demo_arguments(*HELD_OUT, "loop.max_steps=4", *few)))
    assert "calibration.conversion.labels: expected examples of both classes" in caplog.text
    assert "none; the log of the training says why" in result.report.read_text()
    assert {key.partition("/")[0] for key in result.evaluation.uncalibrated} == {"click"}


def test_a_checkpoint_of_something_else_is_refused(demo_arguments, tmp_path, ads):
    train(config(demo_arguments("loop.max_steps=12")))
    before = final_state(tmp_path / "run of a test")
    config_before = (tmp_path / "run of a test" / "config.yaml").read_text()
    wrong = {
        "schema.features.price=null": "features.price: added",
        "schema.features.price.log1p=false": "features.price.log1p: True became False",
        "optimizer.learning_rate=0.5": "optimizer.learning_rate: 0.002 became 0.5",
        "model.deep.hidden=[8]": "model.deep.hidden: [128, 64] became [8]",
        "data.train.end=2026-01-01": "data.train.end: '2026-01-02' became '2026-01-01'",
        "data.transforms=[{kind: clip, column: price, upper: 9}]": "data.transforms: [] became [{'kind': 'clip'",
    }
    for override, message in wrong.items():
        message = message.replace("added", "removed")
        with pytest.raises(CheckpointError) as caught:
            train(config(demo_arguments("loop.max_steps=12", override)))
        assert message in str(caught.value)
        assert final_state(tmp_path / "run of a test")[2] == before[2]
        assert (tmp_path / "run of a test" / "config.yaml").read_text() == config_before
    with (
        pytest.raises(CheckpointError, match=r"features\.price: removed"),
        Experiment(config(demo_arguments("schema.features.price=null"))) as experiment,
    ):
        experiment.load()


SHAPED = (
    "[{kind: filter, where: hour >= 3}, {kind: deduplicate, columns: [request_id, item_id]},"
    " {kind: derive, column: price, sql: price * 2}, {kind: sample_negatives, negative: click = 0, rate: 0.5, weight_column: w}]"
)


def test_a_training_on_shaped_rows_goes_on_exactly_and_records_what_was_dropped(demo_arguments, tmp_path):
    shaped = [f"data.transforms={SHAPED}", "schema.labels.click.weight=w", "loop.learning_rate_decay=none", "data.num_epochs=3"]
    for output, limits in (("whole", [25]), ("stopped", [7, 25])):
        for limit in limits:
            result = train(config(demo_arguments(*shaped, f"loop.max_steps={limit}", output=output)))
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert_same_tensors(one[1], other[1])
    assert one[3] == other[3]
    assert "data.transforms[1]: drops" in result.report.read_text()
    with Experiment(config(demo_arguments(*shaped))) as experiment:
        rows = pl.read_parquet(tmp_path / "whole" / "predictions" / "*.parquet")
        assert set(rows["weight_click"]) == {1.0}
        assert experiment.source("test").num_rows == len(rows)
        batches = list(experiment.source("train").batches())
    assert set(torch.cat([batch.weights[:, 0] for batch in batches]).tolist()) == {1.0, 2.0}


def test_other_data_are_refused(demo_arguments, tmp_path, ads):
    train(config(demo_arguments()))
    moved = tmp_path / "moved"
    for day in ("date=2026-01-01", "date=2026-01-02", "date=2026-01-03"):
        (moved / day).mkdir(parents=True)
        table = pq.read_table(ads / day / "part-00000.parquet")
        pq.write_table(table if day != "date=2026-01-02" else table.slice(1), moved / day / "part-00000.parquet")
    with pytest.raises(CheckpointError, match="training data: expected the files it was trained with"):
        train(config(demo_arguments(f"data.path={moved}")))


def test_a_damaged_checkpoint_falls_back_in_training_and_is_refused_in_evaluation(demo_arguments, tmp_path, caplog):
    train(config(demo_arguments(output="whole")))
    train(config(demo_arguments()))
    output = tmp_path / "run of a test"
    file = next(list_checkpoints(output / "checkpoints")[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"), Experiment(config(demo_arguments())) as experiment:
        experiment.load()
    train(config(demo_arguments()))
    assert file.parent.name in caplog.text
    assert_identical(tmp_path / "whole", output)


def test_one_training_at_a_time_in_a_folder(demo_arguments):
    with Experiment(config(demo_arguments())) as experiment:
        assert experiment.run
        with pytest.raises(MlenvError, match="another training is writing here"), Experiment(config(demo_arguments())) as second:
            assert second.run


def test_nothing_is_written_when_the_data_are_refused(demo_arguments, tmp_path):
    with pytest.raises(MlenvError):
        train(config(demo_arguments("data.test.start=2027-01-01")))
    with pytest.raises(ConfigError, match=r"output: expected a folder whose parent exists"):
        train(config(demo_arguments(f"output={tmp_path / 'no' / 'such'}")))
    assert list(tmp_path.iterdir()) == []


def test_the_model_of_a_checkpoint_is_the_model_that_was_trained(demo_arguments):
    settings = config(demo_arguments("loop.max_steps=12"))
    with Experiment(settings) as experiment:
        fit(experiment.step, experiment.source("train"), experiment.run, settings.loop)
        trained = {name: tensor.clone() for name, tensor in model_tensors(experiment.model).items()}
    with Experiment(settings) as experiment:
        experiment.load()
        for name, tensor in model_tensors(experiment.model).items():
            assert torch.equal(tensor, trained[name]), name
    assert any(name.endswith("normalization.mean") and tensor.abs().sum() > 0 for name, tensor in trained.items())
