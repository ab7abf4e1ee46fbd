from __future__ import annotations

import pytest

from mlenv.errors import ConfigError, Problems
from mlenv.schema import Categorical, DenseVector, Label, MultiCategorical, Numeric, Schema, Sequence, SequenceField, Table, Weighted

ITEM = Table(num_embeddings=10, embedding_dim=4)


def schema(**changes):
    features = {
        "topics": Weighted(table="topic"),
        "history": Sequence(fields={"item": SequenceField(table="item"), "action": SequenceField()}, max_length=5),
        "item": Categorical(),
        "age": Numeric(),
        "country": Categorical(storage="string"),
        "vector": DenseVector(dim=3),
        "tags": MultiCategorical(table="country", storage="string"),
    }
    tables = {
        "item": ITEM,
        "history_action": Table(num_embeddings=3, embedding_dim=2),
        "topic": Table(num_embeddings=5, embedding_dim=2),
        "country": Table(num_embeddings=100, embedding_dim=4, ids="hash"),
    }
    return Schema(**{"features": features, "tables": tables, "labels": {"click": Label()}} | changes)


def test_keys_of_one_lookup_are_contiguous():
    keys = schema().sparse_keys
    assert [(key.name, key.lookup) for key in keys] == [
        ("country", "pooled"),
        ("tags", "pooled"),
        ("topics", "pooled_weighted"),
        ("history.action", "unpooled"),  # its table is narrower than that of the items
        ("history.item", "unpooled"),
        ("item", "unpooled"),  # shares its table with a sequence
    ]
    assert [key.column for key in keys] == ["country", "tags", "topics", "history_action", "history_item", "item"]


def test_dense_columns_lie_side_by_side():
    assert [(column.name, column.start, column.width) for column in schema().dense_columns] == [("age", 0, 1), ("vector", 1, 3)]
    assert schema().num_dense == 4


def test_fingerprint_follows_what_the_model_sees_and_nothing_else():
    before = schema()
    owned = schema(features=before.features | {"age": Numeric(owner="ads", core=True, entity="user")}, segments=("country",))
    assert owned.fingerprint == before.fingerprint
    assert schema(labels={"click": Label(teacher="teacher_click")}).fingerprint == before.fingerprint
    for other in (
        schema(features=before.features | {"age": Numeric(log1p=True)}),
        schema(tables=before.tables | {"item": Table(num_embeddings=11, embedding_dim=4)}),
        schema(labels={"click": Label(column="clicked")}),
        schema(features=dict(reversed(before.features.items()))),
    ):
        assert other.fingerprint != before.fingerprint
        assert before.differences(other)


def test_differences_are_spelled_out_by_feature():
    before = schema()
    features = {name: feature for name, feature in before.features.items() if name != "vector"} | {
        "age": Numeric(log1p=True),
        "price": Numeric(),
    }
    assert before.differences(schema(features=features)) == [
        "features.vector: removed",
        "features.price: added",
        "features.age.log1p: False became True",
    ]
    assert before.differences(schema()) == []


def test_every_problem_is_reported_at_once():
    with pytest.raises(Problems) as caught:
        Schema(
            features={
                "age": Categorical(table="item", default="old"),
                "item": Categorical(table="itme"),
                "word": Categorical(storage="string"),
            },
            tables={"item": ITEM, "word": ITEM, "spare": ITEM},
            labels={"click": Label(column="item")},
        )
    text = str(caught.value)
    assert "features.item.table: expected a table of the schema. Received: 'itme'" in text
    assert "did you mean 'item'" in text
    assert "features.age: expected a default and a vocabulary of integers, as its ids are. Received: 'old'." in text
    assert "tables.spare: expected a feature that uses it" in text
    assert "tables.word.ids: expected hash or vocabulary" in text
    assert "labels.click: expected a column that no feature reads" in text


@pytest.mark.parametrize(
    "options",
    [
        {"num_embeddings": 0, "embedding_dim": 4},
        {"num_embeddings": 4, "embedding_dim": -4},
        {"num_embeddings": 4, "embedding_dim": 4, "ids": "vocabulary"},
        {"num_embeddings": 4, "embedding_dim": 4, "vocabulary": ("a",)},
        {"num_embeddings": 1, "embedding_dim": 4, "ids": "vocabulary", "vocabulary": ("a", "b")},
        {"num_embeddings": 2, "embedding_dim": 4, "ids": "vocabulary", "vocabulary": ("a", "b"), "out_of_range": "hash"},
        {"num_embeddings": 3, "embedding_dim": 4, "ids": "vocabulary", "vocabulary": ("a", "a")},
    ],
)
def test_a_table_that_cannot_work_is_refused(options):
    with pytest.raises(ConfigError):
        Table(**options)


@pytest.mark.parametrize(
    ("num_embeddings", "width"),
    [(1, 8), (2, 8), (16, 12), (100, 20), (500, 28), (10_000, 60), (10**8, 64)],  # 6, 7.1, 12, 19.0, 28.4, 60, 600
)
def test_a_table_without_a_width_takes_the_rule_of_thumb(num_embeddings, width):
    assert Table(num_embeddings=num_embeddings).embedding_dim == width
    assert Table(num_embeddings=num_embeddings) == Table(num_embeddings=num_embeddings, embedding_dim=width)


def test_a_default_is_finite_or_null():
    assert Numeric(default=None).default is None
    for default in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^default: expected a finite number or null"):
            Numeric(default=default)
