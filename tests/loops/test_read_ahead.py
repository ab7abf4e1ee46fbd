"""A step that reads ahead trains the same batches in the same order to the same bits, in one process and in two."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from processes import run_ranks
from rank_jobs import train_in_ways

from mlenv import Experiment, compose, fit
from mlenv.errors import ConfigError, Problems
from mlenv.loops.journal import Journal
from mlenv.loops.read_ahead import ReadAheadStep

GROUP = 64


def trained(arguments: list[str], steps: int = 10_000) -> tuple[list[dict[str, float]], int, list[int]]:
    """Losses, the steps, and the rows at which the positions of the outputs stand."""
    config = compose(arguments[0], [*arguments[1:], "loop.log_every_steps=1", "data.num_epochs=1"])
    with Experiment(config) as experiment:
        assert isinstance(experiment.step._step, ReadAheadStep) is bool(config.loop.read_ahead)
        rows, advance = [], experiment.step.advance

        def noted(batches, progress):
            output = None if progress.step == steps else advance(batches, progress)
            rows.extend([] if output is None else [output.position.row])
            return output

        experiment.step.advance = noted
        progress = fit(experiment.step, experiment.source("train"), experiment.run, config.loop)
        lines = Journal(experiment.output / "metrics.jsonl").read()
    timed = {"time", "train/examples_per_second", "train/tflops_per_second", "train/data_wait_share"}
    return [{key: value for key, value in line.items() if key not in timed} for line in lines], progress.step, rows


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [(["embeddings.engine=torchrec"], 32), (["loop.accumulate_batches=3"], 11), (["loop.max_steps=7"], 7)],
    ids=["torchrec", "accumulated", "not to the end of the data"],
)
def test_reading_ahead_changes_no_bit_and_no_position(demo_arguments, settings, num_steps):
    expected = trained(demo_arguments(*settings, output="eager"))
    found = trained(demo_arguments(*settings, "loop.read_ahead=true", output="ahead"))
    assert found == expected
    assert found[1] == len(found[2]) == num_steps


def test_what_was_read_ahead_is_read_again_after_a_stop(demo_arguments):
    expected = trained(demo_arguments("loop.read_ahead=true", output="whole"))
    trained(demo_arguments("loop.read_ahead=true", output="stopped"), steps=13)
    lines, steps, rows = trained(demo_arguments("loop.read_ahead=true", output="stopped"))
    assert (lines, steps) == expected[:2]
    assert rows == expected[2][13:]


@pytest.fixture(scope="module")
def two_ranks(ads: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What two processes saw of trainings on one day of seven whole row groups and a piece of one, of which each reads every second."""
    folder = tmp_path_factory.mktemp("two ranks")
    file = next(iter(sorted(ads.rglob("*.parquet"))))
    target = folder / "ads" / file.parent.name / file.name
    target.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(file, partitioning=None).slice(0, 7 * GROUP + 11), target, row_group_size=GROUP)
    settings = [f"data.path={folder / 'ads'}", "data.train.end=2026-01-01", "data.test=null", "data.batch_size=32", "data.shuffle_rows=0"]
    settings += ["embeddings={engine: torchrec, tables: {item: {sharding: row_wise}, user: {sharding: table_wise}}}"]
    settings += ["loop.log_every_steps=1", "tracking.enabled=false"]
    ways = {"eager": [], "ahead": ["loop.read_ahead=true"], "fp16": ["embeddings.communication_precision=fp16"]}
    return run_ranks(2, train_in_ways, folder, {way: [*settings, *own] for way, own in ways.items()})


@pytest.mark.slow
def test_two_processes_that_read_ahead_agree_where_one_has_no_more_rows(two_ranks):
    assert [rank["eager"]["own_rows"] for rank in two_ranks] == [4 * GROUP, 3 * GROUP + 11]
    for rank in two_ranks:
        assert rank["eager"]["steps"] == 8
        assert rank["ahead"] == rank["eager"]
    last, first = two_ranks[1]["ahead"]["positions"][-1], two_ranks[0]["ahead"]["positions"][0]
    assert first[1] == 64
    assert last[1] == 32  # the second rank had its last 11 rows the step before


@pytest.mark.slow
def test_vectors_sent_in_half_the_bits_train_nearly_the_same(two_ranks):
    exact, half = (two_ranks[0][way]["losses"] for way in ("eager", "fp16"))
    assert half != exact
    assert half == pytest.approx(exact, abs=1e-3)


def test_what_is_not_sent_narrower_is_refused(demo_arguments):
    arguments = demo_arguments("embeddings.engine=torchrec", "embeddings.communication_precision=bf16")
    with Experiment(compose(arguments[0], arguments[1:])) as experiment, pytest.raises(ConfigError, match="expected fp32 or fp16 on a CPU"):
        _ = experiment.model
    arguments = demo_arguments("embeddings.communication_precision=bf16")
    with pytest.raises(Problems, match=r"embeddings\.communication_precision: expected fp32, because the engine torch sends no vectors"):
        compose(arguments[0], arguments[1:])
