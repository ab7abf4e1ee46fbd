"""Registered models in MLflow: their versions, the aliases that say which is served, and every move of those aliases.

An alias moves under a lock that works wherever MLflow does: a registered model of an agreed name, which the store lets only one
client create. What moved, when, who did it and why are tags of the registered model.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from mlenv.errors import DataError, MlenvError, nearest
from mlenv.records.mlflow_outbox import without_password
from mlenv.records.mlflow_store import asking, open_store, paged, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
PREVIOUS: Final = "previous"

LEASE_SECONDS: Final = 300.0
"""A lock that is older was left by a client that died: a move takes a second, and longer only while its few calls time out."""

_PAGE: Final = 500
_MOVE: Final = "mlenv.move."
_LOCK: Final = ".mlenv-lock"
_WAIT_SECONDS: Final = 0.1

MoveKind = Literal["promoted", "forced", "held", "rolled back"]


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A version of a registered model, and the run that it was made from."""

    name: str
    version: str
    aliases: tuple[str, ...]
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    created_ms: int = 0

    def __str__(self) -> str:
        return f"{self.name} version {self.version}" + (f" ({', '.join(f'@{alias}' for alias in self.aliases)})" if self.aliases else "")


@dataclass(frozen=True, kw_only=True)
class Move:
    """One decision about which version is served."""

    number: int
    """From 1 on, without gaps."""
    kind: MoveKind
    version: str
    """That asked to become champion; of a rollback the one that became it again."""
    before: str
    """Champion until then; empty for none."""
    who: str
    when: str
    """ISO 8601, UTC."""
    why: str
    report: str = ""
    """Where the report is: ``runs:/ID/FOLDER``; empty without one."""
    is_done: bool = False
    """False when the client died on the way: the aliases may not have moved."""


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A registered model as it was when MLflow was asked."""

    name: str
    aliases: Mapping[str, str]
    """Version by alias."""
    moves: Sequence[Move]
    """The oldest first."""

    @property
    def champions(self) -> list[str]:
        """Versions that were champion one after the other, without those that were rolled back; the last is champion now."""
        found: list[str] = []
        for move in self.moves:
            if move.kind == "rolled back" and move.before in found:
                del found[found.index(move.before) :]
            if move.kind != "held" and move.is_done and found[-1:] != [move.version]:
                found.append(move.version)
        return found


class Registry:
    """The registered models of one MLflow."""

    def __init__(self, uri: str = "") -> None:
        """
        Args:
            uri: see ``store_uri``.

        Raises:
            DataError: there is no such database.
        """
        self.uri = store_uri(uri)
        self.place = without_password(self.uri)
        self.client: MlflowClient = open_store(self.uri)

    def models(self) -> list[str]:
        """Names of all registered models, in order."""
        with asking(self.uri):
            return sorted(model.name for model in paged(self.client.search_registered_models, max_results=100) if not _is_lock(model.name))

    def model(self, name: str) -> RegisteredModel:
        """
        Raises:
            DataError: there is none of that name.
            MlenvError: MLflow does not answer.
        """
        with asking(self.uri):
            try:
                found = self.client.get_registered_model(name)
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
                fix = f"mlenv register OUTPUT --name {name}; {nearest(name, self.models())}"
                raise DataError(name, expected=f"a registered model of MLflow at {self.place}", received="none", fix=fix) from error
        moves = [Move(**json.loads(text)) for key, text in found.tags.items() if key.startswith(_MOVE)]
        aliases = {alias: str(version) for alias, version in found.aliases.items()}
        return RegisteredModel(name=name, aliases=aliases, moves=sorted(moves, key=lambda move: move.number))

    def version(self, name: str, version: str) -> ModelVersion:
        """
        Args:
            version: its number, or an alias of it.

        Raises:
            DataError: there is no such model or version.
        """
        model = self.model(name)
        number = model.aliases.get(version, version)
        found = {one.version: one for one in self.versions(name)}
        if number not in found:
            known = ", ".join([*found, *(f"{alias} (version {number})" for alias, number in model.aliases.items())])
            fix = f"take one of {known}" if known else f"mlenv register OUTPUT --name {name}"
            raise DataError(name, expected="a version or an alias that it has", received=version, fix=fix)
        return found[number]

    def versions(self, name: str) -> list[ModelVersion]:
        """Of one model, the newest first; none of a model that is not there."""
        with asking(self.uri):
            return sorted(list_versions(self.client, name), key=lambda version: -int(version.version))

    def record(self, name: str, kind: MoveKind, version: str, *, before: str, why: str, report: str = "") -> Move:
        """Writes a decision down that moves nothing.

        Raises:
            MlenvError: MLflow does not answer.
        """
        with asking(self.uri, name), locked(self.client, name):
            move = self._next_move(name, kind, version, before=before, why=why, report=report, is_done=True)
            self._write(name, move)
            return move

    def move(
        self,
        name: str,
        kind: MoveKind,
        aliases: Mapping[str, str],
        *,
        expected: Mapping[str, str],
        why: str,
        report: str = "",
    ) -> Move:
        """Moves aliases, unless somebody else has moved one of them in the meantime, and writes down that it did.

        Args:
            aliases: version by alias; empty takes the alias away. The champion is among them.
            expected: version by alias, as they were when it was decided; empty for none.

        Raises:
            DataError: an alias is no longer where it was expected; nothing is moved.
            MlenvError: another client holds the lock, or MLflow does not answer.
        """
        with asking(self.uri, name), locked(self.client, name):
            now = self.model(name).aliases
            for alias, version in expected.items():
                if now.get(alias, "") != version:
                    raise DataError(
                        f"{name}@{alias}",
                        expected=f"version {version}, as it was when the gates ran" if version else "none, as it was when the gates ran",
                        received=f"version {now[alias]}" if alias in now else "none",
                        fix="somebody else moved it; run the same command again, against the models that are there now",
                    )
            before = now.get(CHAMPION, "")
            move = self._next_move(name, kind, aliases[CHAMPION], before=before, why=why, report=report, is_done=False)
            self._write(name, move)
            for alias, version in sorted(aliases.items(), key=lambda item: item[0] == CHAMPION):  # last, so that it has a previous by then
                if version:
                    self.client.set_registered_model_alias(name, alias, version)
                elif alias in now:
                    self.client.delete_registered_model_alias(name, alias)
            done = Move(**asdict(move) | {"is_done": True})
            self._write(name, done)
            return done

    def _next_move(self, name: str, kind: MoveKind, version: str, *, before: str, why: str, report: str, is_done: bool) -> Move:
        number = max((move.number for move in self.model(name).moves), default=0) + 1
        when = datetime.now(UTC).isoformat(timespec="seconds")
        return Move(
            number=number, kind=kind, version=version, before=before, who=who(), when=when, why=why[:2000], report=report, is_done=is_done
        )

    def _write(self, name: str, move: Move) -> None:
        self.client.set_registered_model_tag(name, f"{_MOVE}{move.number:06d}", json.dumps(asdict(move)))


def list_versions(client: MlflowClient, name: str = "") -> Iterator[ModelVersion]:
    """Versions of one registered model, or of all."""
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in paged(client.search_registered_models, filter_string=f"name = '{name}'" if name else None, max_results=100):
        for alias, version in sorted(model.aliases.items()):
            aliases.setdefault((model.name, str(version)), []).append(alias)
    for version in paged(client.search_model_versions, filter_string=f"name = '{name}'" if name else None, max_results=_PAGE):
        key = (version.name, str(version.version))
        source = version.source or ""
        yield ModelVersion(
            name=key[0],
            version=key[1],
            aliases=tuple(aliases.get(key, ())),
            run_id=version.run_id or (source.removeprefix("runs:/").partition("/")[0] if source.startswith("runs:/") else ""),
            tags=dict(version.tags),
            created_ms=version.creation_timestamp,
        )


def who() -> str:
    """User and machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without an entry
        user = f"user {os.getuid()}"
    return f"{user}@{platform.node()}"


@contextmanager
def locked(client: MlflowClient, name: str, *, timeout_seconds: float = 30.0) -> Iterator[None]:
    """Keeps every other client from moving aliases of a model; within one client, too.

    The lock is a registered model whose description says whose it is: the store refuses a second one of the same name. One
    that was left behind is set aside under a name that is made of its owner, so that of several clients who find it only one can.

    Raises:
        MlenvError: another client holds it for too long.
    """
    lock, deadline = f"{name}{_LOCK}", time.monotonic() + timeout_seconds
    mine = json.dumps({"token": uuid.uuid4().hex, "who": who(), "until": time.time() + LEASE_SECONDS})
    while not _create(client, lock, mine):
        holder = _holder(client, lock)
        if holder is not None and holder["until"] < time.time():
            _set_aside(client, lock, str(holder["token"]))
        elif time.monotonic() > deadline:
            owner = "somebody" if holder is None else holder["who"]
            raise MlenvError(f"{name}: {owner} is moving its aliases. Fix: wait a moment, and run the same command again.")
        else:
            time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        if (holder := _holder(client, lock)) is not None and holder["token"] == json.loads(mine)["token"]:
            client.delete_registered_model(lock)


def _create(client: MlflowClient, lock: str, text: str) -> bool:
    try:
        client.create_registered_model(lock, description=text)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS":
            return False
        raise
    return True


def _holder(client: MlflowClient, lock: str) -> dict[str, Any] | None:
    """None when the lock has just been given back."""
    try:
        holder: dict[str, Any] = json.loads(client.get_registered_model(lock).description)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return holder


def _set_aside(client: MlflowClient, lock: str, token: str) -> None:
    """It stays there: as long as it does, nobody who found the same owner can take away the lock of a new one."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # another client was faster
        client.rename_registered_model(lock, f"{lock}.{token}")


def _is_lock(name: str) -> bool:
    return _LOCK in name
