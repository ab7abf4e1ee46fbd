"""Permutation importance: the numbers of scikit-learn, for features alone, in groups and by segment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.inspection import permutation_importance as of_scikit_learn
from sklearn.metrics import log_loss, roc_auc_score

from mlenv import compose
from mlenv.batch import Batch, SparseFeatures
from mlenv.config import WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import DataError
from mlenv.insight.importance import CONFIDENCE, Importance, groups_to_permute, permutation_importance, permutations, rank_correlation
from mlenv.insight.row_sample import RowSample, read_sample
from mlenv.modules import TorchEmbeddings
from mlenv.schema import Schema

FEATURES = ("item_id", "device", "price")
REPEATS = 3


class Model:
    """A fresh model that scores batches, and matrices as scikit-learn takes them; to six digits, so that equal rows are ties."""

    def __init__(self, schema: Schema, model: torch.nn.Module) -> None:
        self.schema, self.model = schema, model

    def __call__(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return torch.sigmoid(self.model(replace(batch, dense=batch.dense.double()))).round(decimals=6)

    def fit(self, *_: object) -> Model:
        return self

    def predict(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        keys, count = tuple(key.name for key in self.schema.sparse_keys), len(matrix)
        columns = {name: matrix[:, place] for place, name in enumerate(FEATURES)}
        ids = torch.from_numpy(np.concatenate([columns[key] for key in keys]).astype(np.int64))
        sparse = SparseFeatures(keys, ids, torch.ones(len(ids), dtype=torch.int32), (count,) * len(keys))
        nothing = torch.zeros(count, 1)
        batch = Batch(sparse, torch.from_numpy(columns["price"]).float()[:, None], nothing, nothing)
        return self(batch)[:, 0].double().numpy()


@pytest.fixture(scope="module")
def model(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(tiny_config)
    config = compose(file, ["schema.request=request_id", "schema.segments=[placement]", "embeddings.init_std=1.0"])
    torch.manual_seed(0)
    return Model(
        config.schema, config.model.build(config.schema, TorchEmbeddings(config.schema, config.embeddings, seed=0)).double().eval()
    )


@pytest.fixture(scope="module")
def sample(model: Model, ads: Path, tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> RowSample:
    """Rows whose labels follow what the model says, with noise."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(tiny_config)
    source = ParquetSource(compose(file).data, WindowConfig(start="2026-01-03"), model.schema, extras=("metadata",))
    sample = read_sample(source, 700)
    sample.labels = torch.bernoulli(model(sample.take(torch.arange(700))), generator=torch.Generator().manual_seed(0))
    sample.weights = torch.ones(700, 1)
    return sample


@pytest.fixture(scope="module")
def matrix(sample: RowSample) -> NDArray[np.float64]:
    batch = sample.take(torch.arange(len(sample)))
    values = dict(zip(batch.sparse.keys, batch.sparse.values.view(len(batch.sparse.keys), -1).numpy(), strict=True))
    return np.stack([values["item_id"], values["device"], batch.dense[:, 0].numpy()], axis=1).astype(np.float64)


def orders_of_scikit_learn(num_rows: int, seed: int) -> list[NDArray[np.int64]]:
    """It shuffles one index again and again, and takes from the column that it has shuffled before."""
    random = np.random.RandomState(np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1))
    index, order, orders = np.arange(num_rows), np.arange(num_rows), []
    for _ in range(REPEATS):
        random.shuffle(index)
        order = order[index]
        orders.append(order)
    return orders


def auc(model: Model, rows: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return float(roc_auc_score(labels, model.predict(rows)))


def entropy_gain(model: Model, rows: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """Minus normalized entropy."""
    return -float(log_loss(labels, model.predict(rows)) / log_loss(labels, np.full(len(labels), labels.mean())))


def by_place(found: list[Importance]) -> dict[tuple[str, str, str], Importance]:
    return {(one.feature, one.metric, one.segment): one for one in found}


def test_the_numbers_are_those_of_scikit_learn(model, sample, matrix):
    labels = sample.labels[:, 0].numpy()
    groups = {name: frozenset({name}) for name in FEATURES}
    found, notes = permutation_importance(model, sample, groups, orders_of_scikit_learn(len(sample), 5), num_draws=20)
    assert notes == []
    assert len(found) == 2 * len(FEATURES)
    for metric, scoring in (("auc", auc), ("normalized_entropy", entropy_gain)):
        expected = of_scikit_learn(model, matrix, labels, scoring=scoring, n_repeats=REPEATS, random_state=5)
        for place, feature in enumerate(FEATURES):
            one = by_place(found)[feature, metric, ""]
            assert one.loss == pytest.approx(expected.importances_mean[place], abs=1e-7)
            assert one.deviation == pytest.approx(expected.importances_std[place], abs=1e-7)
    assert by_place(found)["item_id", "auc", ""].is_clear


def test_groups_and_segments_are_those_of_matrices_put_together_by_hand(model, sample, matrix):
    labels = sample.labels[:, 0].numpy()
    orders = permutations(len(sample), REPEATS, 1)
    groups = {"two": frozenset({"item_id", "price"}), "item_id": frozenset({"item_id"})}
    found, notes = permutation_importance(model, sample, groups, orders, segments=["placement"], num_draws=20)
    placement = np.array(sample.metadata.column("placement").to_pylist())
    measured = {one.segment for one in found if one.segment}
    assert len(measured) >= 3
    assert len(measured) + len(notes) == len(set(placement))
    for name, columns in (("two", [0, 2]), ("item_id", [0])):
        for segment in ("", *measured):
            rows = placement == segment.partition("=")[2] if segment else np.ones(len(sample), bool)
            lost = []
            for order in orders:
                dealt = matrix.copy()
                dealt[:, columns] = matrix[order][:, columns]
                lost.append(auc(model, matrix[rows], labels[rows]) - auc(model, dealt[rows], labels[rows]))
            assert by_place(found)[name, "auc", segment].loss == pytest.approx(np.mean(lost), abs=1e-7)


def test_an_interval_holds_what_other_rows_and_permutations_give(model, sample, matrix):
    """The spread of a small sample's figures around those of many: 40 samples of requests, each with permutations of its own."""
    labels = sample.labels[:, 0].numpy()
    groups, random, lost = {"item_id": frozenset({"item_id"})}, np.random.default_rng(0), []
    (one, _), _ = permutation_importance(model, sample, groups, permutations(len(sample), REPEATS, 2), num_draws=200)
    requests = np.unique(sample.metadata.column("request_id").to_pylist(), return_inverse=True)[1]
    places = [np.flatnonzero(requests == request) for request in range(requests.max() + 1)]
    for _ in range(40):
        rows = np.concatenate([places[request] for request in random.integers(0, len(places), len(places))])
        repeats = []
        for _ in range(REPEATS):
            dealt = matrix.copy()
            dealt[:, 0] = matrix[random.permutation(len(matrix)), 0]
            repeats.append(auc(model, matrix[rows], labels[rows]) - auc(model, dealt[rows], labels[rows]))
        lost.append(np.mean(repeats))
    assert np.mean([one.low < value < one.high for value in lost]) == pytest.approx(CONFIDENCE, abs=0.1)
    assert (one.high - one.low) / (2 * 1.96) == pytest.approx(np.std(lost), rel=0.35)


def test_what_cannot_be_measured_is_said(model, sample):
    labels, groups, orders = sample.labels.clone(), {"price": frozenset({"price"})}, permutations(len(sample), 2, 0)
    placement = np.array(sample.metadata.column("placement").to_pylist())
    value = max(set(placement), key=list(placement).count)
    sample.labels = torch.where(torch.from_numpy(placement == value)[:, None], 0.0, labels)
    _, notes = permutation_importance(model, sample, groups, orders, segments=["placement"], num_draws=5)
    assert f"click, placement={value}: only negative labels ({(placement == value).sum()})" in notes
    sample.labels = torch.ones_like(labels)
    with pytest.raises(DataError, match=r"labels of both kinds for one task at least\. Received: 'click: only positive labels \(700\)"):
        permutation_importance(model, sample, groups, orders, num_draws=5)
    sample.labels = labels


def test_groups_are_features_and_those_of_each_entity(model):
    assert groups_to_permute(model.schema) == {name: frozenset({name}) for name in FEATURES} | {"context features": frozenset(FEATURES)}
    assert groups_to_permute(model.schema, ["price"]) == {"price": frozenset({"price"})}


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert np.isnan(rank_correlation([1, 1], [1, 2]))
