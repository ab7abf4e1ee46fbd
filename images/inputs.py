"""All that goes into an image, packed into one folder, and the hash that is its tag."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from mlenv.composition import from_plain, to_plain
from mlenv.errors import ConfigError, DataError, MlenvError, PlacedError, Problems
from mlenv.images.compatibility import version_problems
from mlenv.images.declared import Declared
from mlenv.images.dockerfile import FILES, MLENV, PACKAGES, WHEELS, render
from mlenv.images.mlenv_wheel import copy_wheel, unmet_requirements
from mlenv.images.spec import NAME, PIN, VERSION, ImageSpec, pins

_TAG_LETTERS: Final = 16
_WHEEL: Final = re.compile(rf"{MLENV}/[A-Za-z0-9_.+-]+\.whl")
_LEFT_BEHIND: Final = {".git", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an image is made of. Two machines with the same inputs and the same base make the same image."""

    name: str
    spec: ImageSpec
    """Without paths: what they lead to is in the context."""
    files: dict[str, str]
    """SHA-256 of every file of the context by its path, with an ``x`` behind it where the file can be run."""
    pinned: dict[str, str]
    """Versions by package."""

    @cached_property
    def dockerfile(self) -> str:
        return render(self.name, self.spec, self.files, self.pinned)

    def tag(self, base: str, architecture: str) -> str:
        """The tag.

        Args:
            base: digest, or id, of the base image.
            architecture: of the machine, such as ``amd64``.
        """
        return self.digest(base, architecture)[:_TAG_LETTERS]

    def digest(self, base: str, architecture: str) -> str:
        """SHA-256 of everything, in hex."""
        everything = {**self.to_plain(), "dockerfile": self.dockerfile, "base": base, "architecture": architecture}
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def to_plain(self) -> dict[str, Any]:
        return {"name": self.name, "spec": to_plain(self.spec), "files": self.files, "pinned": self.pinned}

    @staticmethod
    def from_plain(plain: object) -> Inputs:
        """What ``to_plain`` wrote, looked at again: it may come from another machine.

        Raises:
            MlenvError: it is not what ``to_plain`` writes.
        """
        if not (isinstance(plain, dict) and plain.keys() == {"name", "spec", "files", "pinned"} and isinstance(plain["spec"], dict)):
            raise ConfigError("inputs", expected="name, spec, files and pinned", received=plain)
        for key in ("files", "pinned"):
            if not (isinstance(plain[key], dict) and all(isinstance(value, str) for value in plain[key].values())):
                raise ConfigError(key, expected="a mapping of texts", received=plain[key])
        for path in plain["files"]:
            if path.startswith("/") or ".." in path.split("/"):
                raise ConfigError("files", expected="paths inside the context", received=path)
        if not (isinstance(plain["name"], str) and NAME.fullmatch(plain["name"])):
            raise ConfigError("name", expected="a name of small letters, digits and hyphens", received=plain["name"])
        spec: ImageSpec = from_plain(plain["spec"], ImageSpec)
        if spec.lock or spec.wheels or spec.files or spec.python_packages or not (spec.mlenv == "" or VERSION.fullmatch(spec.mlenv)):
            raise ConfigError("spec", expected="no paths: their files are in the context", received=to_plain(spec))
        wheels = [path for path in plain["files"] if path.startswith(f"{MLENV}/")]
        if len(wheels) != (spec.mlenv == "") or not all(_WHEEL.fullmatch(path) for path in wheels):
            raise ConfigError("files", expected="one wheel of mlenv, or its version", received=wheels)
        return Inputs(name=plain["name"], spec=spec, files=plain["files"], pinned=plain["pinned"])


def pack(declared: Declared, context: Path) -> Inputs:
    """Gathers the files of an image in a new folder, and refuses what cannot become one.

    Raises:
        Problems: files that are not there, versions that do not go together, packages that mlenv needs and nobody pins.
    """
    spec, problems = declared.spec, list[MlenvError]()
    context.mkdir(parents=True)
    lines = [*_lock_lines(spec, problems), *spec.python_packages]
    if lines:
        (context / PACKAGES).write_text("\n".join([*sorted(set(lines)), ""]))
    wheel: Path | None = None
    try:
        wheel = copy_wheel(spec.mlenv, context / MLENV)
        problems += unmet_requirements(wheel, pins(lines), spec.left_out) if wheel and not problems else ()
    except PlacedError as error:
        problems.append(error)
    if spec.wheels:
        wheels = sorted(Path(spec.wheels).glob("*.whl"))
        if not wheels:
            problems.append(ConfigError("wheels", expected="a folder with wheels", received=spec.wheels))
        for file in wheels:
            _place(file, context / WHEELS / file.name)
    if spec.mlenv and not wheel and not VERSION.fullmatch(spec.mlenv):
        fix = "write a path with a slash, such as ./mlenv-1.0.whl"
        problems.append(ConfigError("mlenv", expected="a version, or the path of a wheel or a checkout", received=spec.mlenv, fix=fix))
    for name in spec.files:
        source = declared.folder / name
        if not source.exists():
            problems.append(ConfigError("files", expected=f"a file or folder in {declared.folder}", received=name))
        for file in [source] if source.is_file() else _files_below(source):
            if not file.resolve().is_relative_to(declared.folder):
                problems.append(ConfigError("files", expected="files inside the repo", received=str(file), fix="copy it, a link leaves it"))
            else:
                _place(file, context / FILES / name / file.relative_to(source) if file != source else context / FILES / name)
    pinned = pins(lines)
    problems += version_problems(spec, pinned)
    if problems:
        key = f"images.{declared.name}"
        raise Problems(declared.name, [problem.under(key) if isinstance(problem, PlacedError) else problem for problem in problems])
    packed = replace(spec, lock="", wheels="", files=(), python_packages=(), mlenv="" if wheel else spec.mlenv)
    return Inputs(name=declared.name, spec=packed, files=dict(manifest(context)), pinned=pinned)


def manifest(context: Path) -> Iterator[tuple[str, str]]:
    """Path and SHA-256 of every file, see ``Inputs.files``."""
    for file in _files_below(context):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        yield file.relative_to(context).as_posix(), digest + ("x" if os.access(file, os.X_OK) else "")


def check_context(context: Path, inputs: Inputs) -> None:
    """Whether a folder holds the files of these inputs and no other.

    Raises:
        DataError: names the first file that is another one.
    """
    found = dict(manifest(context))
    for path in sorted(found.keys() | inputs.files.keys()):
        if found.get(path) != inputs.files.get(path):
            what = inputs.files.get(path, "no such file")
            raise DataError(f"context: {path}", expected=what, received=found.get(path, "no such file"), fix="send the image again")
    packages = context / PACKAGES
    lines = packages.read_text().splitlines() if packages.exists() else []
    for number, line in enumerate(lines, 1):
        if not PIN.fullmatch(line):
            raise DataError(f"context: {PACKAGES}, line {number}", expected="a package with its version, name==1.2.3", received=line)
    if pins(lines) != inputs.pinned:
        raise DataError(f"context: {PACKAGES}", expected="the versions of the inputs", received=pins(lines))


def _lock_lines(spec: ImageSpec, problems: list[MlenvError]) -> list[str]:
    if not spec.lock:
        return []
    try:
        text = Path(spec.lock).read_text()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(ConfigError("lock", expected="a readable file", received=f"{spec.lock}: {error}"))
        return []
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if line and not PIN.fullmatch(line):
            place = f"lock: {spec.lock}, line {number}"
            problems.append(ConfigError(place, expected="a package with its version, name==1.2.3", received=line, fix="pin it"))
    return [line for line in lines if line]


def _files_below(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not _LEFT_BEHIND & set(file.relative_to(folder).parts):
            yield file


def _place(file: Path, place: Path) -> None:
    """The same file under another name where the disk allows it, else a copy: wheels are large."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copy2(file, place)
