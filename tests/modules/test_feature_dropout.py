from __future__ import annotations

import pytest
import torch

from mlenv import compose, train
from mlenv.errors import ConfigError, MlenvError
from mlenv.modules import FeatureDropoutConfig, SourceConfig
from mlenv.schema import Binary, Categorical, Label, Numeric, Schema, Table

FEATURES = ("item", "country", "price", "flag")
SCHEMA = Schema(
    features={"item": Categorical(), "country": Categorical(default="0"), "price": Numeric(default=None), "flag": Binary()},
    tables={"item": Table(num_embeddings=4), "country": Table(num_embeddings=4)},
    labels={"click": Label()},
)
SOURCES = {"store": SourceConfig(features=("price", "item"), rate=0.25), "log": SourceConfig(features=("flag", "item"), rate=0.125)}


def build(rate=0.0, sources=SOURCES):
    return FeatureDropoutConfig(rate=rate, sources=sources).build(SCHEMA, FEATURES)


def nothing(rows):
    return torch.zeros(rows, len(FEATURES), dtype=torch.bool)


def test_features_of_a_source_are_hidden_together():
    torch.manual_seed(0)
    hidden = build()(nothing(20_000))
    item, country, price, flag = hidden.T
    assert torch.equal(item, price | flag)
    assert not country.any()
    for column, rate in ((price, 0.25), (flag, 0.125), (price & flag, 0.25 * 0.125)):
        assert column.float().mean().item() == pytest.approx(rate, abs=0.01)


def test_features_are_hidden_one_by_one():
    torch.manual_seed(0)
    schema = Schema(features={"a": Numeric(), "b": Numeric()}, labels={"click": Label()})
    a, b = FeatureDropoutConfig(rate=0.5).build(schema, ("a", "b"))(torch.zeros(20_000, 2, dtype=torch.bool)).T
    for column, rate in ((a, 0.5), (b, 0.5), (a & b, 0.25)):
        assert column.float().mean().item() == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_missing_stays_missing_and_evaluation_hides_nothing(rows):
    dropout, is_null = build(), nothing(rows)
    is_null[:, 1] = True
    assert dropout(is_null)[:, 1].all()
    assert torch.equal(dropout.eval()(is_null), is_null)
    assert build(sources={})(nothing(rows)).sum() == 0


def test_it_follows_the_seed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(build()(nothing(100)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_it_compiles_and_exports():
    dropout, is_null = build(), nothing(3)
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(is_null).dtype == torch.bool
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(dropout.eval(), (is_null,), dynamic_shapes=shapes, strict=True).module()
    assert torch.equal(exported(nothing(1)), nothing(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureDropoutConfig(rate=1.0), r"^rate: "),
        (lambda: SourceConfig(features=("item",), rate=-0.1), r"^rate: "),
        (lambda: SourceConfig(features=(), rate=0.1), r"^features: "),
        (
            lambda: build(sources={"store": SourceConfig(features=("itme",), rate=0.1)}),
            r"^sources.store.features: .*'itme'.* did you mean 'item'",
        ),
        (
            lambda: build(rate=0.1, sources={}),
            r"^rate: .*country with the default '0'.* Fix: remove schema.features.country.default",
        ),
        (
            lambda: build(sources={"store": SourceConfig(features=("country",), rate=0.1)}),
            r"^sources.store.features: .*country with the default '0'",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_ranker_trains_with_it(demo_arguments):
    source = "feature_dropout={rate: 0.1, sources: {user: {features: [user_id, history, user_country], rate: 0.1}}}"
    nulls = [f"schema.features.{name}.default=null" for name in ("price", "user_country")]
    file, *overrides = demo_arguments("loop.max_steps=3", "model.sequences.history={kind: din, candidate: [item_id]}", f"model.{source}")
    assert train(compose(file, [*overrides, *nulls])).steps == 3
    where, fix = r"model\.feature_dropout\.sources\.user\.features: ", r"remove schema\.features\.user_country\.default"
    with pytest.raises(MlenvError, match=f"{where}.*user_country.*{fix}"):
        train(compose(file, overrides))


def test_a_schema_without_sequences_trains_and_resumes_with_it(demo_arguments):
    without = [
        "schema.features.history=null",
        "checks.may_drift=[is_weekend]",
        "schema.tables.history_action=null",
        "schema.features.user_country.default=null",
    ]
    constant = "loop.learning_rate_decay=none"
    file, *overrides = demo_arguments(*without, constant, "model.feature_dropout={rate: 0.2}")
    assert train(compose(file, [*overrides, "loop.max_steps=3"])).steps == 3
    assert train(compose(file, [*overrides, "loop.max_steps=5"])).steps == 5
