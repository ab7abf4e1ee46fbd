"""What is installed in an image, as a CycloneDX bill of materials. Run inside it: ``python -m mlenv.images.sbom``.

Written with the standard library alone: an image need not hold a package that lists packages.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

SPEC_VERSION: Final = "1.6"
DPKG_STATUS: Final = Path("/var/lib/dpkg/status")


def bill() -> dict[str, Any]:
    """The whole bill: Python packages and Debian packages, sorted, without a date, so that the same image has the same one."""
    components = {component["purl"]: component for component in (*python_components(), *debian_components(DPKG_STATUS))}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {"tools": {"components": [{"type": "application", "name": "mlenv", "version": metadata.version("mlenv")}]}},
        "components": [components[purl] for purl in sorted(components)],
    }


def python_components() -> Iterator[dict[str, Any]]:
    for distribution in metadata.distributions():
        headers = distribution.metadata
        name, version = re.sub(r"[-_.]+", "-", headers["Name"]).lower(), distribution.version
        known = [{"expression": value} for value in headers.get_all("License-Expression", [])[:1]]
        yield _component(name, version, f"pkg:pypi/{quote(name)}@{quote(version)}") | ({"licenses": known} if known else {})


def debian_components(status: Path) -> Iterator[dict[str, Any]]:
    """Debian packages that are installed, out of dpkg's own file; none where there is no dpkg."""
    text = status.read_text(errors="replace") if status.exists() else ""
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            yield _component(name, version, f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={fields['Architecture']}")


def _component(name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
