"""The whole of the representation, and what a model says when features are missing."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
import torch

from mlenv.batch import Batch, Position, SparseFeatures
from mlenv.config import EmbeddingsConfig
from mlenv.datasets.encoded_rows import to_batch
from mlenv.datasets.encoding import encode
from mlenv.loops.dense_optimizers import AdamWConfig
from mlenv.loops.optimizers import build_table_optimizers, dense_parameters, options_of_tables
from mlenv.modules import (
    FeatureDropoutConfig,
    MixedNumbersConfig,
    MLPConfig,
    RankerConfig,
    Representation,
    SourceConfig,
    TargetAttentionConfig,
    TorchEmbeddings,
    weighted_binary_cross_entropy,
)
from mlenv.schema import (
    Binary,
    Categorical,
    DenseVector,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Table,
    Weighted,
)

TABLE = Table(num_embeddings=10, embedding_dim=4)
HASHED = Table(num_embeddings=10, embedding_dim=4, ids="hash")
SCHEMA = Schema(
    features={
        "price": Numeric(default=None, log1p=True),
        "age": Numeric(default=20.0),
        "is_weekend": Binary(default=True),
        "item_vector": DenseVector(dim=2),
        "item_id": Categorical(table="item"),
        "user_country": Categorical(storage="string"),
        "interests": MultiCategorical(),
        "topic_weights": Weighted(),
        "history": Sequence(fields={"item": SequenceField(table="item"), "action": SequenceField()}),
    },
    tables={"item": TABLE, "user_country": HASHED, "interests": TABLE, "topic_weights": TABLE, "history_action": TABLE},
    labels={"click": Label()},
)
"""Every kind of feature once."""
COLUMNS = {
    "price": (pa.float32(), [1.5, 1e30, -2.0]),
    "age": (pa.int64(), [30, 40, 50]),
    "is_weekend": (pa.bool_(), [False, True, False]),
    "item_vector": (pa.list_(pa.float32()), [[1.0, 2.0], [-1e30, 4.0], [5.0, 6.0]]),
    "item_id": (pa.int64(), [1, 2, 3]),
    "user_country": (pa.string(), ["at", "de", "us"]),
    "interests": (pa.list_(pa.int64()), [[1], [2, 3], [4]]),
    "topic_weights": (pa.map_(pa.int64(), pa.float32()), [[(1, 0.5)], [(2, 1.0), (3, 1.0)], [(4, 2.0)]]),
    "history_item": (pa.list_(pa.int64()), [[1, 2], [3], [4, 5, 6]]),
    "history_action": (pa.list_(pa.int64()), [[0, 1], [1], [0, 0, 1]]),
    "click": (pa.int64(), [0, 1, 0]),
}


def batch_of(gone=(), schema=SCHEMA, rows=3):
    """The columns above, those of ``gone`` null in every row."""
    columns = {
        name: pa.array([None if name.startswith(tuple(gone)) else value for value in values[:rows]], kind)
        for name, (kind, values) in COLUMNS.items()
    }
    return to_batch([encode(pa.RecordBatch.from_pydict(columns), schema)], Position())


def representation(feature_dropout=None, schema=SCHEMA, **options):
    torch.manual_seed(0)
    module = Representation(schema, TorchEmbeddings(schema, EmbeddingsConfig(), 0), feature_dropout=feature_dropout, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "nulls" in name:
                parameter.copy_(torch.arange(1.0, 1.0 + len(parameter)))
    return module


def fields_of(module, batch):
    return dict(zip(module.features, module(batch).split(list(module.field_dims), dim=1), strict=True))


def test_what_is_missing_is_its_learned_null_or_its_default():
    module = representation(FeatureDropoutConfig()).eval()
    present, missing = fields_of(module, batch_of()), fields_of(module, batch_of(list(SCHEMA.features)))
    pooled = module.pooled_nulls.values.split(4)
    learned = dict(zip([name for name in module.features if name in SCHEMA.tables or name == "item_id"], pooled, strict=True))
    learned |= {"history": module.sequence_nulls.values, "price": module.number_nulls[:1]}
    defaults = {"age": [10.0], "is_weekend": [1.0], "item_vector": [0.0, 0.0]}  # age as it was not fitted
    for name in module.features:
        expected = learned[name].tolist() if name in learned else defaults[name]
        assert missing[name].tolist() == [expected] * 3, name
        assert not any(torch.equal(row, missing[name][0]) for row in present[name]) or name in ("age", "is_weekend"), name
    assert present["price"][1].item() == 10  # 1e30, of which log1p is 69
    assert present["item_vector"].tolist() == [[1, 2], [-10, 4], [5, 6]]


@pytest.mark.parametrize("gone", [*SCHEMA.features])
def test_a_hidden_feature_looks_like_a_missing_one(gone):
    """Hidden by a source that nearly always fails; the sequence asks for the item, which must not leak through it."""
    options = {"sequences": {"history": TargetAttentionConfig(candidate=("item_id",))}}
    source = {"all": SourceConfig(features=(gone,), rate=1 - 1e-9)}
    module = representation(FeatureDropoutConfig(sources=source), **options)
    torch.testing.assert_close(module(batch_of()), module.eval()(batch_of([gone])))


def test_without_feature_dropout_an_empty_bag_is_zeros_and_a_null_number_learned():
    module = representation()
    missing = fields_of(module, batch_of(list(SCHEMA.features)))
    assert not missing["item_id"].any()
    assert not missing["history"].any()
    assert missing["price"].tolist() == [[1.0]] * 3
    assert [name for name in module.state_dict() if "nulls" in name] == ["number_nulls"]
    filled = Schema(features=SCHEMA.features | {"price": Numeric()}, tables=SCHEMA.tables, labels=SCHEMA.labels)
    assert representation(schema=filled).number_nulls is None


def test_numbers_alone_may_be_missing():
    schema = Schema(features={"price": Numeric(default=None)}, labels={"click": Label()})
    module = representation(FeatureDropoutConfig(rate=0.5), schema=schema).eval()
    assert module(batch_of(schema=schema))[2].item() == -2.0
    assert module(batch_of(["price"], schema=schema)).tolist() == [[1.0]] * 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", [(), tuple(SCHEMA.features)], ids=["all here", "all null"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"numbers": MixedNumbersConfig()},
        {"feature_dropout": FeatureDropoutConfig(rate=0.5), "sequences": {"history": TargetAttentionConfig(candidate=("item_id",))}},
    ],
    ids=["standard", "mixed", "dropout"],
)
def test_a_ranker_stays_finite(options, gone, precision, rows):
    torch.manual_seed(0)
    model = RankerConfig(deep=MLPConfig(hidden=(8,)), **options).build(SCHEMA, TorchEmbeddings(SCHEMA, EmbeddingsConfig(), 0))
    batch = batch_of(gone, rows=rows)
    assert batch.dense[:, 0].isnan().all() == bool(gone)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model(batch)
    weighted_binary_cross_entropy(logits, batch.labels, batch.weights).sum().backward()
    assert logits.isfinite().all()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all((gradient.coalesce().values() if gradient.is_sparse else gradient).isfinite().all() for gradient in gradients)
    assert len(gradients) > 8


# A small world in which every feature counts, to see what happens when one stays away.
NAMES = ("country", "age", "ad")
WORLD = Schema(
    features={**{name: Categorical() for name in NAMES}, "price": Numeric(default=None)},
    tables={name: Table(num_embeddings=8, embedding_dim=4) for name in NAMES},
    labels={"click": Label()},
)
USER = ("country", "age")


def clicks(rows=4096):
    """Ids, prices and clicks."""
    generator = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(8, (rows,), generator=generator) for name in NAMES}
    price = torch.randn(rows, generator=generator)
    effects = {name: torch.randn(8, generator=generator) + 0.7 for name in NAMES}
    logits = price - 3 + sum(effects[name][ids[name]] for name in NAMES)
    return ids, price, (torch.rand(rows, generator=generator) < logits.sigmoid()).float()


def without(gone, ids, price, labels):
    rows, keys = len(price), tuple(key.name for key in WORLD.sparse_keys)
    values = [ids[key][: 0 if key in gone else rows] for key in keys]
    lengths = [torch.full((rows,), int(key not in gone), dtype=torch.int32) for key in keys]
    sparse = SparseFeatures(keys, torch.cat(values), torch.cat(lengths), tuple(len(piece) for piece in values))
    dense = torch.full_like(price, math.nan) if "price" in gone else price
    return Batch(sparse, dense.unsqueeze(1), labels.unsqueeze(1), torch.ones(rows, 1))


def shifts(feature_dropout, groups, steps=150):
    """How far the mean prediction of a trained model moves when each group of features stays away."""
    torch.manual_seed(0)
    config = RankerConfig(crossing=None, deep=MLPConfig(hidden=(16,)), heads=MLPConfig(hidden=()), feature_dropout=feature_dropout)
    model = config.build(WORLD, TorchEmbeddings(WORLD, EmbeddingsConfig(), 0))
    optimizers = [
        AdamWConfig(learning_rate=0.01).build(dense_parameters(model)),
        *build_table_optimizers(options_of_tables(model, EmbeddingsConfig(learning_rate=0.1))),
    ]
    data = clicks()
    for _ in range(steps):
        batch = without((), *data)
        weighted_binary_cross_entropy(model(batch), batch.labels, batch.weights).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        whole, *means = [model(without(gone, *data)).sigmoid().mean().item() for gone in ((), *groups)]
    return [abs(mean - whole) / whole for mean in means]


def test_feature_dropout_keeps_the_mean_prediction_when_features_stay_away():
    groups = [*((name,) for name in WORLD.features), USER]
    plain = shifts(None, groups)
    robust = shifts(FeatureDropoutConfig(rate=0.1, sources={"user": SourceConfig(features=USER, rate=0.1)}), groups)
    assert plain[-1] > 0.2  # without it, clicks seem a fifth more likely or more when the user's features stay away
    assert robust[-1] < plain[-1] / 3
    assert sum(robust) < sum(plain) / 3
    assert max(robust) < 0.1
