"""Checkpoints at a URL: on a server that speaks S3, and on a file system that fails when it is told to."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from mlenv import Experiment, compose, train
from mlenv.errors import CheckpointError, ConfigError, TrainingError
from mlenv.loops import checkpoint_store
from mlenv.loops.checkpoint import (
    MANIFEST,
    Retention,
    add_document,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    read_document,
    save_checkpoint,
)
from mlenv.loops.checkpoint_store import CheckpointStore, StoreError
from mlenv.loops.fit import Progress
from mlenv.loops.stop_signals import StopSignals
from mlenv.loops.training_run import PROGRESS, RunOptions, TrainingRun, newest_to_go_on_from


class Flaky(LocalFileSystem):
    """The disk, with failures before what is asked for."""

    protocol = "flaky"
    failures: list[Exception] = []  # noqa: RUF012 - shared by all instances: fsspec makes them
    puts = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def put_file(self, *arguments, **options):
        Flaky.puts += 1
        if Flaky.failures:
            raise Flaky.failures.pop(0)
        return super().put_file(*arguments, **options)

    def pipe_file(self, *arguments, **options):
        if Flaky.failures:
            raise Flaky.failures.pop(0)
        return super().pipe_file(*arguments, **options)


@pytest.fixture
def flaky(tmp_path, monkeypatch) -> CheckpointStore:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(checkpoint_store, "WAITS", (0.0, 0.0))
    Flaky.failures, Flaky.puts = [], 0
    (tmp_path / "there").mkdir()
    store = CheckpointStore(f"flaky://{tmp_path}/there")
    store._files.auto_mkdir = True
    return store


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket on a server of this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/run"
    server.stop()


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder, step, {"weight": torch.full((3,), float(step))}, {PROGRESS: str(step)})
    return folder


def test_another_machine_has_the_same_checkpoints(s3, tmp_path):
    store = CheckpointStore(s3)
    store.check()
    here, there = saved(tmp_path / "a" / "checkpoints", 1, 2, 3), tmp_path / "b" / "checkpoints"
    store.put(here)
    assert store.names("checkpoints") == ["step-00000001", "step-00000002", "step-00000003"]
    assert store.names("best") == []
    assert store.read("checkpoints", "step-00000002", PROGRESS) == "2"
    store.remove("checkpoints", ["step-00000001"])
    assert store.names("checkpoints") == ["step-00000002", "step-00000003"]

    add_document(here / "step-00000003", "calibrators.json", "{}")
    store.put(here)
    fetched = store.fetch_newest(there, store.names("checkpoints"))
    assert fetched == newest_checkpoint(there) == there / "step-00000003"
    assert read_document(fetched, "calibrators.json") == "{}"
    loaded = torch.zeros(3)
    load_tensors(fetched, {"weight": loaded})
    assert loaded.tolist() == [3, 3, 3]

    file = next(name for name in store._files.find("bucket/run/checkpoints/step-00000003") if name.endswith(".safetensors"))
    store._files.pipe_file(file, store._files.cat_file(file)[:-1] + b"?")
    (there / "step-00000003" / MANIFEST).unlink()
    assert store.fetch_newest(there, store.names("checkpoints")).name == "step-00000002"
    with pytest.raises(CheckpointError, match=r"s3://bucket/run/checkpoints/step-00000003: expected a whole checkpoint.*expected checksum"):
        store.fetch(there, "step-00000003")
    assert not list(there.glob(".*"))


def test_a_bucket_that_is_not_there_is_said_before_the_first_step(s3):
    with pytest.raises(ConfigError, match=r"s3://nowhere/run: cannot write .*bucket does not exist.*Fix: make the bucket"):
        CheckpointStore("s3://nowhere/run").check()


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "gs://bucket/run"])
def test_a_missing_driver_is_named(url):
    with pytest.raises(ConfigError, match=r"loop\.checkpoint_url: expected a URL that fsspec has a driver for.*Fix: install the driver"):
        CheckpointStore(url)


def test_refused_access_is_said_at_once(flaky):
    Flaky.failures = [PermissionError("Access Denied")]
    with pytest.raises(ConfigError, match=r"cannot write \(PermissionError: Access Denied\).*the right to list, read, write"):
        flaky.check()
    Flaky.failures = [TimeoutError("slow")]
    flaky.check()


def test_a_copy_that_is_cut_is_no_checkpoint_and_is_made_whole_by_the_next(flaky, tmp_path):
    folder = saved(tmp_path / "checkpoints", 1)
    Flaky.failures = [TimeoutError("slow")]
    flaky.put(folder)  # tried again
    assert flaky.names("checkpoints") == ["step-00000001"]
    saved(folder, 2)
    num_files = len(list((folder / "step-00000002").iterdir()))
    for whole in range(num_files):
        put_file = Flaky.put_file
        left = [whole]

        def cut(self, source, target, *, put_file=put_file, left=left):
            if not left[0]:
                raise PermissionError("Access Denied")
            left[0] -= 1
            return put_file(self, source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Flaky, "put_file", cut)
            with pytest.raises(StoreError, match="Access Denied"):
                flaky.put(folder)
        assert flaky.names("checkpoints") == ["step-00000001"]
    (tmp_path / "there" / "checkpoints" / "step-00000002" / "shard-00002.safetensors").touch()  # of a process that there is no more
    before = Flaky.puts
    flaky.put(folder)
    assert len(list((tmp_path / "there" / "checkpoints" / "step-00000002").iterdir())) == num_files
    assert flaky.names("checkpoints") == ["step-00000001", "step-00000002"]
    assert Flaky.puts == before + num_files


def run_of(output, store, values, newest=1):
    options = RunOptions(
        terms=("click/loss",),
        log_every_steps=1,
        retention=Retention(newest=newest, every_steps=4),
        monitor="click/auc",
        total_steps=10,
        config="a: 1",
        fingerprints={},
    )
    values = iter(values)
    run = TrainingRun(
        output,
        options,
        find=lambda: newest_to_go_on_from(output, store, lambda path, text: None),
        state=lambda: {"weight": torch.zeros(1)},
        begin=lambda: None,
        check=lambda path, text: None,
        started=lambda: None,
        validate=lambda: {"click/auc": next(values)},
        gauges=dict,
        signals=StopSignals(),
        store=store,
    )
    return run, run.restore()


def test_a_training_goes_on_from_the_url_on_a_machine_that_has_nothing(flaky, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    run, progress = run_of(tmp_path / "a", flaky, [0.5, 0.7, 0.6, 0.8])
    for step in (2, 4, 6):
        progress = run.evaluate(Progress(step, best=progress.best))
        run.save(progress)
    run.wait()
    assert flaky.names("checkpoints") == ["step-00000004", "step-00000006"]
    assert flaky.names("best") == ["step-00000004"]
    run.evaluate(Progress(8, best=progress.best))
    run.close()  # killed: the best step 8 was copied, its checkpoint never written
    assert flaky.names("best") == ["step-00000004", "step-00000008"]

    again, progress = run_of(tmp_path / "b", flaky, [0.75])
    assert progress == Progress(6, best=0.7, stale_evaluations=1, decays=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "b" / "best")] == ["4"]
    assert flaky.names("best") == ["step-00000004"]
    progress = again.evaluate(Progress(8, best=progress.best))
    again.finish(progress)
    again.close()
    assert flaky.names("checkpoints") == ["step-00000004", "step-00000008"]
    assert flaky.names("best") == ["step-00000004", "step-00000008"]
    assert json.loads(flaky.read("checkpoints", "step-00000008", PROGRESS))["best"] == 0.75

    behind, progress = run_of(tmp_path / "a", flaky, [])
    assert progress.step == 8
    behind.close()
    for checkpoint in list_checkpoints(tmp_path / "b" / "checkpoints"):
        (checkpoint / MANIFEST).unlink()
    damaged, progress = run_of(tmp_path / "b", flaky, [])
    assert progress.step == 8
    damaged.close()


def test_what_cannot_be_copied_is_one_warning_until_the_end(flaky, tmp_path, caplog):
    (tmp_path / "a").mkdir()
    run, _ = run_of(tmp_path / "a", flaky, [], newest=3)
    run.save(Progress(1))
    run.wait()
    for step in (2, 3):
        Flaky.failures = [PermissionError("Access Denied")]
        run.save(Progress(step))
        run.wait()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("step 2: the checkpoint cannot be copied")
    assert len(list_checkpoints(tmp_path / "a" / "checkpoints")) == 3
    Flaky.failures = [PermissionError("Access Denied")]
    with pytest.raises(TrainingError, match=r"the checkpoints cannot be copied .*Access Denied.*Fix: see to the connection"):
        run.finish(Progress(3))
    assert flaky.names("checkpoints") == ["step-00000001"]
    run.finish(Progress(3))
    assert flaky.names("checkpoints") == ["step-00000001", "step-00000002", "step-00000003"]
    run.close()


def test_a_config_says_where(demo_arguments, tmp_path):
    file, *overrides = demo_arguments("loop.max_steps=12", f"loop.checkpoint_url=file://{tmp_path}/there", "data.test=null")
    config = compose(file, overrides)
    assert train(config).steps == 12
    there = CheckpointStore(config.loop.checkpoint_url)
    assert there.names("checkpoints") == ["step-00000010", "step-00000012"]
    shutil.rmtree(config.output)
    with Experiment(config) as experiment:
        checkpoint = experiment.load()
    assert checkpoint == Path(config.output, "checkpoints", "step-00000012")
    shutil.rmtree(config.output)
    with pytest.raises(CheckpointError, match="config"):
        train(replace(config, seed=1))
    assert list_checkpoints(Path(config.output, "checkpoints")) == []
