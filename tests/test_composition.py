from __future__ import annotations

import pytest

from mlenv.composition import compose, from_plain, to_plain, to_yaml
from mlenv.config import OPTIMIZERS, WORKERS, ExperimentConfig
from mlenv.errors import ConfigError, Problems
from mlenv.kinds import kind_of
from mlenv.modules import CrossNetConfig, RankerConfig
from mlenv.schema import Categorical, Numeric

CONTROL = """
name: control
output: out
schema:
  features:
    item: {kind: categorical}
    price: {kind: numeric, log1p: true}
  tables:
    item: {num_embeddings: 10, embedding_dim: 4}
  labels: {click: {}}
data: {path: data, train: {end: 2026-01-03}, test: {start: 2026-01-04}}
model: {kind: ranker, crossing: {kind: cross_net, num_layers: 2}}
"""


@pytest.fixture
def control(tmp_path):
    file = tmp_path / "control.yaml"
    file.write_text(CONTROL)
    return file


def test_defaults_then_file_then_overrides(control):
    config = compose(control, ["loop.max_steps=7", "model.deep.hidden=[8, 4]", "optimizer.learning_rate=1e-2"])
    assert config.loop.max_steps == 7
    assert config.loop.log_every_steps == 50
    assert config.optimizer.learning_rate == 0.01
    assert config.model.deep.hidden == (8, 4)
    assert config.model.crossing == CrossNetConfig(num_layers=2)
    assert config.schema.features == {"item": Categorical(), "price": Numeric(log1p=True)}
    assert config.data.train.end == "2026-01-03"


def test_a_variant_extends_its_control(control, tmp_path):
    (tmp_path / "sub").mkdir()
    variant = tmp_path / "sub" / "variant.yaml"
    variant.write_text("extends: ../control.yaml\nname: variant\nschema: {features: {price: null}}\nmodel: {crossing: null}\n")
    config = compose(variant)
    assert (config.name, config.output) == ("variant", "out")
    assert list(config.schema.features) == ["item"]
    assert config.model.crossing is None


def test_a_changed_kind_starts_afresh(control, tmp_path):
    variant = tmp_path / "variant.yaml"
    variant.write_text("extends: control.yaml\nschema: {features: {price: {kind: binary}}}\n")
    assert compose(variant).schema.features["price"].default is False


def test_a_composed_config_composes_to_itself(control):
    config = compose(control)
    assert from_plain(to_plain(config), ExperimentConfig) == config
    control.write_text(to_yaml(config))
    assert compose(control) == config


def test_a_composed_config_says_the_width_that_the_rule_gave(control, tmp_path):
    config = compose(
        control, ["schema.tables.item.embedding_dim=0", "schema.tables.item.num_embeddings=100", "schema.features.price.default=null"]
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert "embedding_dim: 20" in to_yaml(config)
    assert compose(tmp_path / "again.yaml") == config
    assert config.schema.features["price"].default is None


def test_a_class_of_the_team_is_named_by_its_import_path(control):
    config = compose(control, ["model.kind=mlenv.modules.ranker:RankerConfig", "model.crossing.kind=cross_net"])
    assert isinstance(config.model, RankerConfig)


def test_every_problem_is_named_at_once(control):
    overrides = [
        "loop.max_stps=5",
        "loop.device=gpu",
        "data.batch_size=many",
        "schema.tables.item.num_embeddings=0",
        "data.train.end=soon",
        "model.kind=rankr",
    ]
    with pytest.raises(Problems) as caught:
        compose(control, overrides)
    text = str(caught.value)
    assert "6 problems" in text
    assert "loop.max_stps: expected a key of LoopConfig. Received: 5. Fix: did you mean 'max_steps'." in text
    assert "loop.device: expected one of ['auto', 'cpu', 'cuda']. Received: 'gpu'." in text
    assert "data.batch_size: expected a value of type int. Received: 'many'." in text
    assert "schema.tables.item.num_embeddings: expected a number >= 1. Received: 0." in text
    assert "data.train.end: expected a day as YYYY-MM-DD. Received: 'soon'." in text
    assert "model.kind: expected one of ['ranker']" in text


@pytest.mark.parametrize(
    ("below", "overrides", "expected"),
    [
        ("", ["optimizer=lion"], {"kind": "lion"}),
        ("", ["optimizer=lion", "optimizer.beta1=0.5"], {"kind": "lion", "beta1": 0.5}),
        ("", ["optimizer.beta1=0.5", "optimizer=lion"], {"kind": "lion", "beta1": 0.5}),
        ("optimizer: lion", ["optimizer.beta1=0.5"], {"kind": "lion", "beta1": 0.5}),
        ("optimizer: {kind: lion, beta1: 0.5}", ["optimizer=lion"], {"kind": "lion", "beta1": 0.5}),
        ("optimizer: {kind: lion, learning_rate: 0.5}", ["optimizer=adamw"], {"kind": "adamw", "learning_rate": 1e-3}),
        ("optimizer: {learning_rate: 0.5}", ["optimizer=adamw"], {"kind": "adamw", "learning_rate": 0.5}),
        ("optimizer: {learning_rate: 0.5}", ["optimizer=sgd", "optimizer.momentum=0.5"], {"kind": "sgd", "momentum": 0.5}),
    ],
)
def test_a_bare_name_is_a_kind(control, below, overrides, expected):
    control.write_text(CONTROL + below)
    found = to_plain(compose(control, overrides))["optimizer"]
    assert {key: found[key] for key in expected} == expected


def test_bare_names_at_any_depth(control):
    config = compose(control, ["data.workers=threads", "data.transforms=[{kind: filter, where: 'price > 0'}]", "launch=torchrun"])
    assert kind_of(config.data.workers, WORKERS) == "threads"
    assert compose(control, ["model.crossing=cross_net"]).model.crossing == CrossNetConfig(num_layers=2)
    assert compose(control, ["objective.losses.click=focal"]) == compose(control, ["objective.losses.click.kind=focal"])
    with pytest.raises(Problems, match=r"launch.kind: expected one of \['ray', 'torchrun'\].* Received: 'rai'. Fix: did you mean 'ray'"):
        compose(control, ["launch=rai"])
    with pytest.raises(Problems, match=r"data.train: expected the keys of WindowConfig. Received: 'all'"):
        compose(control, ["data.train=all"])
    assert compose(control, ["data.test.start=2026-01-05", "data.test=null"]).data.test is None


def test_an_optimizer_without_a_kind_is_adamw_and_another_kind_starts_afresh(control):
    assert kind_of(compose(control).optimizer, OPTIMIZERS) == "adamw"
    named = compose(control, ["optimizer.learning_rate=0.25"]).optimizer
    assert (kind_of(named, OPTIMIZERS), named.learning_rate) == ("adamw", 0.25)
    control.write_text(control.read_text() + "optimizer: {learning_rate: 0.125}\n")
    assert compose(control).optimizer.learning_rate == 0.125
    assert to_plain(compose(control, ["optimizer={kind: lion, beta1: 0.5}"]))["optimizer"] == {
        "kind": "lion",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "gradient_clip_norm": 0.0,
        "beta1": 0.5,
        "beta2": 0.99,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.task_weights.clik=2", "did you mean 'click'"),
        ("data.train.end=20260103", "data.train.end: expected a day as YYYY-MM-DD"),
        ("data.test={path: sub, start: 2026-01-02}", "data.test: expected days outside"),
        ("data.test.path=/elsewhere", "data.test.path: expected a folder or file under data.path"),
        ("schema.row_key={a: 1}", "schema.row_key: expected a value of type tuple[str, ...]"),
        ("name=true", "name: expected text. Received: True. Fix: put the word in quotes."),
        ("seed=-1", "seed: expected an integer in [0, 2^63)"),
        ("schema.labels={a@b: {}}", "labels.a@b: expected a name without '.' and '@'"),
        ("schema.features.price.default=.nan", "schema.features.price.default: expected a finite number"),
        ("data.test.start=2026-01-02", "data.test: expected days outside the training window"),
        ("loop.evaluate_every_steps=5", "data.validation: expected a window, because of loop.evaluate_every_steps"),
        ("calibration.click.kind=platt", "data.validation: expected a window, because of calibration.click"),
        ("data.validation.start=2026-01-09", "data.validation: expected something that uses it"),
        ("calibration.click.kind=plat", "calibration.click.kind: expected one of ['histogram', 'isotonic'"),
        ("calibration.clik={kind: negative_sampling, rate: 0.1}", "calibration.clik: expected a task of schema.labels"),
        ("calibration.click={kind: negative_sampling, rate: 0}", "calibration.click.rate: expected a number in (0, 1]"),
        ("calibration.click={kind: negative_sampling, rate: 1.5}", "calibration.click.rate: expected a number in (0, 1]"),
        ("calibration.click={kind: histogram, num_bins: 0}", "calibration.click.num_bins: expected a number >= 1"),
        ("calibration.click={kind: logistic, segments: []}", "calibration.click.segments: expected one segment column or more"),
        ("calibration.click={kind: logistic, segments: [a], ridge: 0}", "calibration.click.ridge: expected a number > 0"),
        ("calibration.click={kind: logistic, segments: [place]}", "calibration.click.segments: expected columns of schema.segments"),
        ("loop.monitor=click/auc", "loop.monitor: expected no monitor without data.validation"),
        ("loop.learning_rate_decay=plateau", "loop.learning_rate_decay: expected none, linear or cosine without loop.monitor"),
        ("loop.warmup_start=0.5", "loop.warmup_steps: expected a number >= 1 with warmup_start"),
        ("loop={warmup_steps: 5, warmup_start: 0}", "loop.warmup_start: expected a share in (0, 1)"),
        ("loop={warmup_steps: 5, max_steps: 5}", "loop.warmup_steps: expected fewer than max_steps, 5"),
        ("loop.accumulate_batches=0", "loop.accumulate_batches: expected a number >= 1"),
        ("loop.accumulate_batches=2 embeddings.engine=torchrec", "accumulate_batches: expected 1, because embeddings.engine"),
        ("loop.accumulate_batches=2 objective.balance.kind=pcgrad", "expected 1, because objective.balance weighs the tasks"),
        ("loop.accumulate_batches=2 objective.distillation.weight=2", "expected 1, because objective.distillation is a mean"),
        ("loop.accumulate_batches=2 objective.losses.click.kind=listwise", "expected 1, because a loss that compares"),
        ("loop.ema_decay=1", "loop.ema_decay: expected a number in [0, 1)"),
        (
            "loop.stop_after_evaluations=2",
            "loop.stop_after_evaluations: expected 0 without loop.monitor.",
        ),
        (
            "loop.monitor=clik/auc",
            "loop.monitor: expected TASK/METRIC with a task of schema.labels. Received: 'clik/auc'",
        ),
        ("loop.monitor=click/calibration", "loop.monitor: expected TASK/METRIC with one of ['auc', 'ece', 'grouped_auc'"),
        ("loop.monitor=click/grouped_auc", "loop.monitor: expected a metric that needs no schema.request"),
        (
            "embeddings={engine: torchrec, optimizer: adam}",
            "embeddings.optimizer: expected row_wise_adagrad or sgd, because TorchRec has no",
        ),
        (
            "embeddings={engine: torchrec, tables: {item: {optimizer: adam, learning_rate: 0.1}}}",
            "embeddings.tables.item.optimizer: expected row_wise_adagrad or sgd, because TorchRec has no Adam on a CPU",
        ),
        ("embeddings={engine: torchrec, weight_decay: 0.1}", "embeddings.weight_decay: expected 0, because fbgemm's fused update on a CPU"),
        ("embeddings={engine: torchrec, tables: {item: {weight_decay: 0.1}}}", "embeddings.tables.item.weight_decay: expected 0, because"),
        ("embeddings.tables.itm.learning_rate=0.1", "embeddings.tables.itm: expected a table of schema.tables"),
        ("embeddings.tables.item.learning_rate=0", "embeddings.tables.item.learning_rate: expected a number > 0"),
        ("embeddings.tables.item.optimizer=sgd", "embeddings.tables.item.learning_rate: expected a number, because sgd takes another rate"),
        ("optimizer.kind=adamv", "optimizer.kind: expected one of ['adam', 'adamw', 'lion', 'sgd']"),
        ("optimizer={kind: lion, eps: 1}", "optimizer.eps: expected a key of LionConfig"),
        ("optimizer=[adam]", "optimizer: expected a mapping with a kind"),
        ("schema.features.item.table=itm", "schema.features.item.table: expected a table of the schema"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: expected a number > 0"),
        ("model.deep.dropout=1.5", "model.deep.dropout: expected a share in [0, 1)"),
        ("data=null", "data: expected the keys of DataConfig"),
        ("data.test.path=${nothing}", "expected interpolations that resolve"),
        ("no_equals_sign", "expected key=value"),
    ],
)
def test_contradictions_are_refused(control, override, message):
    with pytest.raises((Problems, ConfigError)) as caught:
        compose(control, [override] if "{" in override else override.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: control.yaml", "expected a file that does not extend itself"),
        ("extends: 3", "control.yaml: extends: expected a file, or a list of files. Received: 3."),
        ("extends: missing.yaml", "missing.yaml: expected a readable YAML file"),
        ("a: [1", "control.yaml: expected YAML"),
        ("- 1", "control.yaml: expected a mapping of keys"),
    ],
)
def test_files_that_cannot_be_read_are_named(control, text, message):
    control.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(control)
    assert message in str(caught.value)
