"""Which docker client builds, and no engine at all."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from mlenv.cli import main
from mlenv.errors import ImageError
from mlenv.images.engine import Builder, connect, find_builder


def client(folder: Path, version: str, *, buildx: bool) -> str:
    """A docker client as far as it is asked: its version, and whether it has the plugin."""
    folder.mkdir()
    file = folder / "docker"
    file.write_text(
        f'#!/bin/sh\ncase $1 in\n  buildx) exit {0 if buildx else 1};;\n  *) echo "Docker version {version}, build 1";;\nesac\n'
    )
    if buildx:
        file.write_text(file.read_text().replace("buildx) exit 0", "buildx) echo v0.20; exit 0"))
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("version", "buildx", "expected"),
    [
        ("28.2.2", True, (("buildx", "build", "--load"), {})),
        ("20.10.24+dfsg1", False, (("build",), {"DOCKER_BUILDKIT": "1"})),
        ("22.06", False, (("build",), {"DOCKER_BUILDKIT": "1"})),
    ],
)
def test_clients_that_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, buildx: bool, expected: tuple[tuple[str, ...], dict[str, str]]
) -> None:
    file = client(tmp_path / "bin", version, buildx=buildx)
    monkeypatch.setenv("MLENV_DOCKER", file)
    assert find_builder() == Builder((file, *expected[0]), expected[1])


def test_a_client_that_builds_with_a_plugin_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLENV_DOCKER", client(tmp_path / "bin", "28.2.2", buildx=False))
    with pytest.raises(
        ImageError, match=r"docker: expected a docker client that builds with BuildKit\. Received: '.* 28\.2\.2 without buildx'\. Fix"
    ):
        find_builder()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves the socket that nobody answered open
def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(
        ImageError, match=r"engine: expected a container engine at unix://.*none\.sock.*Fix: start Docker, or set DOCKER_HOST"
    ):
        connect()
    assert main(["image", "list"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    gc.collect()  # here and not in another test
