from __future__ import annotations

import pytest
import torch

from mlenv.batch import SparseFeatures
from mlenv.config import EmbeddingsConfig
from mlenv.modules import TorchEmbeddings
from mlenv.modules.served_embeddings import QuantizedTable, ServedEmbeddings
from mlenv.schema import Categorical, Label, MultiCategorical, Schema, Sequence, SequenceField, Table, Weighted

TABLE = Table(num_embeddings=10, embedding_dim=4)
SCHEMA = Schema(
    features={
        "single": Categorical(),
        "bag": MultiCategorical(),
        "weights": Weighted(),
        "history": Sequence(fields={"item": SequenceField(table="single")}),
    },
    tables={"single": TABLE, "bag": Table(num_embeddings=10, embedding_dim=4, pooling="mean"), "weights": TABLE},
    labels={"click": Label()},
)
KEYS = tuple(key.name for key in SCHEMA.sparse_keys)
IDS = {"single": [[3], [], [5]], "bag": [[1, 2], [], [4]], "weights": [[], [6, 7], [8]], "history.item": [[9, 1], [2], []]}


def sparse(fill_single: bool) -> SparseFeatures:
    bags = [IDS[name] for name in KEYS]
    values = [[id_ for bag in of_key for id_ in bag] for of_key in bags]
    if fill_single:
        values[KEYS.index("single")] = [3, 0, 5]
    lengths = torch.tensor([len(bag) for of_key in bags for bag in of_key], dtype=torch.int32)
    flat = torch.tensor([id_ for of_key in values for id_ in of_key])
    weights = torch.ones(len(flat))
    counts = tuple(map(len, values))
    first = sum(counts[: KEYS.index("weights")])
    weights[first : first + 3] = torch.tensor([0.5, 2.0, -1.0])
    return SparseFeatures(KEYS, flat, lengths, counts, weights)


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.02)])
def test_gives_what_the_trained_tables_give(kind, tolerance):
    trained = TorchEmbeddings(SCHEMA, EmbeddingsConfig(init_std=1.0), seed=3)
    expected, served = trained(sparse(fill_single=False)), ServedEmbeddings(trained, kind)(sparse(fill_single=True))
    torch.testing.assert_close(served.pooled, expected.pooled, atol=tolerance, rtol=tolerance)
    found, wanted = served.sequences["history"], expected.sequences["history"]
    torch.testing.assert_close(found.values, wanted.values, atol=tolerance, rtol=tolerance)
    assert torch.equal(found.lengths, wanted.lengths)


def test_an_element_is_off_by_half_a_step_at_most():
    weight = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    weight[3] = 2.5  # a row without a range
    table = QuantizedTable(weight)
    rows = table(torch.arange(50))
    steps = (weight.amax(1) - weight.amin(1)) / 255
    assert ((rows - weight).abs() <= steps.unsqueeze(1) / 2 + 1e-6).all()
    assert torch.equal(rows[3], weight[3])
    assert torch.equal(table(torch.tensor([4, 4])), rows[[4, 4]])
    assert table.integers.dtype == torch.uint8
