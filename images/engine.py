"""The container engine of this machine: who answers, and which client builds with BuildKit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlenv.errors import ImageError, require

DOCKER: Final = "MLENV_DOCKER"
"""Environment variable that names the docker client to build with."""
_DEBIAN_CLIENT: Final = "/usr/bin/docker"
_LAST_WITH_BUILDKIT: Final = 22
"""From its next major version on, the docker client builds with BuildKit only through its plugin buildx."""

_TIMEOUT_SECONDS: Final = 600
"""Without a byte. A registry may think for minutes about a large layer."""


@dataclass(frozen=True)
class Builder:
    """A docker client that builds with BuildKit."""

    command: tuple[str, ...]
    """What comes before the options of a build."""
    environment: Mapping[str, str]


def connect() -> Any:
    """The engine, by the docker SDK: the one of DOCKER_HOST, or this machine's.

    Raises:
        ImageError: none answers.
    """
    docker = require("docker", extra="images")
    try:
        engine = docker.from_env(timeout=_TIMEOUT_SECONDS)
        engine.ping()
    except docker.errors.DockerException as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        reason = " ".join(str(error).split())
        raise ImageError(
            "engine", expected=f"a container engine at {where}", received=reason, fix="start Docker, or set DOCKER_HOST"
        ) from error
    return engine


def find_builder() -> Builder:
    """The first client that builds with BuildKit: MLENV_DOCKER, or else docker on PATH, or Debian's.

    Raises:
        ImageError: none does.
    """
    looked_at = []
    for client in _clients():
        if _says(client, "buildx", "version"):
            return Builder((client, "buildx", "build", "--load"), {})
        version = _says(client, "--version").removeprefix("Docker version ").partition(",")[0]
        major = version.partition(".")[0]
        if major.isdecimal() and int(major) <= _LAST_WITH_BUILDKIT:
            return Builder((client, "build"), {"DOCKER_BUILDKIT": "1"})
        looked_at.append(f"{client} {version} without buildx" if version else f"{client}, which does not start")
    raise ImageError(
        "docker",
        expected="a docker client that builds with BuildKit",
        received=", ".join(looked_at) or "no client",
        fix=f"install docker-buildx, or name a client with {DOCKER}",
    )


def _clients() -> Iterator[str]:
    if named := os.environ.get(DOCKER):
        yield named
        return
    found = [shutil.which("docker"), _DEBIAN_CLIENT]
    yield from dict.fromkeys(client for client in found if client and Path(client).exists())


def _says(*command: str) -> str:
    """What a command prints; nothing when it fails."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
