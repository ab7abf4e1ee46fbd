"""A command inside an image: with its data and output at the same places as outside, and as the user who calls."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from mlenv.errors import ConfigError, ImageError
from mlenv.images.build import one_line

_SIZE: Final = re.compile(r"[1-9][0-9]*[bkmg]?")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    data: Sequence[str] = ()
    """Folders that the command reads. A relative one lies below the image's working folder, an absolute one at the same place."""
    out: Sequence[str] = ()
    """Folders that it writes, made when they are not there."""
    gpus: str = "auto"
    """``auto`` for all that the engine has, ``none``, ``all``, or how many."""
    shared_memory: str = "2g"
    """Of /dev/shm, which processes of one training share; Docker's own 64 MiB are too few."""
    network: str = ""
    """The engine's default when empty."""
    name: str = ""
    """Of the container, by which others on its network find it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    publish: Sequence[str] = ()
    """``PORT`` or ``HOST_PORT:PORT``, open to this machine."""
    memlock: int | None = None
    """Bytes that may be locked in memory, -1 for any number: what NCCL over InfiniBand wants. The engine may not be allowed to."""
    nofile: int | None = None
    """Files open at once."""
    privileged: bool = False

    def __post_init__(self) -> None:
        if self.gpus not in ("auto", "none", "all") and not (self.gpus.isdecimal() and int(self.gpus) > 0):
            raise ConfigError("--gpus", expected="auto, none, all or a number", received=self.gpus)
        if not _SIZE.fullmatch(self.shared_memory):
            raise ConfigError("--shm-size", expected="a size such as 2g", received=self.shared_memory)
        for folder in self.data:
            if not Path(folder).exists():
                raise ConfigError("--data", expected="a folder that is there", received=folder)
        for port in self.publish:
            if not re.fullmatch(r"\d+(:\d+)?", port):
                raise ConfigError("--publish", expected="PORT or HOST_PORT:PORT", received=port)


def run(engine: Any, reference: str, command: Sequence[str], options: RunOptions, out: BinaryIO | None = None) -> int:
    """Runs a command in a new container until it ends, and takes the container away.

    Args:
        command: the image's own when empty.
        out: takes what it prints; this process's output when left out.

    Returns:
        Its exit code.

    Raises:
        ImageError: it could not be started.
    """
    import docker

    try:
        image = engine.images.get(reference)
    except docker.errors.ImageNotFound as error:
        raise ImageError(reference, expected="an image that is here", received="none", fix="mlenv image build, or pull") from error
    working_folder = PurePosixPath(image.attrs["Config"]["WorkingDir"] or "/")
    try:
        container = engine.containers.create(reference, list(command) or None, **container_settings(engine, working_folder, options))
    except docker.errors.APIError as error:
        raise _not_started(reference, error) from error
    try:
        container.start()
        stream = out or sys.stdout.buffer
        with closing(container.logs(stream=True, follow=True)) as output:
            for part in output:
                stream.write(part)
                stream.flush()
        return int(container.wait()["StatusCode"])
    except docker.errors.APIError as error:
        raise _not_started(reference, error) from error
    finally:
        container.remove(force=True)


def container_settings(engine: Any, working_folder: PurePosixPath, options: RunOptions) -> dict[str, Any]:
    """What the docker SDK is told."""
    import docker

    for folder in options.out:
        Path(folder).mkdir(parents=True, exist_ok=True)
    limits = {"memlock": options.memlock, "nofile": options.nofile}
    mounted = [(folder, False) for folder in options.out] + [(folder, True) for folder in options.data]
    return {
        "user": f"{os.getuid()}:{os.getgid()}",
        "init": True,
        "shm_size": options.shared_memory,
        "environment": dict(options.environment),
        "mounts": [
            docker.types.Mount(str(working_folder / folder), str(Path(folder).resolve()), type="bind", read_only=read_only)
            for folder, read_only in mounted
        ],
        "ports": dict(_published(port) for port in options.publish),
        "ulimits": [docker.types.Ulimit(name=name, soft=limit, hard=limit) for name, limit in limits.items() if limit is not None],
        "device_requests": _gpus(engine, options.gpus),
        "privileged": options.privileged,
        **({"network": options.network} if options.network else {}),
        **({"name": options.name, "hostname": options.name} if options.name else {}),
    }


def _published(port: str) -> tuple[str, tuple[str, int]]:
    outside, _, inside = port.rpartition(":")
    return f"{inside}/tcp", ("127.0.0.1", int(outside or inside))


def _gpus(engine: Any, wanted: str) -> list[Any]:
    import docker

    if wanted == "none" or (wanted == "auto" and "nvidia" not in engine.info().get("Runtimes", {})):
        return []
    count = int(wanted) if wanted.isdecimal() else -1
    return [docker.types.DeviceRequest(count=count, capabilities=[["gpu"]])]


def _not_started(reference: str, error: Exception) -> ImageError:
    reason = one_line(error)
    fixes = {
        "rlimit": "leave out --memlock and --nofile: this engine may not raise them",
        "apply caps": "leave out --privileged: this engine may not give it",
        "gpu": "--gpus none, or install NVIDIA's container toolkit on this machine",
        "Conflict": "choose another --name",
    }
    fix = next((fix for word, fix in fixes.items() if word in reason), "")
    return ImageError(reference, expected="a container that starts", received=reason, fix=fix)
