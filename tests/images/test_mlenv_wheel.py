"""The wheel of the mlenv that runs, from its checkout or from where it is installed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from mlenv.errors import ConfigError
from mlenv.images import mlenv_wheel
from mlenv.images.mlenv_wheel import copy_wheel, unmet_requirements


def test_an_installed_mlenv_is_packed_as_it_came(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        came = {name: archive.read(name) for name in archive.namelist()}
    record = next(site.glob("mlenv-*.dist-info/RECORD"))
    record.write_text(record.read_text() + "../bin/mlenv,,\nmlenv/__pycache__/cli.pyc,,\n" + f"{record.parent.name}/INSTALLER,,\n")
    (record.parent / "INSTALLER").write_text("pip")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(mlenv_wheel, "HOME", site)
    packed = copy_wheel("", tmp_path / "out")
    assert packed is not None
    assert packed.name == wheel.name
    with zipfile.ZipFile(packed) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    own = f"{record.parent.name}/RECORD"
    assert sorted(found.pop(own).decode().splitlines()) == sorted(came.pop(own).decode().splitlines())
    assert found == came


def test_what_mlenv_asks_for_is_read_from_its_wheel(wheel: Path, everything_left_out: list[str]) -> None:
    assert list(unmet_requirements(wheel, {}, everything_left_out)) == []
    problems = list(unmet_requirements(wheel, {"numpy": "1.0"}, [name for name in everything_left_out if name not in ("numpy", "torch")]))
    assert sorted(str(problem.received) for problem in problems) == ["no such package", "numpy==1.0"]


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlenv: expected a wheel, a checkout of mlenv, or a version"):
        copy_wheel(str(tmp_path), tmp_path / "out")
    (tmp_path / "pyproject.toml").write_text("[build-system]\n")
    with pytest.raises(ConfigError, match=r"mlenv: expected a wheel from .*Fix: pip install hatchling"):
        copy_wheel(str(tmp_path), tmp_path / "out")
