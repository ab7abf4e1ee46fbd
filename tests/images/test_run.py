"""Commands in images: mounts, user, limits, exit code; images to a registry and back."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import docker
import pytest
from image_servers import disk_with, host_of, may_start_engines, registry, second_engine

from mlenv.cli import main
from mlenv.errors import ConfigError, ImageError
from mlenv.images.build import BuildOptions, Image, build
from mlenv.images.engine import connect
from mlenv.images.inputs import Inputs
from mlenv.images.run import RunOptions, container_settings, run
from mlenv.images.transfer import pull, push

Repo = Callable[..., Path]
Packed = Callable[[Path], tuple[Inputs, Path]]
Built = Callable[..., tuple[Image, list[str]]]


class Engine:
    """What an engine says of its runtimes."""

    def __init__(self, *runtimes: str) -> None:
        self.runtimes = runtimes

    def info(self) -> dict[str, Any]:
        return {"Runtimes": dict.fromkeys(self.runtimes)}


def test_settings_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "ads"
    data.mkdir()
    options = RunOptions(data=[str(data)], out=["work/run"], memlock=-1, publish=["8080", "9000:80"], name="trainer")
    settings = container_settings(Engine("runc"), PurePosixPath("/app"), options)
    assert [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in settings["mounts"]] == [
        (str(tmp_path / "work/run"), "/app/work/run", False),
        (str(data), str(data), True),
    ]
    assert (tmp_path / "work/run").is_dir()
    assert settings["user"] == f"{os.getuid()}:{os.getgid()}"
    assert settings["ulimits"] == [docker.types.Ulimit(name="memlock", soft=-1, hard=-1)]
    assert settings["ports"] == {"8080/tcp": ("127.0.0.1", 8080), "80/tcp": ("127.0.0.1", 9000)}
    assert settings["hostname"] == "trainer"


@pytest.mark.parametrize(
    ("wanted", "runtimes", "count"),
    [("auto", ("runc",), 0), ("auto", ("nvidia",), -1), ("none", ("nvidia",), 0), ("2", ("runc",), 2), ("all", (), -1)],
)
def test_gpus(wanted: str, runtimes: tuple[str, ...], count: int) -> None:
    requests = container_settings(Engine(*runtimes), PurePosixPath("/"), RunOptions(gpus=wanted))["device_requests"]
    assert [request["Count"] for request in requests] == ([count] if count else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": "some"}, "--gpus: expected auto, none, all or a number"),
        ({"shared_memory": "much"}, "--shm-size"),
        ({"data": ["nowhere"]}, "--data: expected a folder that is there"),
        ({"publish": ["http"]}, "--publish"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunOptions(**options)


@pytest.mark.engine
def test_a_command_runs_as_its_caller(engine: Any, repo: Repo, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repo()
    image, _ = built(folder)
    monkeypatch.chdir(folder)
    (folder / "ads").mkdir()
    (folder / "ads" / "day").write_text("rows")
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    (folder / "work").mkdir()
    os.chown(folder / "work", 1234, 1234)
    out = io.BytesIO()
    command = ["sh", "-c", "id; cat ads/day > work/copy; touch ads/more; echo $WHO; exit 7"]
    options = RunOptions(data=["ads"], out=["work"], environment={"WHO": "me"}, network="none")
    assert run(engine, image.reference, command, options, out) == 7
    printed = out.getvalue().decode()
    assert "uid=1234" in printed
    assert "ads/more: Read-only file system" in printed
    assert "\nme\n" in printed
    assert (folder / "work" / "copy").read_text() == "rows"
    assert (folder / "work" / "copy").stat().st_uid == 1234
    assert not engine.containers.list(all=True, filters={"ancestor": image.reference})


@pytest.mark.engine
def test_what_the_engine_refuses(engine: Any, repo: Repo, built: Built) -> None:
    image, _ = built(repo())
    assert run(engine, image.reference, ["nowhere"], RunOptions(), io.BytesIO()) == 127
    with pytest.raises(ImageError, match=r"Fix: --gpus none"):
        run(engine, image.reference, ["true"], RunOptions(gpus="all"))
    with pytest.raises(ImageError, match=r"tiny:none: expected an image that is here"):
        run(engine, "tiny:none", ["true"], RunOptions())


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[str]:
    if not shutil.which("docker-registry"):
        assert os.environ.get("MLENV_REQUIRE_ENGINE") != "1"
        pytest.skip("docker-registry is not installed")
    with registry(tmp_path) as address:
        yield address


@pytest.mark.engine
@pytest.mark.slow
def test_an_image_goes_to_a_registry_and_to_another_engine(
    engine: Any, repo: Repo, built: Built, registered: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = repo()
    image, _ = built(folder, registry=f"{registered}/team")
    digest = push(engine, image.reference, log=lambda line: None)
    assert digest.startswith(f"{registered}/team/tiny@sha256:")
    engine.images.remove(image.reference, force=True)

    again, log = built(folder, registry=f"{registered}/team")
    assert again == Image(image.reference, is_remote=True)
    assert log == []
    pull(engine, digest)

    if not may_start_engines():
        return
    with second_engine("1g") as home:
        monkeypatch.setenv("DOCKER_HOST", host_of(home))
        assert main(["image", "pull", digest]) == 0
        assert main(["image", "run", digest, "--network", "none", "--", "python", "-c", "import my_ranker.model as m; print(m.WIDTH)"]) == 0
        assert capfdbinary.readouterr().out.splitlines()[-1] == b"8"
        assert main(["image", "list"]) == 0
        assert capfdbinary.readouterr().out.startswith(digest.encode())


@pytest.mark.engine
def test_a_push_that_is_refused(engine: Any, repo: Repo, built: Built, python_base: str) -> None:
    image, _ = built(repo(), registry="127.0.0.1:1/team")
    with pytest.raises(ImageError, match=r"expected a registry that takes it\. Received: .*Fix: log in with docker login"):
        push(engine, image.reference, log=lambda line: None)
    with pytest.raises(ImageError, match="expected an image that mlenv built and tried out"):
        push(engine, python_base)
    with pytest.raises(ImageError, match=r"127\.0\.0\.1:1/team/tiny:no: expected an image that the registry has"):
        pull(engine, "127.0.0.1:1/team/tiny:no")


@pytest.mark.engine
@pytest.mark.slow
def test_a_full_disk(engine: Any, python_base: str, repo: Repo, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an engine of its own: others build on this one."""
    if not may_start_engines():
        pytest.skip("the disk of an engine is filled that a test started")
    folder = repo()
    (folder / "my_ranker" / "weights").write_bytes(os.urandom(8 << 20))
    base = b"".join(engine.images.get(python_base).save(named=True))
    with second_engine("1g") as home:
        monkeypatch.setenv("DOCKER_HOST", host_of(home))
        with closing(connect()) as small:
            small.images.load(base)
            inputs, context = packed(folder)
            options = BuildOptions(network="none")
            with disk_with(4 << 20, home), pytest.raises(ImageError, match=r"expected room on the engine's disk.*Fix: make room"):
                build(small, inputs, context, options, log=lambda line: None)
            assert [image.tags for image in small.images.list()] == [[python_base]]
            assert build(small, inputs, context, options, log=lambda line: None).is_new
