"""A registry and a second engine of this machine, for as long as a test needs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A registry of Debian's package ``docker-registry`` on a free port, which engines trust without TLS; gives HOST:PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = folder / "registry.yml"
    storage = {"filesystem": {"rootdirectory": str(folder / "blobs")}}
    settings.write_text(json.dumps({"version": "0.1", "log": {"level": "error"}, "storage": storage, "http": {"addr": address}}))
    with subprocess.Popen(["docker-registry", "serve", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(lambda: _listens(address), process)
            yield address
        finally:
            process.terminate()


BRIDGE = "mlenv-second"


@contextmanager
def second_engine(size: str = "6g") -> Iterator[Path]:
    """An empty engine in memory, beside the one that runs; gives its folder.

    It has a bridge of its own: told to have none, it would take away that of the other engine.

    ``host_of`` is its DOCKER_HOST.
    """
    home = Path(tempfile.mkdtemp(prefix="mlenv-second."))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "mlenv-second", str(home)], check=True)
    command = [
        *("dockerd", "--data-root", str(home / "data"), "--exec-root", str(home / "exec"), "--pidfile", str(home / "docker.pid")),
        *("--host", host_of(home), "--storage-driver", "overlay2", "--bridge", BRIDGE),
        *("--iptables=false", "--ip-forward=false", "--ip-masq=false"),
    ]
    for words in (
        ("link", "add", BRIDGE, "type", "bridge"),
        ("address", "add", "172.31.255.1/24", "dev", BRIDGE),
        ("link", "set", BRIDGE, "up"),
    ):
        subprocess.run(["ip", *words], check=True)
    try:
        with (home / "dockerd.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process:
            try:
                _wait((home / "docker.sock").exists, process)
                yield home
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait()
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=True)
        _unmount(home)
        home.rmdir()


def host_of(home: Path) -> str:
    return f"unix://{home}/docker.sock"


@contextmanager
def disk_with(free_bytes: int, home: Path) -> Iterator[None]:
    """The disk of a second engine with no more room than this."""
    usage = shutil.disk_usage(home)
    _remount(home, usage.used + free_bytes)
    try:
        yield
    finally:
        _remount(home, usage.total)


def _remount(home: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(home)], check=True)


def _unmount(folder: Path) -> None:
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted((place for place in mounted if place == str(folder) or place.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", place], check=False)


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def _wait(is_there: Any, process: subprocess.Popen[Any], timeout_seconds: float = 30) -> None:
    end = time.monotonic() + timeout_seconds
    while not is_there():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, "did not answer"
        time.sleep(0.05)


def may_start_engines() -> bool:
    """Whether with_engine.sh could start one, so that a test can as well."""
    return "MLENV_ENGINE_FOLDER" in os.environ
