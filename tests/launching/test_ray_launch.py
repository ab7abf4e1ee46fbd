"""Parts of a training on Ray that need no cluster; what a killed worker costs is in tests/loops/test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.config import Command
from mlenv.errors import WRONG_INPUT, ConfigError, Problems
from mlenv.launching.ray_launch import RayLauncherConfig, _check_room, _num_cpus, _token_beside, _work


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("launch.num_processes=0", "launch.num_processes: expected a number >= 1"),
        ("launch.gpus_per_process=2", "launch.gpus_per_process: expected 0 or 1, because a process has one"),
        ("launch.address=ray://head:10001", "launch.address: expected auto, host:port"),
        ("launch.cores=2", "launch.cores: expected a key of RayLauncherConfig"),
    ],
)
def test_wrong_options_are_refused(demo_arguments, setting, message):
    file, *settings = demo_arguments("launch=ray", setting)
    with pytest.raises(Problems) as caught:
        compose(file, settings)
    assert message in str(caught.value)


def test_what_is_wrong_is_said_before_a_cluster_is_started(demo_arguments, capsys, tmp_path):
    assert main(["train", *demo_arguments("launch=ray", "data.train.end=2025-01-01")]) == WRONG_INPUT
    assert capsys.readouterr().err.count("expected Parquet files in") == 1
    assert main(["train", *demo_arguments("launch=ray", "launch.address=127.0.0.1:1")]) == WRONG_INPUT
    assert "launch.address: expected a Ray cluster that answers. Received: '127.0.0.1:1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_has_room_for_the_training_and_for_the_readers_of_its_data(demo_arguments):
    file, *settings = demo_arguments("launch=ray", "launch.num_processes=3", "launch.cpus_per_process=2")
    config = compose(file, settings)
    assert _num_cpus(config.launch, config) == 6
    config = compose(file, [*settings, "data.workers=ray", "data.workers.num_workers=4"])
    assert _num_cpus(config.launch, config) == 3 * (2 + 4)


def test_a_cluster_that_was_started_must_be_large_enough_and_one_that_was_joined_may_grow(caplog):
    on_gpus = {"num_processes": 2, "gpus_per_process": 1}
    _check_room({"CPU": 2.0, "GPU": 2.0}, RayLauncherConfig(**on_gpus))
    with pytest.raises(ConfigError, match=r"launch.gpus_per_process: expected at most 1 in all. Received: 2"):
        _check_room({"CPU": 2.0, "GPU": 1.0}, RayLauncherConfig(**on_gpus))
    assert caplog.text == ""
    _check_room({"CPU": 2.0}, RayLauncherConfig(**on_gpus, address="auto"))
    assert "has 0 GPUs and the training needs 2" in caplog.text


def test_a_node_that_does_not_see_the_output_folder_is_named(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    command = Command((), lambda config: 0)
    with _token_beside(tmp_path / "run") as token:
        assert token.parent == tmp_path
        with pytest.raises(ConfigError, match=r"output: expected a folder that the node 10.0.0.7 sees too"):
            _work({}, command, Path.cwd(), tmp_path / "elsewhere" / token.name, SimpleNamespace())
    assert list(tmp_path.iterdir()) == []
