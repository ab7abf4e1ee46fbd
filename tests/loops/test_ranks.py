"""Trainings of several processes, started as a user starts them, beside the same training of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from processes import Command, run_ranks
from rank_jobs import evaluate_each, run_example, skip_and_stop, train_each, train_on_few_rows
from safetensors.torch import load_file

from mlenv.batch import SparseFeatures, example_batch
from mlenv.composition import compose
from mlenv.errors import DONE, WRONG_INPUT
from mlenv.loops.checkpoint import list_checkpoints, load_tensors, stored_shapes
from mlenv.loops.journal import Journal
from mlenv.loops.ranks import Shares
from mlenv.loops.training_run import PROGRESS
from mlenv.warm_start import WARM_START

CONFIG = Path(__file__).resolve().parents[2] / "examples/demo/ranker.yaml"
GROUP = 64
TORCH, TORCHREC, FSDP = "embeddings.engine=torch", "embeddings.engine=torchrec", "loop.strategy=fsdp"
CLIP, AVERAGE = "optimizer.gradient_clip_norm=0.5", "loop.ema_decay=0.9"
CASES = {
    "ddp": [TORCH],
    "fsdp": [TORCH, FSDP, CLIP, AVERAGE, "embeddings.tables={hour: {optimizer: adam, learning_rate: 0.01}}"],
    "sharded": [
        *(TORCHREC, CLIP, "optimizer.kind=lion"),
        "embeddings.tables={item: {sharding: row_wise}, hour: {sharding: table_wise},"
        " user: {sharding: column_wise, optimizer: sgd, learning_rate: 5}}",
    ],
    "accumulated": [TORCH, "loop.accumulate_batches=2"],
    "accumulated fsdp": [TORCH, FSDP, CLIP, "loop.accumulate_batches=2"],
    "sharded fsdp": [TORCHREC, FSDP, "optimizer.kind=lion", AVERAGE],
}


@pytest.fixture(scope="module")
def log(ads, tmp_path_factory) -> Path:
    """The small log in row groups of half a batch: two processes that take turns have the same rows in each step as one."""
    folder = tmp_path_factory.mktemp("log of a test")
    for file in sorted(ads.rglob("*.parquet")):
        target = folder / file.parent.name / file.name
        target.parent.mkdir(exist_ok=True)
        rows = 19 * GROUP + 11 if "2026-01-02" in str(file) else 20 * GROUP  # the last step of a training is a smaller one
        pq.write_table(pq.read_table(file, partitioning=None).slice(0, rows), target, row_group_size=GROUP)
    return folder


def losses(output: Path) -> torch.Tensor:
    lines = Journal(output / "metrics.jsonl").read()
    return torch.tensor([[line["train/click/loss"], line["train/conversion/loss"]] for line in lines if "train/click/loss" in line])


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())


def settings_of(log: Path, output: Path, num_ranks: int, *settings: str) -> list[str]:
    """A short training whose steps have 128 rows over all ranks; the last one is smaller."""
    common = [f"data.path={log}", "data.train.end=2026-01-02", "data.test.start=2026-01-03", "data.shuffle_rows=0", f"output={output}"]
    common += [f"data.batch_size={2 * GROUP // num_ranks}", "tracking.enabled=false", "loop.log_every_steps=1", "loop.max_steps=0"]
    return [*common, *settings]


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory) -> Path:
    """Each case trained by one process and by two; the folders are called ``CASE by NUMBER``."""
    folder = tmp_path_factory.mktemp("trained")
    for number in (1, 2):
        cases = {
            name: [*settings_of(log, folder / f"{name} by {number}", number, *settings), "data.test=null"]
            for name, settings in CASES.items()
        }
        for said in run_ranks(number, train_each, cases):
            assert said == dict.fromkeys(CASES, "")
    return folder


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(trained):
    for case in CASES:
        one, two = losses(trained / f"{case} by 1"), losses(trained / f"{case} by 2")
        assert len(one) == (10 if "accumulated" in case else 20)
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.slow
def test_the_record_says_where_each_table_lies(trained):
    sharded, copied = (json.loads((trained / f"{case} by 2" / "sharding.json").read_text()) for case in ("sharded", "ddp"))
    item, user = sharded["item"], sharded["user"]
    assert (item["sharding"], item["kernel"]) == ("row_wise", "fused")
    # 500 rows of 16 numbers and one accumulator, 4 bytes each.
    assert item["shards"] == [{"rank": rank, "rows": 250, "columns": 16, "bytes": 250 * 17 * 4} for rank in (0, 1)]
    assert item["estimated_milliseconds"] > 0
    assert [(shard["rows"], shard["columns"], shard["bytes"]) for shard in user["shards"]] == [(2000, 8, 2000 * 8 * 4)] * 2
    assert sorted(shard["rank"] for shard in user["shards"]) == [0, 1]
    assert copied["item"]["sharding"] == "replicated"
    assert copied["item"]["shards"][1] == {"rank": 1, "rows": 500, "columns": 16, "bytes": 500 * 17 * 4}


@pytest.mark.slow
def test_several_processes_begin_with_the_weights_of_one(trained, log, tmp_path):
    """Each with its part of a table that has grown and of one whose vocabulary is in another order; nothing is learned on top."""
    placements = ["push", "feed", "search", "story", "video", "banner", "sidebar", "email"]
    warm = [f"warm_start.checkpoint={trained / 'ddp by 1'}", "warm_start.optimizer_state=true", "schema.tables.item.num_embeddings=601"]
    warm += [f"schema.tables.placement.vocabulary=[{', '.join(placements)}]", "embeddings.learning_rate=1e-30", "loop.max_steps=1"]
    cases = {
        name: [*settings_of(log, tmp_path / name, 2), *CASES[name], *warm, "optimizer.learning_rate=1e-30", "data.test=null"]
        for name in ("sharded", "fsdp")
    }
    for said in run_ranks(2, train_each, cases):
        assert said == dict.fromkeys(cases, "")
    tables = ("item", "placement", "advertiser_id")
    names = {table: f"representation.embeddings.tables.{table}.weight" for table in tables}
    source, *found = (list_checkpoints(path / "checkpoints")[-1] for path in (trained / "ddp by 1", *(tmp_path / name for name in cases)))
    before = {name: torch.empty(stored_shapes(source)[name]) for name in names.values()}
    load_tensors(source, before)
    for checkpoint in found:
        after = {name: torch.empty(stored_shapes(checkpoint)[name]) for name in names.values()}
        load_tensors(checkpoint, after)
        assert torch.equal(after[names["item"]][:500], before[names["item"]])
        assert after[names["item"]].shape == (601, 16)
        assert torch.equal(after[names["placement"]], before[names["placement"]][[7, 0, 1, 2, 3, 4, 5, 6]])
        assert torch.equal(after[names["advertiser_id"]], before[names["advertiser_id"]])
    rows = json.loads((tmp_path / "sharded" / WARM_START).read_text())["rows"]
    assert rows[f"optimizer.{names['item']}.sum"] == {"taken": 500, "new": 101, "gone": 0}


@pytest.mark.slow
def test_any_number_of_processes_reads_a_checkpoint_with_any_strategy(trained, log):
    others = {"ddp": "sharded fsdp", "fsdp": "ddp", "sharded": "ddp", "sharded fsdp": "sharded"}  # the last with an average
    expected = run_ranks(1, evaluate_each, {case: settings_of(log, trained / f"{case} by 1", 2, *CASES[case]) for case in others})[0]
    cases = {case: settings_of(log, trained / f"{case} by 2", 2, *CASES[other]) for case, other in others.items()}
    for metrics in run_ranks(3, evaluate_each, cases):
        for case in others:
            for name, value in expected[case].items():
                assert metrics[case][name] == pytest.approx(value, abs=1e-4, nan_ok=True), (case, name)


@pytest.mark.slow
def test_a_training_goes_on_with_another_number_of_processes(log, tmp_path):
    """With learning rates of nothing, the sums of the losses tell whether every row was trained once an epoch and none was forgotten."""
    unlearned = ["optimizer.learning_rate=1e-30", "embeddings.learning_rate=1e-30", "loop.learning_rate_decay=none", "data.num_epochs=2"]
    unlearned += ["loop.log_every_steps=1000", "data.test=null", "data.shuffle_rows=100"]
    changes = {"whole": (1, 1, [TORCH]), "2 to 3": (2, 3, [TORCHREC]), "2 to 1": (2, 1, [TORCHREC, FSDP]), "1 to 2": (1, 2, [TORCH, FSDP])}
    for stage, limit in ((0, 24), (1, 0)):
        for number in (1, 2, 3):
            cases = {
                name: [*settings_of(log, tmp_path / name, number, *settings, *unlearned), f"loop.max_steps={limit}"]
                for name, (*numbers, settings) in changes.items()
                if numbers[stage] == number
            }
            if cases:
                assert run_ranks(number, train_each, cases)[0] == dict.fromkeys(cases, "")
    sums = {}
    for name in changes:
        checkpoint = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        progress = json.loads((checkpoint / PROGRESS).read_text())
        assert progress["examples"] == 2 * (39 * GROUP + 11), name
        assert len(progress["position"]) == changes[name][1]
        tensors = {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}
        sums[name] = torch.stack([tensor for key, tensor in sorted(tensors.items()) if key.startswith("run.")]).view(2, -1, 2).sum(1)
    for name, total in sums.items():
        torch.testing.assert_close(total, sums["whole"], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_a_bad_loss_or_a_signal_of_one_process_is_that_of_all(log, tmp_path):
    settings = ["loop.on_bad_loss=skip", "loop.log_every_steps=4", "data.test=null", TORCH]
    one, other = run_ranks(2, skip_and_stop, settings_of(log, tmp_path / "run", 2, *settings))
    assert one == other | {"said": one["said"]}
    assert one["seen"] == [(2 * GROUP, step == 2) for step in range(8)]
    assert one["stays"] == [step == 1 for step in range(7)]
    assert (other["said"], one["said"]) == ("SIGTERM after step 8", "a signal to another process after step 8")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000008"]
    assert {path.name for path in (tmp_path / "run" / "bad_step-00000003").glob("batch*")} == {
        f"batch-rank{rank}.safetensors" for rank in (0, 1)
    }


@pytest.mark.slow
def test_more_processes_than_row_groups_train_with_a_warning(ads, tmp_path):
    few = tmp_path / "few" / "date=2026-01-02"
    few.mkdir(parents=True)
    pq.write_table(pq.read_table(next(ads.rglob("*.parquet")), partitioning=None).slice(0, GROUP + 1), few / "part.parquet")
    settings = ["data.test=null", "model.deep.normalization=batch", TORCH]
    said, nothing = run_ranks(2, train_on_few_rows, settings_of(tmp_path / "few", tmp_path / "run", 2, *settings))
    assert said == [
        "data.train: 1 row groups for 2 processes: the others train on empty batches."
        " Fix: write smaller row groups, or train with fewer processes."
    ]
    assert nothing == []
    # The second step has one row on one process and none on the other.
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert json.loads((checkpoint / PROGRESS).read_text())["examples"] == GROUP + 1
    tensors = {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.slow
def test_fabric_alone_trains_saves_and_loads_with_the_strategy(tmp_path):
    (losses, difference), (others, _) = run_ranks(2, run_example, str(tmp_path / "saved"))
    assert losses == others
    assert losses[-1] < 0.5 < 0.65 < losses[0]
    assert difference < 1e-6


@pytest.mark.slow
def test_a_process_that_is_killed_costs_no_bit_and_no_row(tmp_path, log):
    def settings(name: str) -> list[str]:
        own = [TORCH, "data.num_epochs=3", "model.deep.dropout=0.1", "loop.checkpoint_every_steps=5", "launch.num_processes=2"]
        return settings_of(log, tmp_path / name, 2, *own)

    assert run_ranks(2, train_each, {"undisturbed": settings("undisturbed")})[0] == {"undisturbed": ""}
    rows = sum(pq.read_metadata(file).num_rows for day in ("01", "02") for file in (log / f"date=2026-01-{day}").iterdir())
    for launcher, notice in (
        ("torchrun", "ended with exit code -9; all start again"),
        ("ray", "ended: A worker health check failed"),
    ):
        command = Command(["train", str(CONFIG), *settings(launcher), f"launch={launcher}"], tmp_path / f"{launcher}.txt")
        try:
            command.wait_until(lambda launcher=launcher: bool(list_checkpoints(tmp_path / launcher / "checkpoints")))
            os.kill(trainers(command.pid, launcher)[-1], signal.SIGKILL)
            assert command.wait() == DONE, command.said
        finally:
            command.end()
        assert notice in command.said
        before, after = (list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("undisturbed", launcher))
        for file in before.glob("*.safetensors"):
            expected, found = load_file(file), load_file(after / file.name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert metrics(tmp_path / "undisturbed") == metrics(tmp_path / launcher)
        assert json.loads((after / PROGRESS).read_text())["examples"] == 3 * rows


def trainers(launcher_pid: int, launcher: str) -> list[int]:
    """Processes that train, among all that come from the launcher, the one of the last rank last."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [launcher_pid]
    for parent in found:  # grows while it is walked
        found += sorted(pid for pid, its_parent in parents.items() if its_parent == parent)
    mark = {"torchrun": b"mlenv\0train", "ray": b"ray::RayTrainWorker"}[launcher]
    return [pid for pid in found[1:] if mark in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_what_is_wrong_is_said_once_before_anything_starts(tmp_path, log):
    wrong = settings_of(log, tmp_path / "wrong", 2, "launch.num_processes=2", "data.train.end=2025-01-01")
    command = Command(["train", str(CONFIG), *wrong], tmp_path / "said")
    assert command.wait() == WRONG_INPUT
    assert command.said.count("expected Parquet files in") == 1


def test_shares_end_when_the_last_rank_has_no_more():
    shares = Shares(rows=(10, 3, 0), batch_size=4)
    assert shares.num_steps == 3
    assert [shares.examples(step) for step in range(4)] == [4 + 3, 4, 2, 0]


def test_rows_of_a_batch_are_those_of_each_key():
    lengths = torch.tensor([1, 0, 2, 0, 1, 3], dtype=torch.int32)
    sparse = SparseFeatures(("item", "tags"), torch.arange(7), lengths, (3, 4), torch.arange(7) / 10)
    part = sparse.rows(1, 3)
    assert (part.values.tolist(), part.lengths.tolist(), part.value_counts) == ([1, 2, 3, 4, 5, 6], [0, 2, 1, 3], (2, 4))
    assert part.weights is not None
    assert torch.equal(part.weights, part.values / 10)
    assert sparse.rows(3, 3).values.tolist() == []


def test_rows_of_examples(demo_arguments):
    file, *overrides = demo_arguments()
    batch = example_batch(compose(file, overrides).schema, num_rows=5)
    assert len(batch.rows(2, 4)) == 2
    assert len(batch.rows(5, 5)) == 0
