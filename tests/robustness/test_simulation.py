"""What a simulation reports against nulls written into a copy of the data, and models that were and were not prepared for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlenv import Experiment, compose, fit
from mlenv.cli import main
from mlenv.errors import DONE, WRONG_INPUT, ConfigError
from mlenv.inference.stored_scorer import StoredScorer, open_scorer, rows_for
from mlenv.robustness.corruptions import draw_rows
from mlenv.robustness.simulation import PAGE_FILE, SIMULATION_FILE, Simulation, SimulationOptions, simulate

OPTIONS = SimulationOptions(resamples=10, seed=5, groups={"profiles": ("user_country", "interests")})


@pytest.fixture(scope="module")
def scorer(stored_ranker: Path) -> StoredScorer:
    return open_scorer(str(stored_ranker))


@pytest.fixture(scope="module")
def found(scorer: StoredScorer) -> Simulation:
    return simulate(scorer, "ranker", rows_for(scorer), OPTIONS)


def auc_by_definition(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative in which the positive is ahead; a tie is half."""
    ahead = predictions[labels > 0][:, None] - predictions[labels == 0][None, :]
    return float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())


def test_the_loss_is_that_of_nulls_in_a_copy_of_the_data(scorer, found, ads, tmp_path):
    table = pq.read_table(ads / "date=2026-01-03")
    hit = draw_rows(table.num_rows, 0.2, 5)
    values = table.column("item_id").combine_chunks()
    nulled = pa.compute.if_else(pa.array(~hit), values, pa.scalar(None, values.type))
    (tmp_path / "date=2026-01-03").mkdir()
    copy = table.set_column(table.column_names.index("item_id"), "item_id", nulled)
    pq.write_table(copy, tmp_path / "date=2026-01-03" / "part.parquet")
    by_hand = {}
    for name, path in (("whole", str(ads)), ("nulled", str(tmp_path))):
        source = scorer.source(rows_for(scorer, path, start="2026-01-03"))
        scored = [(batch.labels[:, 0], scorer(batch)[:, 0]) for batch in source.batches()]
        labels, predictions = (torch.cat(parts).numpy() for parts in zip(*scored, strict=True))
        by_hand[name] = auc_by_definition(labels, predictions), predictions.astype(np.float64)
    (effect,) = [one for one in found.effects if (one.kind, one.subject, one.task) == ("missing", "item_id", "click")]
    assert by_hand["nulled"][0] < by_hand["whole"][0] - 0.005  # it matters
    assert effect.auc == pytest.approx(by_hand["nulled"][0], abs=1e-6)
    assert effect.auc_change == pytest.approx(by_hand["nulled"][0] - by_hand["whole"][0], abs=1e-6)
    assert effect.reached == pytest.approx(hit.mean())
    moved = np.abs(by_hand["nulled"][1] - by_hand["whole"][1])
    assert effect.move == pytest.approx(moved.mean(), rel=1e-4)
    assert effect.relative_move == pytest.approx((moved / by_hand["whole"][1]).mean(), rel=1e-4)
    assert effect.calibration == pytest.approx(by_hand["nulled"][1].sum() / table.column("click").to_numpy().sum(), rel=1e-5)
    assert effect.auc_low < effect.auc_change < effect.auc_high
    kept = (by_hand["nulled"][0] - 0.5) / (by_hand["whole"][0] - 0.5)
    assert effect.kept == pytest.approx(kept, abs=1e-5)
    other = next(one for one in found.effects if (one.kind, one.subject, one.task) == ("missing", "item_id", "conversion"))
    assert found.stability["item_id"] == pytest.approx(min(effect.kept, other.kept))


def test_every_feature_is_tried_in_every_way_that_means_something(scorer, found):
    tried = {(one.kind, one.subject) for one in found.effects}
    features = scorer.schema.features
    assert {subject for kind, subject in tried if kind == "other"} == set(features)
    assert {subject for kind, subject in tried if kind == "scaled"} == {"price", "item_age_days", "topic_weights", "item_vector"}
    stale = {name for name, feature in features.items() if feature.entity in ("user", "item")} - {"user_id", "item_id"}
    assert {subject for kind, subject in tried if kind == "stale"} == stale
    groups = {"user features", "item features", "context features", "profiles"}
    assert {subject for kind, subject in tried if kind == "missing at peak"} == groups
    assert set(found.stability) == set(features)
    assert list(found.stability.values()) == sorted(found.stability.values())
    by_kind = {one.kind: one for one in found.effects if (one.subject, one.task) == ("item_age_days", "click")}
    assert 0 < by_kind["stale"].reached <= by_kind["missing"].reached
    assert by_kind["stale"].move > 0
    # A day later the same item has the same vector.
    assert next(one for one in found.effects if (one.kind, one.subject) == ("stale", "item_vector")).move == 0


def test_models_that_were_prepared_for_nulls_lose_less(tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_config)
    settings = [
        "data.num_epochs=4",
        "data.batch_size=256",
        "data.train.end=2026-01-02",
        "loop.max_steps=0",
        "loop.checkpoint_every_steps=1000",
    ]
    settings += ["embeddings.learning_rate=0.1", "tracking.enabled=false"]
    settings += ["schema.features.placement={kind: categorical, storage: string}"]
    settings += ["schema.tables.placement={num_embeddings: 100, embedding_dim: 4, ids: hash}"]
    losses = []
    for seed in range(3):
        for name, own in (("plain", []), ("prepared", ["model.feature_dropout.rate=0.2"])):
            output = tmp_path / f"{name} {seed}"
            config = compose(tmp_path / "config.yaml", [*settings, *own, f"seed={seed}", f"output={output}"])
            with Experiment(config) as experiment:
                fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
            scorer = open_scorer(str(output))
            options = SimulationOptions(kinds=("missing",), features=("item_id", "placement"), share=0.5, resamples=2)
            effects = simulate(scorer, name, rows_for(scorer), options).effects
            losses.append([-effect.auc_change for effect in effects])
    plain, prepared = np.array(losses[::2]), np.array(losses[1::2])
    assert (prepared.mean(axis=1) < plain.mean(axis=1)).all()


def test_the_command_writes_figures_and_a_page(stored_ranker, tmp_path, capsys):
    narrow = [
        "--features",
        "price,placement",
        "--kinds",
        "missing,scaled",
        "--resamples",
        "5",
        "--rows",
        "500",
        "--group",
        "store=price,device",
    ]
    assert main(["simulate", str(stored_ranker), *narrow, "--out", str(tmp_path / "out")]) == DONE
    assert "stability of placement when it is missing in 20% of the rows" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out" / SIMULATION_FILE).read_text())
    assert plain["num_rows"] == 500
    assert {(one["subject"], one["kind"]) for one in plain["effects"]} == {
        ("price", "missing"),
        ("price", "scaled"),
        ("placement", "missing"),
        ("store", "missing"),
        ("store", "missing at peak"),
    }
    assert plain["notes"] == []
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert "ten times the number" in page
    assert "placement" in page


def test_wrong_input_is_named(stored_ranker, scorer, tmp_path, capsys):
    assert main(["simulate", str(stored_ranker), "--features", "prise"]) == WRONG_INPUT
    assert "--features: expected features of the model. Received: 'prise'. Fix: did you mean 'price'" in capsys.readouterr().err
    assert main(["simulate", str(stored_ranker), "--kinds", "stael"]) == WRONG_INPUT
    assert "did you mean 'stale'" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "nothing")]) == WRONG_INPUT
    assert "expected a checkpoint" in capsys.readouterr().err
    assert main(["simulate", str(stored_ranker), "--share", "0"]) == WRONG_INPUT
    assert main(["simulate", str(stored_ranker), "--out", str(tmp_path / "no" / "out")]) == WRONG_INPUT
    assert "mkdir -p" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--group late"):
        simulate(scorer, "ranker", rows_for(scorer), replace(OPTIONS, groups={"late": ("nobody",)}))
