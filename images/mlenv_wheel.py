"""The wheel of mlenv that goes into an image: a given one, one of a checkout, or the mlenv that runs."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Final

from mlenv.errors import ConfigError

HOME: Final = Path(__file__).absolute().parents[2]
"""The folder that mlenv is imported from: a checkout, or site-packages. Not resolved: images/ is linked into the package."""


def copy_wheel(source: str, folder: Path) -> Path | None:
    """Puts the wheel into a folder.

    Args:
        source: see ImageSpec.mlenv.

    Returns:
        None for a version that is downloaded.

    Raises:
        ConfigError: there is no wheel, or none can be made.
    """
    if source.endswith(".whl"):
        if not Path(source).is_file():
            raise ConfigError("mlenv", expected="a wheel that is there", received=source)
        folder.mkdir()
        return Path(shutil.copy2(source, folder))
    if Path(source).is_absolute():
        return _built(Path(source), folder)
    if source:
        return None
    return _built(HOME, folder) if (HOME / "pyproject.toml").is_file() else _packed_again(folder)


def unmet_requirements(wheel: Path, pinned: Mapping[str, str], left_out: Collection[str]) -> Iterator[ConfigError]:
    """Packages that mlenv asks for and that the pins do not give it.

    Args:
        pinned: versions by package.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(archive.read(name).decode())
    for requirement in map(Requirement, headers.get_all("Requires-Dist", [])):
        package = canonicalize_name(requirement.name)
        if package in left_out or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if package not in pinned:
            fix = f"add {package} to the lock, or name it in left_out"
            yield ConfigError("lock", expected=f"{requirement}, which mlenv asks for", received="no such package", fix=fix)
        elif not requirement.specifier.contains(pinned[package], prereleases=True):
            yield ConfigError("lock", expected=f"{requirement}, which mlenv asks for", received=f"{package}=={pinned[package]}")


def _built(checkout: Path, folder: Path) -> Path:
    if not (checkout / "pyproject.toml").is_file():
        raise ConfigError("mlenv", expected="a wheel, a checkout of mlenv, or a version", received=str(checkout))
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder.absolute())]
    made = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if made.returncode or len(wheels) != 1:
        last = (made.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ConfigError(
            "mlenv", expected=f"a wheel from {checkout}", received=last, fix="pip install hatchling editables, or name a wheel"
        )
    return wheels[0]


def _packed_again(folder: Path) -> Path:
    """The installed mlenv as the wheel that it came in, without what the installer added."""
    distribution = metadata.distribution("mlenv")
    folder.mkdir()
    wheel = folder / f"mlenv-{distribution.version}-py3-none-any.whl"
    record, added = [], ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(distribution.files or (), key=str):
            if ".." in file.parts or "__pycache__" in file.parts or file.name in added:
                continue
            content = Path(str(file.locate())).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{file},sha256={digest},{len(content)}")
            archive.writestr(zipfile.ZipInfo(str(file)), content)
        name = f"mlenv-{distribution.version}.dist-info/RECORD"
        archive.writestr(zipfile.ZipInfo(name), "\n".join([*record, f"{name},,", ""]))
    return wheel
