"""An engine for the tests marked so, a base image without a registry, and a repo with a small image in it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from mlenv.errors import ImageError
from mlenv.images.build import INPUTS, BuildOptions, Image, build
from mlenv.images.declared import find_image
from mlenv.images.inputs import Inputs, pack
from mlenv.images.mlenv_wheel import copy_wheel

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SESSION_LABEL, SESSION = "org.example.session", uuid.uuid4().hex
"""Marks the images of this process: others may use the same engine."""
BASE = f"mlenv-test/python:{PYTHON}"


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The engine of DOCKER_HOST, or this machine's; tests/images/with_engine.sh COMMAND starts one. Its images are taken away."""
    from mlenv.images.engine import connect, find_builder

    try:
        connected = connect()
        find_builder()
    except ImageError as error:
        reason = os.environ.get("MLENV_NO_ENGINE") or str(error)
        if os.environ.get("MLENV_REQUIRE_ENGINE") == "1":
            pytest.fail(f"an engine is required: {reason}")
        pytest.skip(f"no engine: {reason}. Fix: tests/images/with_engine.sh .venv/bin/pytest ...")
    yield connected
    for image in connected.images.list(filters={"label": INPUTS}):
        if image.labels.get(SESSION_LABEL) == SESSION:
            connected.images.remove(image.id, force=True)
    connected.close()


@pytest.fixture(autouse=True)
def alone_on_the_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that count images or builds are not disturbed by those of another worker, which has its folder beside ours."""
    if request.node.get_closest_marker("engine") is None:
        yield
        return
    with (tmp_path_factory.getbasetemp().parent / "engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def python_base(engine: Any) -> str:
    """An image of this machine's Python, made once."""
    if BASE not in [tag for image in engine.images.list() for tag in image.tags]:
        script = ROOT / "tests/images/python_base.sh"
        subprocess.run([script, BASE], check=True, env={**os.environ, "PYTHON": sys.executable})
    return BASE


@pytest.fixture(scope="session")
def session_labels() -> dict[str, str]:
    """Labels of an image that is to be taken away at the end."""
    return {SESSION_LABEL: SESSION}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlenv, as an image gets it."""
    made = copy_wheel("", tmp_path_factory.mktemp("wheel of mlenv") / "mlenv")
    assert made is not None
    return made


@pytest.fixture(scope="session")
def everything_left_out() -> list[str]:
    """What mlenv asks for: a small image has none of it."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [Requirement(line).name for line in lines]


@pytest.fixture
def repo(tmp_path: Path, wheel: Path, everything_left_out: list[str]) -> Callable[..., Path]:
    """A model repo that declares the image ``tiny``; keys as given, or left as they are."""

    def make(**keys: Any) -> Path:
        folder = tmp_path / "model repo"
        (folder / "my_ranker").mkdir(parents=True, exist_ok=True)
        (folder / "my_ranker" / "model.py").write_text("WIDTH = 8\n")
        tiny = {
            "base": BASE,
            "python": PYTHON,
            "mlenv": str(wheel),
            "left_out": everything_left_out,
            "files": ["my_ranker"],
            "smoke_test": ["python", "-c", "import mlenv, my_ranker.model"],
            "labels": {SESSION_LABEL: SESSION},
        }
        (folder / "mlenv.yaml").write_text(yaml.safe_dump({"images": {"tiny": {**tiny, **keys}}}))
        return folder

    return make


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[Path], tuple[Inputs, Path]]:
    """The inputs of a repo's image ``tiny``, and their context."""
    count = iter(range(100))

    def pack_it(folder: Path) -> tuple[Inputs, Path]:
        context = tmp_path / f"context {next(count)}"
        return pack(find_image(folder, "tiny"), context), context

    return pack_it


@pytest.fixture
def built(engine: Any, python_base: str, packed: Callable[[Path], tuple[Inputs, Path]]) -> Callable[..., tuple[Image, list[str]]]:
    """Builds a repo's image ``tiny`` without a network; the image and the log."""

    def build_it(folder: Path, **options: Any) -> tuple[Image, list[str]]:
        log: list[str] = []
        inputs, context = packed(folder)
        return build(engine, inputs, context, BuildOptions(network="none", **options), log=log.append), log

    return build_it
