"""A trained model explained and described: the figures are those that one computes by hand, and what cannot be is said."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlenv import compose, train
from mlenv.cli import main
from mlenv.datasets.hashing import hash_ids
from mlenv.errors import DONE, WRONG_INPUT
from mlenv.inference.stored_scorer import open_scorer
from mlenv.insight.attribution import TOLERANCE
from mlenv.insight.embedding_health import TableHealth
from mlenv.insight.explanation import FIGURES, LOCAL, PAGE, InsightOptions, explain
from mlenv.insight.model_card import FIGURES as CARD_FIGURES
from mlenv.insight.model_card import PAGE as CARD_PAGE
from mlenv.insight.model_card import write_card
from mlenv.modules import TorchEmbeddings

FEW = InsightOptions(num_rows=600, num_repeats=2, segments=("placement",), num_local=5)


@pytest.fixture(scope="module")
def trained(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of few steps, so that some rows of its tables are as they began; one table has no optimizer state."""
    folder = tmp_path_factory.mktemp("a model to explain")
    (folder / "config.yaml").write_text(tiny_config)
    settings = ["schema.request=request_id", "schema.segments=[device]", "tracking.enabled=false", "loop.checkpoint_every_steps=100"]
    settings += ["schema.tables.device.num_embeddings=2", "embeddings.tables={device: {optimizer: sgd, learning_rate: 0.1}}"]
    settings += ["schema.features.user_id={kind: categorical, table: user}", "schema.tables.user={num_embeddings: 300, embedding_dim: 4}"]
    train(compose(folder / "config.yaml", [*settings, "loop.max_steps=3", "data.batch_size=32", f"output={folder / 'run'}"]))
    return folder


def test_what_explain_finds(trained: Path, ads: Path) -> None:
    found = explain(str(trained / "run"), FEW, out=trained / "explained")
    plain = json.loads((trained / "explained" / FIGURES).read_text())
    assert plain["rows"] == 600
    assert {one["feature"] for one in plain["importance"]} == {"item_id", "device", "price", "user_id", "context features"}
    assert {one["segment"].partition("=")[0] for one in plain["importance"]} == {"", "placement"}
    assert set(plain["one_pass"]["click"]) == {"item_id", "device", "price", "user_id"}
    assert -1 <= plain["rank_correlation"]["click"] <= 1

    table = pq.read_table(trained / "explained" / LOCAL)
    assert table.equals(found.local)
    rows = table.to_pylist()
    assert len(rows) == 5
    stored = {row["impression_id"]: row for file in ads.rglob("*.parquet") for row in pq.read_table(file).to_pylist()}
    for row in rows:
        added = sum(value for name, value in row.items() if name.startswith("attribution_"))
        assert added == pytest.approx(row["logit"] - row["baseline_logit"], abs=TOLERANCE)
        assert row["gap"] <= TOLERANCE
        assert row["prediction"] == pytest.approx(1 / (1 + math.exp(-row["logit"])), abs=1e-6)
        assert row["label"] == stored[row["impression_id"]]["click"]
    page = (trained / "explained" / PAGE).read_text()
    assert page.count("<svg") == 1
    assert "Single predictions" in page
    check_healths({one.table: one for one in found.healths}, trained, ads)


def check_healths(healths: dict[str, TableHealth], trained: Path, ads: Path) -> None:
    """Against fresh tables and a count over the stored rows."""
    scorer = open_scorer(str(trained / "run"))
    config = compose(trained / "run" / "config.yaml")
    fresh = TorchEmbeddings(config.schema, config.embeddings, config.seed)
    data = pa.concat_tables(pq.read_table(file) for file in ads.glob("date=2026-01-03/*.parquet"))
    devices = data.column("device").drop_null().combine_chunks()
    ids = {"item_id": data.column("item_id").drop_null().to_pylist(), "user": data.column("user_id").drop_null().to_pylist()}
    ids["device"] = [int(row) for row in hash_ids(devices) % np.uint64(2)]
    for name, one in healths.items():
        weight = scorer.model.representation.embeddings.tables[name].weight.cpu()
        untrained = (weight == fresh.tables[name].weight).all(1)
        norms = weight.norm(dim=1)[~untrained]
        counts = Counter(ids[name])
        assert one.untrained == pytest.approx(untrained.float().mean())
        assert one.norms == pytest.approx(np.quantile(norms.numpy(), (0.01, 0.5, 0.99)), rel=1e-5)
        assert one.dead == pytest.approx((norms < 0.01 * np.median(norms)).sum() / len(weight))
        assert (one.lookups, one.used) == (len(ids[name]), pytest.approx(len(counts) / len(weight)))
        most = [count for _, count in counts.most_common(max(1, len(weight) // 100))]
        assert one.top == pytest.approx(sum(most) / len(ids[name]))
        assert one.unseen == pytest.approx(sum(bool(untrained[row]) for row in ids[name]) / len(ids[name]))
    assert 0 < healths["user"].untrained < 1
    assert 0 < healths["user"].unseen < 1
    rows = {device: int(row) for device, row in zip(devices.to_pylist(), ids["device"], strict=True)}
    shared = sum(list(rows.values()).count(row) > 1 for row in rows.values())
    assert (healths["device"].ids, healths["device"].colliding) == (len(rows), pytest.approx(shared / len(rows)))
    assert shared > 0
    assert healths["user"].ids is None


def test_the_card_tells_all_that_was_measured(trained: Path) -> None:
    options = InsightOptions(num_rows=300, num_repeats=2)
    page = write_card(str(trained / "run"), trained / "card", options, notes="Orders items.\n\n# Not meant for\nPrices & <rents>.")
    text = (trained / "card" / CARD_PAGE).read_text()
    for part in ("Orders items.", "<h3>Not meant for</h3>", "Prices &amp; &lt;rents&gt;.", "Known limits", "Reliability", "Lineage"):
        assert part in text
    assert "src=" not in text  # self-contained
    figures = json.loads((trained / "card" / CARD_FIGURES).read_text())
    measured = json.loads((trained / "run" / "metrics.json").read_text())
    names = [f"click/{name}{at}" for name in ("auc", "calibration", "examples") for at in ("", "@device=phone", "@device=tablet")]
    assert {name: figures["metrics"][name] for name in names} == pytest.approx({name: measured[name] for name in names}, rel=1e-5)
    auc = next(one for one in figures["figures"] if (one["metric"], one["segment"]) == ("auc", ""))
    assert auc["low"] < measured["click/auc"] < auc["high"]
    assert {one["features"] for one in figures["missing_features"]} == {"context features"}
    assert page.origin.record is not None
    assert page.origin.record.windows["test"].num_rows == page.num_rows
    assert page.origin.version is None
    assert any(limit.startswith("table device: ") and "share a row" in limit for limit in page.limits)


@pytest.fixture
def say(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def say(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(trained)
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out + said.err

    return say


def test_the_command_prints_the_importance(say: Callable[..., tuple[int, str]]) -> None:
    code, said = say("explain", "run", "--rows", "200", "--repeats", "2", "--feature", "price")
    assert code == DONE
    assert said.splitlines()[-2] == "click: AUC lost without a feature, on 200 rows"
    assert said.splitlines()[-1].startswith("  price  ")
    assert say("explain", "run", "--dry-run")[0] == DONE
    assert say("card", "run", "--out", "dry", "--dry-run")[0] == DONE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nowhere"], "MODEL: expected a checkpoint"),
        (
            ["explain", "run", "--feature", "prize"],
            "--feature: expected a feature of the model. Received: 'prize'. Fix: did you mean 'price'",
        ),
        (["explain", "run", "--segment", "plcement"], "--segment: expected a column of the data. Received: 'plcement'. Fix: did you mean"),
        (["explain", "run", "--local", "3"], "--local: expected a folder for the attributions"),
        (["explain", "run", "--rows", "0"], "--rows: expected a number >= 1"),
        (["explain", "run", "--repeats", "1"], "--repeats: expected a number >= 2"),
        (["explain", "run", "--rows", "5"], "expected labels of both kinds for one task at least"),
        (["explain", "run", "--out", "no/where"], "--out: expected a folder whose parent exists"),
        (["explain", "run", "--start", "2031-01-01"], "2031-01-01"),
        (["card", "run", "--out", "card", "--notes", "none.txt"], "--notes: expected a text file"),
        (["card", "nowhere", "--out", "card"], "MODEL: expected a checkpoint"),
    ],
)
def test_wrong_input_is_told(say: Callable[..., tuple[int, str]], arguments: list[str], message: str) -> None:
    code, said = say(*arguments)
    assert (code, message in said) == (WRONG_INPUT, True), said


def test_a_model_that_is_not_tracked_has_no_run_for_its_card(trained: Path, say: Callable[..., tuple[int, str]]) -> None:
    code, said = say("card", "run", "--out", "card", "--rows", "300", "--repeats", "2", "--log-to-run")
    assert (code, "expected a model of a run that MLflow has" in said) == (WRONG_INPUT, True), said
    assert (trained / "card" / CARD_PAGE).exists()
