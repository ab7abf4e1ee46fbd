"""What is built from the repo installs and imports, and the lock holds what pyproject.toml asks for."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("modules", "datasets", "loops", "images")


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


def build(source: Path, out: Path, *targets: str) -> None:
    """Builds with the installed hatchling, so that nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *targets, str(source)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def files_of(wheel: Path) -> list[str]:
    return sorted(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out, "--wheel", "--sdist")
    return Built(wheel=next(out.glob("*.whl")), sdist=next(out.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_wheel_holds_every_source_once_and_nothing_else(built: Built) -> None:
    files = files_of(built.wheel)
    assert len(files) == len(set(files))
    sources = {path.relative_to(ROOT) for path in (ROOT / "mlenv").rglob("*") if path.is_file()}
    sources |= {Path("mlenv") / path.relative_to(ROOT) for folder in LINKED for path in (ROOT / folder).rglob("*") if path.is_file()}
    packed = [file for file in files if ".dist-info/" not in file]
    assert packed == sorted(source.as_posix() for source in sources if "__pycache__" not in source.parts)
    assert "mlenv/py.typed" in packed


def test_wheel_from_the_sdist_is_the_same(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "dist", "--wheel")
    assert files_of(next((tmp_path / "dist").glob("*.whl"))) == files_of(built.wheel)


@pytest.mark.slow
def test_wheel_imports_in_an_empty_environment(built: Built, tmp_path: Path) -> None:
    """A clean machine with nothing but the wheel: mlenv itself must not need its dependencies to be imported."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([python, *install, built.wheel], check=True, capture_output=True)
    code = "import mlenv; print(mlenv.__version__, mlenv.__file__)"
    printed = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    version, place = printed.split(maxsplit=1)
    assert f"mlenv-{version}-" in built.wheel.name
    assert Path(place.strip()).is_relative_to(tmp_path / "empty")


def test_lock_holds_what_pyproject_asks_for(locked: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = project["project"]
    tables = [project["build-system"]["requires"], package["dependencies"], *package["optional-dependencies"].values()]
    for requirement in (Requirement(line) for table in tables for line in table):
        name = "fbgemm-gpu-cpu" if requirement.name == "fbgemm-gpu" else canonicalize_name(requirement.name)
        if name != package["name"]:
            assert locked[name] in requirement.specifier, f"run make lock: {requirement}"


def test_lock_runs_on_a_cpu(locked: dict[str, str]) -> None:
    assert list(locked) == sorted(locked)
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-")) or name in ("fbgemm-gpu", "triton")]
    assert not [version for version in locked.values() if "+" in version]


def test_the_lock_is_the_first_row_of_the_compatibility_table(locked: dict[str, str]) -> None:
    row = yaml.safe_load((ROOT / "images" / "compatibility.yaml").read_text())[0]
    versions = {"torch": row["torch"], "torchrec": row["torchrec"], row["packages"]["cpu"]: row["fbgemm"]}
    assert {name: locked[name] for name in versions} == versions
