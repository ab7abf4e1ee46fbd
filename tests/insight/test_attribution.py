"""Attributions of single predictions: they add up, for every crossing, and are what one computes by hand where the model is linear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mlenv import compose
from mlenv.batch import Batch
from mlenv.config import ExperimentConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError
from mlenv.insight.attribution import TOLERANCE, Attributor
from mlenv.models.missing_features import MissingFeatures
from mlenv.modules import TorchEmbeddings
from mlenv.modules.crossings import CROSSINGS
from tests.conftest import ROOT

NUM_ROWS = 4
INNER = {"ensemble": [{"kind": "fm"}, {"kind": "cross_net"}], "stack": [{"kind": "cross_net"}, {"kind": "masknet"}]}


@pytest.fixture(scope="module")
def many(ads: Path) -> Batch:
    config = compose(ROOT / "examples/demo/ranker.yaml", [f"data.path={ads}", "data.train.end=2026-01-02", "data.test.start=2026-01-03"])
    assert config.data.test is not None
    return next(ParquetSource(config.data, config.data.test, config.schema).batches())


@pytest.fixture(scope="module")
def rows(many: Batch) -> Batch:
    return many.rows(0, NUM_ROWS)


def build(many: Batch, *overrides: str) -> tuple[ExperimentConfig, nn.Module]:
    """The demo's model, as it begins, with vectors that are far from zero; it has seen numbers, so that it knows their scale."""
    torch.manual_seed(0)
    small = ["model.deep.hidden=[16]", "model.heads.hidden=[]", "embeddings.init_std=0.3"]
    config = compose(ROOT / "examples/demo/ranker.yaml", [*small, *overrides])
    model = config.model.build(config.schema, TorchEmbeddings(config.schema, config.embeddings, seed=0))
    with torch.no_grad():
        model.train()(many)
    return config, model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", sorted(CROSSINGS))
def test_attributions_add_up_to_what_the_features_do_to_the_logit(kind: str, many: Batch, rows: Batch) -> None:
    crossing = {"kind": kind} | ({"crossings": INNER[kind]} if kind in INNER else {})
    config, model = build(many, f"model.crossing={json.dumps(crossing)}")
    attributor = Attributor(model, config.schema)
    found = attributor.explain(rows)
    nothing = MissingFeatures(config.schema).of(rows, config.schema.features, torch.ones(NUM_ROWS, dtype=torch.bool))
    torch.testing.assert_close(found.logits, model(rows))
    torch.testing.assert_close(found.baseline, model(nothing))
    assert (found.logits - found.baseline).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(found.values.sum(2), found.logits - found.baseline, rtol=0, atol=TOLERANCE)
    assert found.values.shape == (NUM_ROWS, 2, len(config.schema.features))


def test_of_a_linear_model_a_feature_adds_what_is_lost_without_it(many: Batch, rows: Batch) -> None:
    config, model = build(many, "model.crossing=null", "model.deep.hidden=[]")
    attributor, missing = Attributor(model, config.schema), MissingFeatures(config.schema)
    found, estimated = attributor.explain(rows), attributor.estimate(rows)
    assert sorted(found.features) == sorted(config.schema.features)
    for place, feature in enumerate(found.features):
        lost = model(rows) - model(missing.of(rows, {feature}, torch.ones(NUM_ROWS, dtype=torch.bool)))
        torch.testing.assert_close(found.values[:, :, place], lost, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(estimated.values[:, :, place], lost, rtol=1e-4, atol=1e-4)


def test_rows_are_explained_alike_alone_and_together(many: Batch, rows: Batch) -> None:
    config, model = build(many)
    attributor = Attributor(model, config.schema)
    together = attributor.explain(rows).values
    alone = [attributor.explain(rows.rows(row, row + 1)).values for row in range(2)]
    torch.testing.assert_close(torch.cat(alone), together[:2], rtol=1e-4, atol=1e-4)


def test_a_model_without_a_representation_is_refused(many: Batch) -> None:
    config, _ = build(many)
    with pytest.raises(ConfigError, match="expected one Representation, whose output is followed"):
        Attributor(nn.Linear(1, 1), config.schema)
