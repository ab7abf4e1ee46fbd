"""Trainings of several processes, started as a user starts them, beside the same training of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mlenv.batch import SparseFeatures, example_batch
from mlenv.composition import compose
from mlenv.loops.checkpoint import list_checkpoints
from mlenv.loops.journal import Journal
from mlenv.loops.ranks import Shares
from mlenv.loops.training_run import PROGRESS

ROOT = Path(__file__).resolve().parents[2]
GROUP = 64
ENGINES = {
    "torch": ["embeddings.engine=torch"],
    "torchrec": [
        "embeddings.engine=torchrec",
        "embeddings.tables={item: {sharding: row_wise}, advertiser_id: {sharding: column_wise}, user: {sharding: table_wise}}",
    ],
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


@pytest.fixture
def command(log, tmp_path):
    def command(verb: str, output: str, num_processes: int, *settings: str) -> list[str]:
        common = [f"data.path={log}", "data.train.end=2026-01-02", "data.test.start=2026-01-03", "data.shuffle_rows=0"]
        common += [f"data.batch_size={2 * GROUP // num_processes}", f"output={tmp_path / output}", "tracking.enabled=false"]
        common += ["loop.log_every_steps=1", "loop.checkpoint_every_steps=5", f"launch.num_processes={num_processes}"]
        return [sys.executable, "-m", "mlenv", verb, str(ROOT / "examples/demo/ranker.yaml"), *common, *settings]

    return command


def run(command: list[str], code: int = 0) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


def losses(output: Path) -> torch.Tensor:
    lines = Journal(output / "metrics.jsonl").read()
    return torch.tensor([[line["train/click/loss"], line["train/conversion/loss"]] for line in lines if "train/click/loss" in line])


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_the_curve_of_one_and_their_checkpoint_is_read_by_any_number(command, tmp_path, engine):
    for name, number in (("one", 1), ("two", 2)):
        said = run(command("train", name, number, *ENGINES[engine]))
    if engine == "torchrec":
        assert "table item: row_wise on ranks [0, 1]" in said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    trained = metrics(tmp_path / "two")
    for name, value in metrics(tmp_path / "one").items():
        assert trained[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    for number in (1, 3) if engine == "torchrec" else (3,):
        # A step of another size is another training, so the batch size stays that of two.
        run(command("evaluate", "two", number, *ENGINES[engine], f"data.batch_size={GROUP}"))
        for name, value in metrics(tmp_path / "two").items():
            assert trained[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    if engine == "torch":
        said = run(command("train", "two", 3, *ENGINES[engine], f"data.batch_size={GROUP}"), code=2)
        assert "expected 2 processes, among which the data were divided" in said


@pytest.mark.slow
def test_a_process_that_is_killed_costs_no_bit_and_no_row(command, tmp_path, log):
    settings = ["embeddings.engine=torch", "data.num_epochs=3", "model.deep.dropout=0.1"]
    run(command("train", "undisturbed", 2, *settings))
    rows = sum(pq.read_metadata(file).num_rows for day in ("01", "02") for file in (log / f"date=2026-01-{day}").iterdir())
    for launcher, notice in (
        ("torchrun", "ended with exit code -9; all start again"),
        ("ray", "ended: A worker health check failed"),
    ):
        process = subprocess.Popen(command("train", launcher, 2, *settings, f"launch={launcher}"), stderr=subprocess.PIPE, text=True)
        try:
            while not list_checkpoints(tmp_path / launcher / "checkpoints"):
                assert process.poll() is None
                time.sleep(0.02)
            os.kill(trainers(process.pid, launcher)[-1], signal.SIGKILL)
            said = process.communicate(timeout=300)[1]
        finally:
            process.kill()
        assert process.returncode == 0, said
        assert notice in said
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
def test_what_is_wrong_is_said_once_before_anything_starts(command):
    said = run(command("train", "wrong", 2, "data.train.end=2025-01-01"), code=2)
    assert said.count("expected Parquet files in") == 1


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
