"""Beginning with the weights of another training: which tensors and rows are taken, and what is said of the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mlenv import Experiment, compose, train
from mlenv.cli import main
from mlenv.errors import DONE, WRONG_INPUT, CheckpointError, ConfigError
from mlenv.loops.checkpoint import add_document, list_checkpoints
from mlenv.schema import Table
from mlenv.warm_start import WARM_START, Rows, fill_rows, same_rows
from tests.conftest import ROOT

SHORT = ("loop.max_steps=6", "loop.learning_rate_decay=none", "loop.checkpoint_every_steps=3")
COUNTRIES = "[unknown, MX, US, IN, BR, DE, JP, FR, CA]"
"""Without GB; MX has moved, CA is new."""


@pytest.fixture(scope="module")
def trained(ads, tmp_path_factory) -> Path:
    """The output folder of a training on plain tables."""
    output = tmp_path_factory.mktemp("an earlier training") / "run"
    settings = [f"data.path={ads}", "data.batch_size=256", "data.train.end=2026-01-01", "data.test=null", "tracking.enabled=false"]
    train(
        compose(
            ROOT / "examples/demo/ranker.yaml", [*settings, *SHORT, f"output={output}", "embeddings.engine=torch", "loop.ema_decay=0.9"]
        )
    )
    return output


def settings_of(trained, *more):
    tables = ["schema.tables.item.num_embeddings=600", f"schema.tables.user_country.vocabulary={COUNTRIES}"]
    tables += ["schema.tables.user_country.num_embeddings=10", "schema.tables.user_country.out_of_range=hash"]
    tables += ["schema.features.device.table=gadget", "schema.tables.device=null"]
    tables += ["schema.tables.gadget={num_embeddings: 3, embedding_dim: 16, ids: vocabulary, vocabulary: [phone, desktop, tablet]}"]
    added = [
        "schema.features.second_hour={kind: categorical, column: hour}",
        "schema.tables.second_hour={num_embeddings: 24, embedding_dim: 16}",
    ]
    warm = [f"warm_start.checkpoint={trained}", "warm_start.renamed={gadget: device}", "warm_start.optimizer_state=true", "data.test=null"]
    return (*SHORT, *tables, *added, *warm, *more)


def values(tensor) -> torch.Tensor:
    (piece,) = (shard.tensor for shard in tensor.local_shards()) if hasattr(tensor, "local_shards") else (tensor,)
    return piece.detach().clone()


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_tensors_are_taken_by_name_rows_by_id_and_the_rest_is_listed(trained, demo_arguments, engine, tmp_path, caplog):
    file, *settings = demo_arguments(*settings_of(trained, "loop.ema_decay=0.5", f"embeddings.engine={engine}"))
    config = compose(file, settings)
    (stored,) = list_checkpoints(trained / "checkpoints")[-1].glob("*.safetensors")
    old = load_file(stored)
    with Experiment(config) as experiment:
        _ = experiment.step
        fresh = {name: values(tensor) for name, tensor in experiment._model_tensors().items()}
        experiment.run.restore()
        begun = {name: values(tensor) for name, tensor in experiment._model_tensors().items()}
        saved = experiment._tensors()
    table = "representation.embeddings.tables.{}.weight"
    for name in (table.format("user"), "optimizer." + table.format("user") + ".sum", "heads.heads.click.1.bias"):
        assert torch.equal(begun[name], old[name].reshape(begun[name].shape)), name
    assert torch.equal(begun[table.format("gadget")], old[table.format("device")])
    item, sums = table.format("item"), "optimizer." + table.format("item") + ".sum"
    assert torch.equal(begun[item][:500], old[item])
    assert torch.equal(begun[item][500:], fresh[item][500:])
    assert torch.equal(begun[sums].flatten(), torch.cat([old[sums].flatten(), torch.zeros(100)]))
    country = table.format("user_country")
    assert torch.equal(begun[country][:8], old[country][[0, 8, 1, 2, 3, 4, 5, 6]])
    assert torch.equal(begun[country][8:], fresh[country][8:])
    assert torch.equal(begun[table.format("second_hour")], fresh[table.format("second_hour")])
    assert torch.equal(saved["heads.heads.click.1.bias"], begun["heads.heads.click.1.bias"])  # the average begins with them

    said = json.loads((tmp_path / "run of a test" / WARM_START).read_text())
    assert said["rows"][country] == {"taken": 8, "new": 2, "gone": 1}
    assert said["rows"][item] == {"taken": 500, "new": 100, "gone": 0}
    assert said["changed"]["deep.layers.0.weight"] == "shape (128, 208) there, (128, 224) here"
    assert "representation.normalization.mean" in said["taken"]
    assert said["inputs"] == "here alone: second_hour"
    assert table.format("second_hour") in said["fresh"]
    assert said["left"] == ["deep.layers.2.bias", "deep.layers.2.weight"]  # behind the dropout it is layer 3
    assert f"{country}: 8 rows taken, 2 new, 1 gone" in caplog.text


def test_what_changed_can_be_refused_and_a_dry_run_says_what_is_not_there(trained, demo_arguments, tmp_path, capsys):
    file, *settings = demo_arguments(*settings_of(trained, "warm_start.strict=true"))
    with pytest.raises(ConfigError, match=r"warm_start\.strict: expected nothing that changed.*shape \(.*\) there"):
        train(compose(file, settings))
    assert not (tmp_path / "run of a test").exists()
    os.chdir(ROOT)
    for wrong, said in (
        (f"warm_start.checkpoint={tmp_path}", "warm_start.checkpoint: expected a checkpoint"),
        ("warm_start.renamed={gadget: devise}", "warm_start.renamed.gadget: expected a table of"),
        ("warm_start.renamed={gadgets: hour}", "warm_start.renamed.gadgets: expected a table of schema.tables"),
        ("warm_start.renamed={gadget: device, item: device}", "renamed: expected each old name once"),
    ):
        assert main(["train", file, *settings_of(trained), f"output={tmp_path}/x", wrong, "--dry-run"]) == WRONG_INPUT
        assert said in capsys.readouterr().err
    assert main(["train", *demo_arguments(*settings_of(trained)), "--dry-run"]) == DONE


def test_a_training_goes_on_only_with_the_checkpoint_that_it_began_with(trained, demo_arguments):
    warm = (f"warm_start.checkpoint={trained}", "data.test=null", *SHORT)
    file, *settings = demo_arguments(*warm)
    train(compose(file, [*settings, "loop.max_steps=2"]))
    assert train(compose(file, [*settings, "loop.max_steps=3"])).steps == 3
    add_document(list_checkpoints(trained / "checkpoints")[-1], "more.json", "{}")
    with pytest.raises(CheckpointError, match="warm start: expected the files it was trained with"):
        train(compose(file, [*settings, "loop.max_steps=4"]))


def test_a_rank_fills_the_part_of_a_table_that_it_has():
    class Shards:
        """A table of 6 rows and 4 columns of which this rank has rows 2 to 3, and the right half of rows 4 to 5."""

        def __init__(self):
            parts = [(torch.zeros(2, 4), (2, 0)), (torch.zeros(2, 2), (4, 2))]
            self.shards = [SimpleNamespace(tensor=tensor, metadata=SimpleNamespace(shard_offsets=place)) for tensor, place in parts]

        def local_shards(self):
            return self.shards

    stored = torch.arange(12.0).reshape(3, 4)
    table = Shards()
    fill_rows(table, Rows(torch.tensor([0, 3, 4]), torch.tensor([0, 2, 1])), stored)
    assert table.shards[0].tensor.tolist() == [[0, 0, 0, 0], [8, 9, 10, 11]]
    assert table.shards[1].tensor.tolist() == [[6, 7], [0, 0]]
    sums = torch.zeros(6)
    fill_rows(sums, Rows(torch.tensor([5]), torch.tensor([1])), torch.tensor([1.0, 2.0, 3.0]))
    assert sums.tolist() == [0, 0, 0, 0, 0, 2]


def rows(found):
    assert isinstance(found, Rows)
    return dict(zip(found.new.tolist(), found.old.tolist(), strict=True))


def test_rows_stand_for_the_same_ids():
    index = Table(num_embeddings=4, embedding_dim=1)
    assert same_rows(index, index) is None
    assert rows(same_rows(index, Table(num_embeddings=3, embedding_dim=1))) == {0: 0, 1: 1, 2: 2}
    hashed = Table(num_embeddings=4, embedding_dim=1, ids="hash")
    assert same_rows(hashed, hashed) is None
    assert same_rows(hashed, Table(num_embeddings=8, embedding_dim=1, ids="hash")) == "hashed into 4 rows there, 8 here"
    assert same_rows(index, hashed) == "ids: index there, hash here"

    def known(*ids, spare):
        return Table(num_embeddings=len(ids) + spare, embedding_dim=1, ids="vocabulary", vocabulary=ids)

    assert rows(same_rows(known("a", "b", spare=2), known("c", "b", "a", spare=2))) == {1: 1, 2: 0, 3: 2, 4: 3}
    assert rows(same_rows(known("a", "b", spare=2), known("b", spare=3))) == {0: 1}
    assert rows(same_rows(known("a", spare=0), known("b", spare=0))) == {}
