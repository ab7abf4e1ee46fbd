"""From Parquet to batches: every kind of feature, nulls, and whatever the files store and however they are cut, read as Python would."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.hashing import hash_ids
from mlenv.datasets.parquet_source import ParquetSource
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

SCHEMA = Schema(
    features={
        "item": Categorical(),
        "country": Categorical(storage="string"),
        "device": Categorical(storage="string", default="phone"),
        "tags": MultiCategorical(max_length=2),
        "words": MultiCategorical(storage="string"),
        "topics": Weighted(storage="string"),
        "price": Numeric(default=-1.0),
        "age": Numeric(default=None),
        "is_new": Binary(default=True),
        "vector": DenseVector(dim=2),
        "history": Sequence(
            fields={"item": SequenceField(table="item"), "action": SequenceField(table="device", storage="string")}, max_length=2
        ),
    },
    tables={
        "item": Table(num_embeddings=10, embedding_dim=4),
        "country": Table(num_embeddings=1000, embedding_dim=4, ids="hash"),
        "device": Table(num_embeddings=2, embedding_dim=4, ids="vocabulary", vocabulary=("phone", "tv")),
        "tags": Table(num_embeddings=5, embedding_dim=4),
        "words": Table(num_embeddings=50, embedding_dim=4, ids="hash"),
        "topics": Table(num_embeddings=50, embedding_dim=4, ids="hash"),
    },
    labels={"click": Label(), "buy": Label(mask="click", weight="value")},
    row_key=("key",),
)

TEXT = st.text("abü", max_size=3)
ITEM, DEVICE = st.integers(0, 9), st.sampled_from(["phone", "tv"])
FLOAT = st.floats(-1e6, 1e6, width=32)
PAIRS = st.lists(st.tuples(TEXT, st.none() | st.floats(0, 4, width=16)), max_size=3, unique_by=lambda pair: pair[0])
HISTORY = st.none() | st.lists(st.tuples(ITEM, DEVICE), max_size=4)
ROW = st.fixed_dictionaries(
    {
        "item": st.none() | ITEM,
        "country": st.none() | TEXT,
        "device": st.none() | DEVICE,
        "tags": st.none() | st.lists(st.none() | st.integers(0, 4), max_size=4),
        "words": st.none() | st.lists(TEXT, max_size=3),
        "topics": st.none() | PAIRS,
        "price": st.none() | FLOAT | st.just(float("nan")),
        "age": st.none() | st.integers(-100, 100),
        "is_new": st.none() | st.booleans(),
        "vector": st.none() | st.lists(st.floats(-9, 9, width=16), min_size=2, max_size=2),
        "history": HISTORY,
        "click": st.integers(0, 1),
        "buy": st.none() | st.integers(0, 1),
        "value": st.sampled_from([0.0, 0.5, 3.0]),
    }
).map(lambda row: row | {"buy": row["buy"] if row["click"] == 0 else row["buy"] or 0})  # a label may be null where its mask hides it

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()]
TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]
FLOATS = [pa.float32(), pa.float64()]


def lists(kinds):
    return [make(kind) for make in (pa.list_, pa.large_list) for kind in kinds]


def pair_lists():
    pairs = [pa.struct([("id", text), ("weight", number)]) for text in TEXTS[:2] for number in FLOATS]
    return [pa.map_(pa.string(), number) for number in FLOATS] + lists(pairs)


STORED = {
    "key": [pa.int32(), pa.int64()],
    "item": INTEGERS,
    "country": TEXTS,
    "device": TEXTS,
    "tags": lists(INTEGERS),
    "words": lists(TEXTS[:2]),
    "topics": pair_lists(),
    "price": FLOATS,
    "age": [*INTEGERS[:4], *FLOATS],
    "is_new": [pa.bool_(), pa.int8(), pa.int64()],
    "vector": [*lists(FLOATS), pa.list_(pa.float32(), 2)],
    "history_item": lists(INTEGERS),
    "history_action": lists(TEXTS[:2]),
    "click": [pa.int8(), pa.int64()],
    "buy": [pa.int8(), pa.float64()],
    "value": FLOATS,
}
"""Types that a file may store each column in."""


def column(rows, name, kind):
    if name.startswith("history_"):
        place = ["history_item", "history_action"].index(name)
        values = [None if row["history"] is None else [event[place] for event in row["history"]] for row in rows]
    else:
        values = [row[name] for row in rows]
    if name == "is_new" and not pa.types.is_boolean(kind):
        values = [None if value is None else int(value) for value in values]
    if name == "topics" and not pa.types.is_map(kind):
        values = [None if pairs is None else [{"id": text, "weight": weight} for text, weight in pairs] for pairs in values]
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def hashed(text, size):
    return int(hash_ids(pa.array([text]))[0] % np.uint64(size))


def slow(row):
    """What a row is in a batch, read one value after the other."""
    events = (row["history"] or [])[-2:]
    pairs = row["topics"] or []
    bags = {
        "item": [] if row["item"] is None else [row["item"]],
        "country": [] if row["country"] is None else [hashed(row["country"], 1000)],
        "device": [["phone", "tv"].index(row["device"] or "phone")],
        "tags": [tag for tag in (row["tags"] or [])[:2] if tag is not None],
        "words": [hashed(word, 50) for word in row["words"] or []],
        "topics": [hashed(text, 50) for text, _ in pairs],
        "history.item": [item for item, _ in events],
        "history.action": [["phone", "tv"].index(action) for _, action in events],
    }
    price = -1.0 if row["price"] is None or row["price"] != row["price"] else row["price"]
    age = float("nan") if row["age"] is None else float(row["age"])
    dense = [price, age, float(row["is_new"] in (None, True)), *(row["vector"] or [0.0, 0.0])]
    weight = (row["value"] or 0.0) * row["click"] if row["buy"] is not None else 0.0
    labels = [float(row["click"]), float(row["buy"] or 0) if weight else None]
    bags = {key: bags[key] for key in sorted(bags)}
    return bags, [weight or 0.0 for _, weight in pairs], dense, labels, [1.0, weight], row["key"]


def read(batch):
    """The rows of a batch."""
    sparse, size = batch.sparse, batch.sparse.batch_size
    values = [bag.tolist() for bag in torch.split(sparse.values, sparse.lengths.tolist())]
    bags = {key: values[place * size : (place + 1) * size] for place, key in enumerate(sparse.keys)}
    place = sparse.keys.index("topics")
    weights = torch.split(sparse.select(place, place + 1).weights, sparse.lengths[place * size : (place + 1) * size].tolist())
    for row in range(size):
        labels, by_task = batch.labels[row].tolist(), batch.weights[row].tolist()
        yield (
            {key: bags[key][row] for key in sorted(bags)},
            weights[row].tolist(),
            batch.dense[row].tolist(),
            [label if weight else None for label, weight in zip(labels, by_task, strict=True)],
            by_task,
            batch.metadata["key"][row].as_py(),
        )


@settings(max_examples=40)
@given(st.lists(ROW, min_size=1, max_size=14), st.lists(st.integers(1, 13), max_size=2), st.integers(1, 5), st.integers(1, 9), st.data())
def test_every_row_reaches_a_batch_as_a_slow_reading_gives_it(tmp_path_factory, rows, cuts, group, batch_size, data):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"key": key, **row} for key, row in enumerate(rows)]
    for number, (start, stop) in enumerate(pairwise(sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))}))):
        # Arrow cannot read nulls among lists of a fixed size.
        stored = STORED | ({"vector": lists(FLOATS)} if any(row["vector"] is None for row in rows[start:stop]) else {})
        kinds = {name: data.draw(st.sampled_from(kinds), label=name) for name, kinds in stored.items()}
        part = pa.table({name: column(rows[start:stop], name, kind) for name, kind in kinds.items()})
        options = {"use_dictionary": data.draw(st.booleans()), "store_schema": data.draw(st.booleans())}
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=group, **options)
    config = DataConfig(path=str(folder), train=WindowConfig(), batch_size=batch_size)
    batches = list(ParquetSource(config, WindowConfig(), SCHEMA, extras=("metadata",)).batches())
    assert [batch.sparse.batch_size for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    found = [row for batch in batches for row in read(batch)]
    assert [repr(row) for row in found] == [repr(slow(row)) for row in rows]
