"""Versions, aliases and moves in a real MLflow database, with other clients at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlenv.errors import DataError, MlenvError
from mlenv.models import registry as registry_file
from mlenv.models.registry import CHALLENGER, CHAMPION, PREVIOUS, Move, RegisteredModel, Registry, locked

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")

MOVES = 6
MOVER = f"""
import sys
from mlenv.models.registry import CHAMPION, Registry
registry = Registry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range({MOVES}):
    registry.move("ranker", "promoted", {{CHAMPION: "2"}}, expected={{}}, why="the other process")
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with one model of three versions."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry of a test')}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    client.create_registered_model("ranker")
    for _ in range(3):
        client.create_model_version("ranker", "elsewhere")
    return uri


@pytest.fixture
def registry(uri: str) -> Registry:
    """The model as at first."""
    registry = Registry(uri)
    model = registry.client.get_registered_model("ranker")
    for alias in model.aliases:
        registry.client.delete_registered_model_alias("ranker", alias)
    for tag in model.tags:
        registry.client.delete_registered_model_tag("ranker", tag)
    return registry


def promote(registry: Registry, version: str, before: str) -> Move:
    aliases = {CHAMPION: version, PREVIOUS: before, CHALLENGER: ""}
    return registry.move("ranker", "promoted", aliases, expected={CHAMPION: before}, why="better")


def test_moves_are_recorded_and_an_alias_that_was_moved_stops_the_next_one(registry: Registry) -> None:
    registry.client.set_registered_model_alias("ranker", CHALLENGER, "1")
    first = promote(registry, "1", "")
    assert registry.model("ranker").aliases == {CHAMPION: "1"}
    held = registry.record("ranker", "held", "3", before="1", why="worse", report="runs:/a/b")
    second = promote(registry, "2", "1")
    model = registry.model("ranker")
    assert model.aliases == {CHAMPION: "2", PREVIOUS: "1"}
    assert model.moves == [first, held, second]
    assert [(move.number, move.kind, move.version, move.before, move.is_done) for move in model.moves] == [
        (1, "promoted", "1", "", True),
        (2, "held", "3", "1", True),
        (3, "promoted", "2", "1", True),
    ]
    assert "@" in second.who
    assert second.when.endswith("+00:00")
    with pytest.raises(DataError, match=r"ranker@champion: expected version 1, as it was when the gates ran. Received: 'version 2'"):
        promote(registry, "3", "1")
    assert registry.model("ranker").aliases == model.aliases
    assert registry.model("ranker").moves == model.moves
    assert registry.models() == ["ranker"]  # no lock is left


def test_names_that_are_not_there(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'ranker'"):
        registry.model("rankre")
    with pytest.raises(DataError, match=r"expected a version or an alias that it has. Received: 'champion'. Fix: take one of 3, 2, 1"):
        registry.version("ranker", "champion")
    with pytest.raises(DataError, match=r"mlflow\.db: expected a database of tracked runs"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(MlenvError, match=r"MLflow at http://127\.0\.0\.1:9: .*Fix: start the server"):
        Registry("http://u:secret@127.0.0.1:9").model("ranker")


def test_two_processes_move_one_after_the_other(registry: Registry, uri: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", MOVER, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout, process.stdin:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        for _ in range(MOVES):
            registry.move("ranker", "promoted", {CHAMPION: "1"}, expected={}, why="this process")
        assert process.wait(60) == 0
    moves = registry.model("ranker").moves
    assert [move.number for move in moves] == [*range(1, 2 * MOVES + 1)]
    assert all(later.before == earlier.version for earlier, later in pairwise(moves))
    assert {move.why for move in moves} == {"this process", "the other process"}


def test_a_lock_is_waited_for_and_one_that_was_left_is_taken(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    client = registry.client
    with locked(client, "ranker"):
        with (
            pytest.raises(MlenvError, match=r"ranker: .+@.+ is moving its aliases. Fix: wait a moment"),
            locked(client, "ranker", timeout_seconds=0.2),
        ):
            pass
        assert registry.models() == ["ranker"]
    left = json.dumps({"token": "dead", "who": "nobody@nowhere", "until": time.time() - 1})
    client.create_registered_model("ranker.mlenv-lock", description=left)
    with locked(client, "ranker", timeout_seconds=0.2):
        # A client that found the dead owner, too, but comes late, cannot take away the lock of the new one.
        registry_file._set_aside(client, "ranker.mlenv-lock", "dead")
        assert "dead" not in client.get_registered_model("ranker.mlenv-lock").description
    client.delete_registered_model("ranker.mlenv-lock.dead")
    promote(registry, "1", "")


def test_a_client_that_dies_on_the_way_leaves_a_trace(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(registry, "1", "")

    def die(*arguments: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(registry.client, "set_registered_model_alias", die)
    with pytest.raises(MlenvError, match="gone"):
        promote(registry, "2", "1")
    model = registry.model("ranker")
    assert model.aliases == {CHAMPION: "1"}
    assert [(move.version, move.is_done) for move in model.moves] == [("1", True), ("2", False)]
    assert model.champions == ["1"]


def test_champions_are_those_that_were_not_rolled_back() -> None:
    def move(number: int, kind: registry_file.MoveKind, version: str, before: str) -> Move:
        return Move(number=number, kind=kind, version=version, before=before, who="", when="", why="", is_done=True)

    moves = [
        move(1, "promoted", "1", ""),
        move(2, "forced", "2", "1"),
        move(3, "held", "3", "2"),
        move(4, "promoted", "4", "2"),
        move(5, "rolled back", "2", "4"),
    ]
    assert RegisteredModel(name="ranker", aliases={}, moves=moves).champions == ["1", "2"]
    assert RegisteredModel(name="ranker", aliases={}, moves=[*moves, move(6, "rolled back", "1", "2")]).champions == ["1"]
