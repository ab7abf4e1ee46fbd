from __future__ import annotations

import pytest
import torch

from mlenv.batch import SparseFeatures
from mlenv.config import EmbeddingsConfig
from mlenv.modules.embeddings import ENGINES, TorchEmbeddings, fill_initial_rows, rows_of_bags
from mlenv.schema import Categorical, Label, MultiCategorical, Schema, Sequence, SequenceField, Table, Weighted

SCHEMA = Schema(
    features={
        "item": Categorical(),
        "country": Categorical(),
        "tags": MultiCategorical(),
        "topics": Weighted(),
        "history": Sequence(fields={"item": SequenceField(table="item"), "action": SequenceField()}),
    },
    tables={
        "item": Table(num_embeddings=10, embedding_dim=3),
        "country": Table(num_embeddings=4, embedding_dim=2),
        "tags": Table(num_embeddings=5, embedding_dim=2, pooling="mean"),
        "topics": Table(num_embeddings=5, embedding_dim=2, pooling="mean"),
        "history_action": Table(num_embeddings=3, embedding_dim=1),
    },
    labels={"click": Label()},
)
BAGS = {
    "country": [[1], [], [3]],
    "tags": [[0, 4], [], [2]],
    "topics": [[1, 1], [2], []],
    "item": [[7], [8], [9]],
    "history.item": [[1, 2], [], [9]],
    "history.action": [[0, 2], [], [1]],
}
WEIGHTS = [[0.5, 2.0], [3.0], []]


def sparse_features() -> SparseFeatures:
    keys = tuple(key.name for key in SCHEMA.sparse_keys)
    assert sorted(keys) == sorted(BAGS)
    bags = [bag for key in keys for bag in BAGS[key]]
    weights = [
        weight
        for key in keys
        for bag, given in zip(BAGS[key], WEIGHTS, strict=True)
        for weight in (given if key == "topics" else [1.0] * len(bag))
    ]
    return SparseFeatures(
        keys,
        torch.tensor([value for bag in bags for value in bag]),
        torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
        tuple(sum(map(len, BAGS[key])) for key in keys),
        torch.tensor(weights),
    )


def test_bags_pool_to_what_is_computed_by_hand():
    embeddings = TorchEmbeddings(SCHEMA, EmbeddingsConfig(init_std=1.0), seed=1)
    embedded = embeddings(sparse_features())
    expected = []
    for key in embeddings.layout.pooled_keys:
        table = embeddings.tables[key.table].weight
        rows = []
        for place, bag in enumerate(BAGS[key.name]):
            total = torch.zeros(table.shape[1])
            for number, value in enumerate(bag):
                total = total + table[value] * (WEIGHTS[place][number] if key.name == "topics" else 1.0)
            rows.append(total / max(len(bag), 1) if SCHEMA.tables[key.table].pooling == "mean" else total)
        expected.append(torch.stack(rows))
    torch.testing.assert_close(embedded.pooled, torch.cat(expected, dim=1))
    assert embedded.pooled.shape == (3, sum(embeddings.layout.pooled_dims))

    history = embedded.sequences["history"]
    item, action = embeddings.tables["item"].weight, embeddings.tables["history_action"].weight
    rows = [torch.cat([action[a], item[i]]) for i, a in zip([1, 2, 9], [0, 2, 1], strict=True)]
    torch.testing.assert_close(history.values, torch.stack(rows))
    assert history.lengths.tolist() == [2, 0, 1]
    assert embeddings.layout.sequence_dims == {"history": 4}


@pytest.mark.parametrize("engine", ENGINES)
def test_features_that_are_all_null_pool_to_zeros_and_train_nothing(engine):
    embeddings = ENGINES[engine](SCHEMA, EmbeddingsConfig(init_std=1.0), seed=1)
    if engine == "torchrec":
        embeddings = embeddings.to_empty(device="cpu")
    keys = tuple(key.name for key in SCHEMA.sparse_keys)
    lengths = torch.zeros(3 * len(keys), dtype=torch.int32)
    embedded = embeddings(SparseFeatures(keys, torch.zeros(0, dtype=torch.int64), lengths, (0,) * len(keys), torch.zeros(0)))
    history = embedded.sequences["history"]
    assert embedded.pooled.tolist() == [[0.0] * sum(embeddings.layout.pooled_dims)] * 3
    assert (history.values.shape, history.lengths.tolist()) == ((0, 4), [0, 0, 0])
    (embedded.pooled.sum() + history.values.sum()).backward()
    assert not any(table.grad.to_dense().any() for table in embeddings.parameters() if table.grad is not None)


def test_gradients_are_sparse_and_reach_the_rows_that_were_looked_up():
    embeddings = TorchEmbeddings(SCHEMA, EmbeddingsConfig(), seed=1)
    embedded = embeddings(sparse_features())
    (embedded.pooled.sum() + embedded.sequences["history"].values.sum()).backward()
    gradient = embeddings.tables["item"].weight.grad
    assert gradient.is_sparse
    counts = gradient.to_dense()[:, 0].tolist()
    assert counts == [0, 1, 1, 0, 0, 0, 0, 1, 1, 2]  # once by the candidate, once by the history


def test_initial_rows_do_not_depend_on_the_sharding():
    whole = torch.empty(70_000, 2)
    fill_initial_rows(whole, 0, "item", 0.5, seed=3)
    for first, last in ((0, 10), (65_530, 65_540), (65_536, 70_000)):
        part = torch.empty(last - first, 2)
        fill_initial_rows(part, first, "item", 0.5, seed=3)
        assert torch.equal(part, whole[first:last])
    assert whole.std().item() == pytest.approx(0.5, rel=0.01)
    other = torch.empty(10, 2)
    fill_initial_rows(other, 0, "user", 0.5, seed=3)
    assert not torch.equal(other, whole[:10])


def test_rows_of_bags():
    assert rows_of_bags(torch.tensor([2, 0, 1], dtype=torch.int32), 3).tolist() == [0, 0, 2]


def test_a_view_of_some_keys_shares_memory():
    sparse = sparse_features()
    part = sparse.select(1, 3)
    assert part.keys == sparse.keys[1:3]
    assert part.values.tolist() == [value for key in part.keys for bag in BAGS[key] for value in bag]
    assert part.values.untyped_storage().data_ptr() == sparse.values.untyped_storage().data_ptr()
    jagged = part.to_keyed_jagged_tensor()
    assert jagged.values().data_ptr() == part.values.data_ptr()
    assert [jagged[key].lengths().tolist() for key in part.keys] == [list(map(len, BAGS[key])) for key in part.keys]


def test_dense_gradients_are_those_of_the_rows():
    gradients = []
    for optimizer in ("row_wise_adagrad", "adam"):
        embeddings = TorchEmbeddings(SCHEMA, EmbeddingsConfig(optimizer=optimizer), seed=0)
        embedded = embeddings(sparse_features())
        torch.manual_seed(0)
        parts = [embedded.pooled, embedded.sequences["history"].values]
        sum((part * torch.randn_like(part)).sum() for part in parts).backward()
        gradients.append({name: table.weight.grad for name, table in embeddings.tables.items()})
    sparse, dense = gradients
    for name in SCHEMA.tables:
        assert sparse[name].is_sparse
        torch.testing.assert_close(sparse[name].to_dense(), dense[name])
