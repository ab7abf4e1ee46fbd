"""Rows read on a Ray cluster against the same rows read in threads. One small cluster for all tests, started beside them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlenv.batch import START
from mlenv.composition import compose
from mlenv.config import DataConfig, WindowConfig, check
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.ray_workers import MAX_RETRIES, RayConfig
from mlenv.datasets.transforms.deduplicate import DeduplicateConfig
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.join import JoinConfig
from mlenv.datasets.transforms.label_events import LabelEventsConfig
from mlenv.datasets.transforms.sampling import SampleNegativesConfig
from mlenv.datasets.transforms.stratify import StratifyConfig
from mlenv.errors import ConfigError, DataError, MlenvError, Problems, TrainingError
from mlenv.inference.batch_inference import InferenceOptions, prepare, run
from mlenv.inference.part_scoring import PartScorer, Reading
from mlenv.schema import Categorical, DenseVector, Label, MultiCategorical, Numeric, Schema, Table
from mlenv.training import train

pytestmark = pytest.mark.slow

SCHEMA = Schema(
    features={"item": Categorical(), "tags": MultiCategorical(), "ratio": Numeric(), "vector": DenseVector(dim=64)},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2), "tags": Table(num_embeddings=9, embedding_dim=2)},
    labels={"click": Label(weight="weight")},
    row_key=("key",),
    request="request",
)
PLAIN = replace(
    SCHEMA,
    features={"item": Categorical(), "vector": DenseVector(dim=64)},
    tables={"item": SCHEMA.tables["item"]},
    labels={"click": Label()},
)
"""What is left of it without transforms."""
ROWS, DAYS, GROUP = 5000, 3, 500
TRANSFORMS = (
    FilterConfig(where="age >= 18"),
    DeduplicateConfig(columns=("item", "age")),
    DeriveConfig(column="ratio", sql="x / (age + 1)"),
    SampleNegativesConfig(negative="click = 0", rate=0.5, weight_column="weight"),
    StratifyConfig(columns=("click", "date"), shares={"1/2026-01-01": 0.2}, seed=1),
)
NUM_WORKERS = 2


def day(number, **changes):
    generator = np.random.default_rng(number)
    columns = {
        "key": np.arange(ROWS) + number * ROWS,
        "item": generator.integers(0, 1000, ROWS),
        "tags": pa.array([generator.integers(0, 9, size).tolist() for size in generator.integers(0, 4, ROWS)], pa.list_(pa.int64())),
        "x": generator.standard_normal(ROWS).astype(np.float32),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(generator.standard_normal(ROWS * 64).astype(np.float32)), 64),
        "click": (generator.random(ROWS) < 0.3).astype(np.int8),
        "age": generator.integers(0, 90, ROWS),
        "request": np.arange(ROWS) // 3 + number * ROWS,
    }
    return pa.table(columns | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    for number in range(DAYS):
        (folder / f"date=2026-01-0{number + 1}").mkdir()
        pq.write_table(day(number), folder / f"date=2026-01-0{number + 1}" / "part-0.parquet", row_group_size=GROUP)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Any]:
    """One that the tests join; its workers run in another folder than the tests."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    # A lost node is missed within two seconds, not twenty.
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    options = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    os.chdir(before)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the transforms below; a user's own are installed
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def address(cluster) -> str:
    return cluster.address


def source(folder, address=None, *, data=None, schema=SCHEMA, extras=("metadata", "requests"), **options):
    """In threads, or on the cluster."""
    settings = {"batch_size": 300, "shuffle_rows": 700, "transforms": TRANSFORMS} | (data or {})
    if address is not None:
        settings["workers"] = RayConfig(num_workers=NUM_WORKERS, address=address)
    config = DataConfig(path=str(folder), train=WindowConfig(), **settings)
    options = {"is_training": True, "shuffle": True, "num_epochs": 2, "seed": 3} | options
    return ParquetSource(config, WindowConfig(), schema, extras=extras, **options)


def keys(batches):
    return [key for batch in batches for key in batch.metadata.column("key").to_pylist()]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.position == other.position
        assert batch.metadata.equals(other.metadata)
        assert batch.sparse.value_counts == other.sparse.value_counts
        for name in ("values", "lengths"):
            assert torch.equal(getattr(batch.sparse, name), getattr(other.sparse, name))
        for name in ("dense", "labels", "weights", "requests"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_nobody_answers():
    with pytest.raises(ConfigError, match=r"data.workers.address: expected a Ray cluster that answers"):
        list(RayConfig(address="127.0.0.1:1").build().map(str, [1]))


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"cpus_per_task": 0}, {"address": "ray://head:10001"}, {"address": "head"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: expected"):
        RayConfig(**wrong)


def test_ray_that_is_not_installed(demo_arguments, monkeypatch):
    file, *overrides = demo_arguments()
    config = compose(file, overrides)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        Problems, match=r"data.workers.kind: .* Received: 'ray'. Fix: pip install 'mlenv\[ray\]', or data.workers.kind=threads"
    ):
        check(replace(config, data=replace(config.data, workers=RayConfig())))
    with pytest.raises(MlenvError, match=r"ray: cannot be imported .* Fix: pip install 'mlenv\[ray\]'"):
        next(RayConfig().build().map(str, [1]))


def test_rows_their_order_and_every_restart_are_those_of_threads(folder, address, monkeypatch):
    monkeypatch.chdir(folder.parent)
    expected = list(source(folder.name).batches())
    reader = source(folder.name, address)
    assert (reader.num_rows, reader.num_batches) == (source(folder).num_rows, len(expected))
    assert_same(list(reader.batches()), expected)
    for place in (0, len(expected) // 2, len(expected) - 2):
        assert_same(list(source(folder.name, address).batches(expected[place].position)), expected[place + 1 :])


@pytest.mark.parametrize("memory_rows", [30, 100])
def test_each_process_joins_a_table_that_it_opens_itself(folder, address, tmp_path, monkeypatch, memory_rows):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"age": np.arange(80), "ratio": np.arange(80) / 8}), tmp_path / "ages.parquet")
    join = JoinConfig(table="ages.parquet", key=("age",), columns=("ratio",), memory_rows=memory_rows)
    data = {"transforms": (TRANSFORMS[0], join, TRANSFORMS[3])}
    threads, cluster = (source(folder, where, data=data) for where in (None, address))
    assert cluster.joins == threads.joins
    assert_same(list(cluster.batches()), list(threads.batches()))


@pytest.mark.parametrize("mask_column", ["", "known"])
def test_labels_from_events_are_those_of_threads_on_any_number_of_ranks_and_after_a_restart(
    folder, address, tmp_path, monkeypatch, mask_column
):
    monkeypatch.chdir(tmp_path)
    events = pa.array((np.arange(0, ROWS * DAYS, 3) + 5) * 1_000_000).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"key": np.arange(0, ROWS * DAYS, 3), "happened": events}), tmp_path / "events.parquet")
    labels = LabelEventsConfig(
        table="events.parquet",
        key=("key",),
        time="happened",
        as_of="time",
        column="click",
        replace=("click",),
        window="10s",
        wait="10m",
        mask_column=mask_column,
        memory_rows=1000,
    )
    data = {"transforms": (DeriveConfig(column="time", sql="CAST(key * 1000000 AS TIMESTAMP)"), labels)}
    schema = replace(PLAIN, labels={"click": Label(mask=mask_column)})
    threads, cluster = (source(folder, where, data=data, schema=schema, num_epochs=1) for where in (None, address))
    assert cluster.joins == threads.joins
    expected = list(threads.batches())
    assert_same(list(cluster.batches()), expected)
    assert_same(list(source(folder, address, data=data, schema=schema, num_epochs=1).batches(expected[4].position)), expected[5:])
    parts = [
        list(source(folder, data=data, schema=schema, num_epochs=1, rank=rank, world_size=2, shuffle=False).batches()) for rank in range(2)
    ]
    label_of = {
        key: label
        for part in parts
        for batch in part
        for key, label, weight in zip(keys([batch]), batch.labels[:, 0].tolist(), batch.weights[:, 0].tolist(), strict=True)
        if weight
    }
    newest = ROWS * DAYS - 3 + 5  # a row's time is its key in seconds
    assert label_of == {key: float(key % 3 == 0) for key in range(newest - 600 - 10 + 1)}


def test_ranks_share_the_rows_of_one_cluster_out(folder, address):
    readers = [source(folder, address, num_epochs=1, rank=rank, world_size=2).batches() for rank in range(2)]
    parts = [[], []]
    for batches in zip(*readers, strict=False):  # both are read at the same time
        for part, batch in zip(parts, batches, strict=True):
            part.append(batch)
    for part, reader in zip(parts, readers, strict=True):
        part.extend(reader)
    assert all(parts)
    together = keys(parts[0] + parts[1])
    assert sorted(together) == sorted(keys(source(folder, num_epochs=1, world_size=1).batches()))


def test_what_the_cluster_made_is_not_copied(folder, address):
    reader = source(folder, address, schema=PLAIN, data={"transforms": (), "shuffle_rows": 5000})
    _, _, rows = next(iter(reader._encoded_windows(START)))
    for array in (rows.sparse[0].values, rows.dense[0], rows.labels):
        assert not array.flags.writeable  # memory that the tasks share
        assert not array.flags.owndata
    assert not rows.metadata.column("key").buffers()[1].is_mutable


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Leaves a mark for every row group that it sees; the process that comes to the row ``deadly`` dies, ``deaths`` times."""

    folder: str
    deadly: int = -1
    deaths: int = 1
    reads: ClassVar[tuple[str, ...]] = ("key",)
    writes: ClassVar[tuple[str, ...]] = ()
    drops_rows: ClassVar[bool] = True
    sampling_seed: ClassVar[None] = None

    def output_schema(self, columns):
        return columns

    def held_out(self):
        return self

    def apply(self, rows, row_key):
        seen = rows.column("key").to_pylist()
        mark = Path(self.folder) / f"{seen[0]} {time.monotonic_ns()}"
        mark.touch()
        if self.deadly in seen and len(list(mark.parent.glob(f"{seen[0]} *"))) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


def test_a_killed_worker_costs_a_window_and_no_row(folder, address, tmp_path):
    data = {"transforms": (Watched(folder=str(tmp_path), deadly=7777),), "shuffle_rows": 1000}
    harmless = {"transforms": (), "shuffle_rows": 1000}
    batches = list(source(folder, address, data=data, schema=PLAIN, num_epochs=1).batches())
    assert_same(batches, list(source(folder, data=harmless, schema=PLAIN, num_epochs=1).batches()))
    assert sorted(keys(batches)) == list(range(DAYS * ROWS))
    groups = DAYS * ROWS // GROUP
    assert groups < len(list(tmp_path.iterdir())) <= groups + 2 * NUM_WORKERS  # what died was read again


def test_a_lost_node_costs_windows_and_no_row(folder, cluster):
    """A node joins that takes all tasks, and is gone in the middle, with what it had made; another takes its place."""
    import ray

    data = {"transforms": (), "shuffle_rows": 1000, "workers": RayConfig(num_workers=NUM_WORKERS, cpus_per_task=3, address=cluster.address)}
    expected = list(source(folder, data={"transforms": (), "shuffle_rows": 1000}, schema=PLAIN).batches())
    lost = cluster.add_node(num_cpus=6, object_store_memory=100 << 20)
    batches = source(folder, data=data, schema=PLAIN).batches()
    first = [next(batches) for _ in range(20)]
    other = cluster.add_node(num_cpus=6, object_store_memory=100 << 20)
    cluster.remove_node(lost, allow_graceful=False)
    assert_same([*first, *batches], expected)
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    cluster.remove_node(other)


def test_a_row_that_kills_every_worker_ends_the_training(folder, address, tmp_path):
    data = {"transforms": (Watched(folder=str(tmp_path), deadly=0, deaths=99),), "shuffle_rows": 0}
    with pytest.raises(TrainingError, match=r"rows were lost on the Ray cluster: .* Fix: lower data.shuffle_rows"):
        list(source(folder, address, data=data, schema=PLAIN, shuffle=False).batches())
    assert len(list(tmp_path.glob("0 *"))) == 1 + MAX_RETRIES


def test_no_more_windows_are_read_than_wait(folder, address, tmp_path):
    import ray

    data = {"transforms": (Watched(folder=str(tmp_path)),), "shuffle_rows": 0, "batch_size": GROUP}
    window_bytes = GROUP * 64 * 4

    def used():
        resources = ray.cluster_resources()["object_store_memory"], ray.available_resources()["object_store_memory"]
        return resources[0] - resources[1]

    reader = source(folder, address, data=data, schema=PLAIN, shuffle=False, num_epochs=1)
    batches, in_use = reader.batches(), []
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.5)  # a slow training
        assert len(list(tmp_path.iterdir())) <= taken + NUM_WORKERS
        in_use.append(used())
    assert 0 < max(in_use) < 10 * window_bytes
    batches.close()
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 5 + NUM_WORKERS


def test_a_wrong_value_is_named_as_in_threads(folder, address, tmp_path):
    items = np.zeros(ROWS, np.int64)
    items[1234] = 1007
    (tmp_path / "date=2026-01-01").mkdir()
    pq.write_table(day(0, item=items), tmp_path / "date=2026-01-01" / "part-0.parquet", row_group_size=GROUP)
    messages = []
    for where in (None, address):
        with pytest.raises(
            DataError, match=r"row group 2, row 234, column 'item': expected an id in \[0, 1000\)\. Received: 1007"
        ) as error:
            list(
                source(
                    tmp_path,
                    where,
                    data={"transforms": (FilterConfig(where="age >= 0"),)},
                    schema=PLAIN,
                ).batches()
            )
        assert type(error.value) is DataError
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_training_has_the_same_metrics(demo_arguments, address):
    results = {}
    for kind, settings in {"threads": (), "ray": ("data.workers.kind=ray", f"data.workers.address={address}")}.items():
        file, *overrides = demo_arguments(*settings, output=kind)
        results[kind] = train(compose(file, overrides)).evaluation.metrics
    np.testing.assert_equal(results["threads"], results["ray"])  # exactly; nan is nan


def test_a_killed_actor_costs_parts_and_no_row(folder, address, tmp_path, monkeypatch, caplog):
    """Rows scored by two actors, one of which dies at a row, against those of threads; see tests/inference/test_batch_inference.py."""
    monkeypatch.chdir(tmp_path)
    tables = "{item: {num_embeddings: 1000, embedding_dim: 2}}"
    schema = f"{{row_key: [key], labels: {{click: {{}}}}, features: {{item: {{kind: categorical}}}}, tables: {tables}}}"
    data = f"{{path: '{folder}', train: {{end: 2026-01-01}}}}"
    (tmp_path / "tiny.yaml").write_text(f"{{name: tiny, output: tiny, model: {{kind: ranker}}, schema: {schema}, data: {data}}}")
    train(compose(tmp_path / "tiny.yaml", ["loop.max_steps=2", "tracking.enabled=false"]))
    inference = prepare(["tiny"], InferenceOptions(path=str(folder), part_rows=1000))
    run(inference, tmp_path / "threads")
    marks = tmp_path / "marks"
    marks.mkdir()
    scorers = inference.scorer.scorers
    watched = DataConfig(path=str(folder), train=WindowConfig(), transforms=(Watched(folder=str(marks), deadly=7777),))
    reading = Reading(ParquetSource(watched, WindowConfig(), scorers["tiny"].schema, extras=("metadata",)), ("tiny",))
    scorer = PartScorer(scorers, [reading], has_labels=True)
    options = replace(inference.options, ray=address, workers=NUM_WORKERS)
    predicted = run(replace(inference, scorer=scorer, options=options), tmp_path / "actors")
    assert (predicted.num_rows, predicted.num_parts, predicted.num_repeated) == (DAYS * ROWS, 15, 0)
    assert len(list(marks.glob("7500 *"))) == 2
    assert "was scored by an actor that had died and was started again" in caplog.text
    threads, actors = (
        {path.name: path.read_bytes() for path in (tmp_path / way).rglob("*") if path.is_file()} for way in ("threads", "actors")
    )
    assert actors == threads


def test_a_cluster_that_was_started_ends_and_one_that_was_joined_stays(folder, address):
    import ray

    ray.shutdown()
    for own in ("", address):
        reader = source(
            folder,
            own,
            num_epochs=1,
            data={"transforms": ()},
            schema=PLAIN,
        )
        assert not ray.is_initialized()  # nothing is started for a dry run
        batches = reader.batches()
        next(batches)
        assert ray.cluster_resources()["CPU"] == NUM_WORKERS
        reader.close()
        batches.close()
        assert not ray.is_initialized()
    ray.init(address=address, log_to_driver=False)
