"""The bill of materials."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from mlenv.images.sbom import bill, debian_components


def test_the_bill_lists_what_is_installed() -> None:
    found = bill()
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    purls = [component["purl"] for component in found["components"]]
    assert f"pkg:pypi/numpy@{metadata.version('numpy')}" in purls
    assert purls == sorted(purls)
    assert len(set(purls)) == len(purls)


def test_debian_packages_that_are_installed(tmp_path: Path) -> None:
    status = tmp_path / "status"
    installed = "Package: libgomp1\nStatus: install ok installed\nArchitecture: amd64\nVersion: 12.2.0-14+deb12u1\n"
    status.write_text(f"{installed}\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n")
    (component,) = debian_components(status)
    assert component["purl"] == "pkg:deb/debian/libgomp1@12.2.0-14%2Bdeb12u1?arch=amd64"
    assert list(debian_components(tmp_path / "none")) == []
