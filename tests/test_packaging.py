"""What is built from the repo installs and imports, and the lock holds what pyproject.toml asks for."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("modules", "datasets", "loops", "images", "ci")


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


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with nothing but the wheel."""
    environment = tmp_path_factory.mktemp("installed") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(built.wheel)], check=True, capture_output=True)
    return python


@pytest.mark.slow
def test_wheel_imports_in_an_empty_environment(built: Built, installed: Path, tmp_path: Path) -> None:
    """A clean machine with nothing but the wheel: mlenv itself must not need its dependencies to be imported."""
    code = "import mlenv; print(mlenv.__version__, mlenv.__file__)"
    printed = subprocess.run([installed, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    version, place = printed.split(maxsplit=1)
    assert f"mlenv-{version}-" in built.wheel.name
    assert Path(place.strip()).is_relative_to(installed.parent.parent)


@pytest.fixture
def model_repo(installed: Path, tmp_path: Path) -> Iterator[Path]:
    """A repo that ``mlenv init`` of the wheel made, in an environment that has the wheel's dependencies as well."""
    (site,) = installed.parent.parent.glob("lib/python*/site-packages")
    dependencies = site / "dependencies.pth"
    dependencies.write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    repo = tmp_path / "first_ranker"
    subprocess.run([installed, "-m", "mlenv", "init", str(repo)], check=True, capture_output=True)
    (repo / ".venv").symlink_to(installed.parent.parent)
    yield repo
    dependencies.unlink()


def run_stages(repo: Path, *names: str, with_setup: bool) -> dict[str, str]:
    """Runs the shell steps of the pipeline as GitHub does, from the file that it reads; gives what each stage printed."""
    jobs = yaml.safe_load((repo / ".github/workflows/ci.yml").read_text())["jobs"]
    printed = {}
    for name in names:
        (script,) = (step["run"] for step in jobs[name]["steps"] if "run" in step)
        if not with_setup:
            script = script.removeprefix("make install\n")
            assert "make install" not in script
        process = subprocess.run(
            ["bash", "-e", "-c", script], cwd=repo, env=os.environ | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stdout + process.stderr
        printed[name] = process.stdout
    return printed


@pytest.mark.slow
def test_a_model_repo_is_green_from_its_first_commit(model_repo: Path) -> None:
    """What its pipeline runs for a change: ``make lint``, ``make test``, ``make demo`` with few steps."""
    printed = run_stages(model_repo, "lint", "test", "smoke", with_setup=False)
    assert "All checks passed!" in printed["lint"]
    assert "2 passed" in printed["test"]
    assert "trained 20 steps -> work/first_ranker" in printed["smoke"]
    assert (model_repo / "work/first_ranker/report.html").is_file()


@pytest.mark.long
def test_a_model_repo_trains_and_promotes_at_night(model_repo: Path) -> None:
    """The other stages that need no container engine, each after the installation."""
    printed = run_stages(model_repo, "typecheck", "retrain", "promote", with_setup=True)
    assert "no issues found" in printed["typecheck"]
    assert "first_ranker version 1 (@challenger)" in printed["retrain"]
    assert "champion first_ranker version 1" in printed["promote"]
    assert (model_repo / "work/promotion/promotion.html").is_file()


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
