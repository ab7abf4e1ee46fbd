"""What goes into an image, as a team declares it. Every value is checked here: it ends in a Dockerfile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from mlenv.errors import ConfigError, Problems

Accelerator = Literal["cpu", "cuda"]

NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
VERSION: Final = re.compile(r"[0-9][A-Za-z0-9.!+]*")
_WORD: Final = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
PIN: Final = re.compile(rf"(?P<name>{_WORD})(\[[A-Za-z0-9,._-]*\])?==(?P<version>[A-Za-z0-9.!+_-]+)")
"""A requirement with one exact version."""
_BASE: Final = re.compile(r"[a-z0-9][a-zA-Z0-9._/:-]*(@sha256:[0-9a-f]{64})?")
_SYSTEM_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]*(=[A-Za-z0-9.+:~-]+)?")
_USER: Final = re.compile(r"[0-9]+(:[0-9]+)?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL: Final = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_PYTHON: Final = re.compile(r"3\.\d+")
_FILE: Final = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """One image. Paths are relative to the file that declares it."""

    base: str = "python:3.11-slim-bookworm"
    """Image that it stands on: with a shell, this Python and its pip; a digest (NAME@sha256:...) makes it the same for ever."""
    accelerator: Accelerator = "cpu"
    """Which builds of torch and fbgemm the lock must hold."""
    python: str = "3.11"
    """Python that the base has and that the lock was made for."""
    mlenv: str = ""
    """A version to download, or the path of a wheel or a checkout; the mlenv that builds the image when empty."""
    extras: tuple[str, ...] = ()
    """Packages that mlenv runs without and that must be there, such as ``torchrec`` or ``ray``."""
    left_out: tuple[str, ...] = ()
    """Packages that mlenv asks for and that are left out on purpose, such as ``torch`` where a model is only served."""
    system_packages: tuple[str, ...] = ()
    """Debian packages."""
    python_packages: tuple[str, ...] = ()
    """Beside the lock, each with its version: ``name==1.2.3``."""
    lock: str = ""
    """File of exact versions, one a line, which are installed as they stand; none when empty."""
    wheels: str = ""
    """Folder of wheels; with it nothing is downloaded."""
    files: tuple[str, ...] = ()
    """Files and folders of the model repo, which come into /app under the same names."""
    entry_point: tuple[str, ...] = ()
    """What every command is given to; none when empty."""
    user: str = "10001:10001"
    """Number of the user, and of the group, that runs it; never root."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    labels: dict[str, str] = field(default_factory=dict)
    smoke_test: tuple[str, ...] = ()
    """Command that must end well before the image gets its tag; ``mlenv doctor`` when empty."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise Problems("image", problems)

    @property
    def smoke_command(self) -> tuple[str, ...]:
        """The smoke test, with what the image must and must not have."""
        if self.smoke_test:
            return self.smoke_test
        needs = [word for name in self.extras for word in ("--need", name)]
        without = [word for name in self.left_out for word in ("--without", name)]
        return ("mlenv", "doctor", "--json", *needs, *without)

    def _problems(self) -> Iterator[ConfigError]:
        yield from _matching("base", [self.base], _BASE, "an image, such as python:3.11-slim-bookworm")
        if not self.base.startswith("scratch") and ":" not in self.base.rpartition("/")[2]:
            fix = "name a tag or a digest: an image without one is another one every month"
            yield ConfigError("base", expected="an image with a tag or a digest", received=self.base, fix=fix)
        yield from _matching("python", [self.python], _PYTHON, "a version such as 3.11")
        yield from _matching("system_packages", self.system_packages, _SYSTEM_PACKAGE, "a Debian package, or package=version")
        fix = "pin it: an image is known by what went into it"
        yield from _matching("python_packages", self.python_packages, PIN, "a package with its version, name==1.2.3", fix)
        yield from _matching("extras", self.extras, re.compile(_WORD), "a package")
        yield from _matching("left_out", self.left_out, re.compile(_WORD), "a package")
        fix = "name files inside the folder of the declaration"
        inside = [name for name in self.files if ".." not in name.split("/") and name != "."]
        yield from (
            ConfigError("files", expected="a path inside the repo", received=name, fix=fix) for name in self.files if name not in inside
        )
        yield from _matching("files", inside, _FILE, "a path of letters, digits and . _ - /")
        yield from _matching("user", [self.user], _USER, "the number of a user, or USER:GROUP")
        if self.user.partition(":")[0].strip("0") == "":
            yield ConfigError("user", expected="a user that is not root", received=self.user, fix="leave it out")
        yield from _matching("environment", self.environment, _VARIABLE, "the name of an environment variable")
        yield from _matching("labels", self.labels, _LABEL, "a label in lower case, such as org.example.team")
        for key, values in (
            ("entry_point", self.entry_point),
            ("smoke_test", self.smoke_test),
            ("environment", self.environment.values()),
            ("labels", self.labels.values()),
        ):
            yield from (
                ConfigError(key, expected="text in one line", received=value) for value in values if not value.isprintable() or not value
            )


def pins(lines: Iterable[str]) -> dict[str, str]:
    """Versions by normalized name; lines that are no pin are left out."""
    found = (PIN.match(line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", pin["name"]).lower(): pin["version"] for pin in found if pin}


def _matching(key: str, values: Iterable[str], pattern: re.Pattern[str], expected: str, fix: str = "") -> Iterator[ConfigError]:
    for value in values:
        if not pattern.fullmatch(value):
            yield ConfigError(key, expected=expected, received=value, fix=fix)
