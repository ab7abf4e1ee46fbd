"""From inputs to an image with a tag: looked up first, built once, tried out, and only then named."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any, Final

from mlenv.errors import ConfigError, ImageError, check_above
from mlenv.images.engine import Builder, find_builder
from mlenv.images.inputs import Inputs

logger = logging.getLogger(__name__)

SECRETS: Final = ("ca", "pip", "apt", "netrc")
"""A bundle of certificates, a pip.conf, Debian's sources, logins by host. Each is there while a command runs, and in no layer."""

NAME, INPUTS, TORCH, VERSION, LOCK = "mlenv.name", "mlenv.inputs", "mlenv.torch", "mlenv.version", "mlenv.lock"
REVISION: Final = "org.opencontainers.image.revision"

_SMOKE_TEST_SECONDS: Final = 300
_NO_ENTRY_POINT: Final = ("",)
"""Says to the engine that the image's own is not wanted; an empty list says nothing."""

Log = Callable[[str], None]

_FULL: Final = re.compile(r"no space left on device", re.IGNORECASE)
_NO_PACKAGE: Final = re.compile(r"No matching distribution found for (\S+)|Unable to locate package (\S+)")
_FAILED_STEP: Final = re.compile(r"#(\d+) ERROR")
_PRINTED: Final = re.compile(r"\d+\.\d+ (.*\S.*)")
"""A line that a step prints, behind the seconds since it began."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    registry: str = ""
    """Host and path that the image's name begins with, such as ``registry.example.com/ranking``; an image that is there is not built."""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files by the names of SECRETS."""
    network: str = ""
    """Network of the build, such as ``host`` or ``none``; the engine's default when empty."""
    timeout_minutes: float = 60

    def __post_init__(self) -> None:
        check_above("--timeout-minutes", self.timeout_minutes, 0)
        for name, file in self.secrets.items():
            if name not in SECRETS:
                raise ConfigError("--secret", expected=f"one of {', '.join(SECRETS)}", received=name)
            if not file.is_file():
                raise ConfigError(f"--secret {name}", expected="a file", received=str(file))


@dataclass(frozen=True)
class Image:
    """An image that is here or in the registry."""

    reference: str
    """Name and tag."""
    is_new: bool = False
    is_remote: bool = False
    """It is in the registry, and was not fetched."""


def reference_of(engine: Any, inputs: Inputs, registry: str = "") -> tuple[str, str, str]:
    """Name and tag of an image, the whole hash of its inputs, and the base with its digest.

    Raises:
        ImageError: the base is neither here nor in a registry.
    """
    base, digest = base_of(engine, inputs.name, inputs.spec.base)
    architecture = engine.version()["Arch"]
    name = f"{registry.rstrip('/')}/{inputs.name}" if registry else inputs.name
    return f"{name}:{inputs.tag(digest, architecture)}", inputs.digest(digest, architecture), base


def base_of(engine: Any, name: str, base: str) -> tuple[str, str]:
    """The base as a build takes it, and what tells it from another one of the same name.

    An image without a digest, because it was never in a registry, is known by its id.
    """
    import docker

    with suppress(docker.errors.ImageNotFound):
        attributes = engine.images.get(base).attrs
        digests = [digest.partition("@")[2] for digest in attributes["RepoDigests"] or ()]
        return base, min(digests) if digests else attributes["Id"]
    try:
        digest = engine.images.get_registry_data(base).id
    except docker.errors.APIError as error:
        fix = "name an image that is here or in a registry, and log in with docker login where that is needed"
        raise ImageError(f"images.{name}.base", expected="an image", received=f"{base}: {one_line(error)}", fix=fix) from error
    return f"{base.partition('@')[0]}@{digest}", digest


def find(engine: Any, reference: str, digest: str = "") -> Any | None:
    """The local image of this name; one with other inputs is none."""
    import docker

    try:
        image = engine.images.get(reference)
    except docker.errors.ImageNotFound:
        return None
    return image if not digest or image.labels.get(INPUTS) == digest else None


def is_in_registry(engine: Any, reference: str) -> bool:
    """Whether a registry has this name; False as well when it cannot be asked, and the push says why."""
    import docker

    try:
        engine.images.get_registry_data(reference)
    except docker.errors.APIError as error:
        if not isinstance(error, docker.errors.NotFound):
            logger.warning("%s: the registry cannot be asked: %s", reference, one_line(error))
        return False
    return True


def build(
    engine: Any, inputs: Inputs, context: Path, options: BuildOptions, *, labels: Mapping[str, str] | None = None, log: Log = print
) -> Image:
    """Builds an image unless it is here or in the registry.

    Args:
        labels: what is worth knowing of this build and is no input of it, such as the revision.
        log: takes the lines of the build.

    Raises:
        ImageError: the build or the smoke test failed; then nothing has the tag.
    """
    import docker

    reference, digest, base = reference_of(engine, inputs, options.registry)
    if find(engine, reference, digest):
        return Image(reference)
    if options.registry and is_in_registry(engine, reference):
        return Image(reference, is_remote=True)
    builder = find_builder()
    (context / "Dockerfile").write_text(inputs.dockerfile)
    known = {
        **(labels or {}),
        NAME: inputs.name,
        INPUTS: digest,
        VERSION: _mlenv_version(inputs),
        TORCH: inputs.pinned.get("torch", ""),
        LOCK: inputs.files.get("packages.txt", ""),
        "org.opencontainers.image.base.name": inputs.spec.base,
    }
    with tempfile.TemporaryDirectory() as folder:
        id_file = Path(folder) / "id"
        command = [
            *builder.command,
            *("--progress", "plain", "--iidfile", str(id_file), "--build-arg", f"BASE={base}"),
            *(word for name, value in known.items() if value for word in ("--label", f"{name}={value}")),
            *(word for name, file in options.secrets.items() for word in ("--secret", f"id={name},src={file}")),
            *(("--network", options.network) if options.network else ()),
            str(context),
        ]
        _run(builder, command, inputs.name, options.timeout_minutes * 60, log)
        image_id = id_file.read_text().strip()
    try:
        smoke_test(engine, image_id, inputs)
    except ImageError:
        with suppress(docker.errors.APIError):
            engine.images.remove(image_id)
        raise
    name, _, tag = reference.rpartition(":")
    engine.images.get(image_id).tag(name, tag)
    return Image(reference, is_new=True)


def smoke_test(engine: Any, image_id: str, inputs: Inputs) -> None:
    """Runs the image's smoke test in it, as its own user and without a network.

    Raises:
        ImageError: it did not end well.
    """
    import docker
    import requests

    command = list(inputs.spec.smoke_command)
    place = f"images.{inputs.name}: smoke test {' '.join(command)!r}"
    try:
        container = engine.containers.create(image_id, command, entrypoint=_NO_ENTRY_POINT, network_mode="none")
        try:
            container.start()
            code = container.wait(timeout=_SMOKE_TEST_SECONDS)["StatusCode"]
            printed = container.logs().decode(errors="replace")
        finally:
            container.remove(force=True)
    except docker.errors.APIError as error:
        raise ImageError(place, expected="a command that starts", received=one_line(error)) from error
    except requests.exceptions.RequestException as error:
        raise ImageError(place, expected=f"an end within {_SMOKE_TEST_SECONDS} s", received=one_line(error)) from error
    if code:
        raise ImageError(place, expected="exit code 0", received=f"{code}: {_what_is_wrong(printed)}")


def _what_is_wrong(printed: str) -> str:
    """What ``mlenv doctor --json`` found wrong, or the end of what another command printed."""
    try:
        conditions = json.loads(printed)["conditions"]
        return "; ".join(f"{entry['subject']}: {entry['found']}" for entry in conditions if entry["severity"] == "fail")
    except (ValueError, KeyError, TypeError):
        return "; ".join(printed.strip().splitlines()[-3:])


def _run(builder: Builder, command: Sequence[str], name: str, timeout_seconds: float, log: Log) -> None:
    """Runs the client; its output is handed on line by line, and of a failure the part that says why."""
    last: deque[str] = deque(maxlen=200)
    timed_out: list[bool] = []
    environment = {**os.environ, **builder.environment}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as client:
        assert client.stdout is not None

        def stop() -> None:
            timed_out.append(True)
            with suppress(ProcessLookupError):
                os.killpg(client.pid, signal.SIGKILL)

        timer = Timer(timeout_seconds, stop)
        timer.start()
        try:
            for line in client.stdout:
                last.append(line.rstrip())
                log(line.rstrip())
        except BaseException:
            stop()
            raise
        finally:
            timer.cancel()
    if timed_out:
        raise ImageError(f"images.{name}: build", expected=f"an end within {timeout_seconds / 60:g} minutes", received="none")
    if client.returncode:
        raise _failure(name, list(last))


def _failure(name: str, lines: list[str]) -> ImageError:
    """One error out of the end of a build's log."""
    text = "\n".join(lines)
    if _FULL.search(text):
        fix = "make room: mlenv image prune, docker builder prune, or a larger disk"
        return ImageError(f"images.{name}: build", expected="room on the engine's disk", received="no space left on device", fix=fix)
    if package := _NO_PACKAGE.search(text):
        missing = package[1] or package[2]
        fix = "correct the name or the version, or add the wheel to wheels"
        return ImageError(f"images.{name}: build", expected="packages that there are", received=missing, fix=fix)
    failed = next((found[1] for line in lines if (found := _FAILED_STEP.match(line))), "")
    told = [line.removeprefix(f"#{failed} ") for line in lines if failed and line.startswith(f"#{failed} ")]
    printed = [found[1] for line in told if (found := _PRINTED.fullmatch(line))]
    return ImageError(f"images.{name}: build", expected="a build that ends well", received="; ".join((printed or told or lines)[-3:]))


def _mlenv_version(inputs: Inputs) -> str:
    wheels = [path.removeprefix("mlenv/") for path in inputs.files if path.startswith("mlenv/")]
    return wheels[0].split("-")[1] if wheels else inputs.spec.mlenv


def one_line(error: Exception) -> str:
    """What an engine or a registry says, without the line breaks."""
    return " ".join(str(getattr(error, "explanation", "") or error).split())


def git_labels(folder: Path) -> dict[str, str]:
    """The revision that a folder is at, with a plus behind it when files are changed; nothing outside a repository."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    if asked.returncode:
        return {}
    changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=folder, capture_output=True, text=True, check=False).stdout
    return {REVISION: asked.stdout.strip() + ("+" if changed else "")}
