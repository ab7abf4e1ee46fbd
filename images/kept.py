"""The images of mlenv that this machine keeps: what they are, what they hold, which are old."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

from mlenv.errors import ImageError
from mlenv.images.build import INPUTS, NAME, REVISION, TORCH, VERSION, one_line

SBOM: Final = "/opt/venv/sbom.json"


@dataclass(frozen=True)
class KeptImage:
    """An image that mlenv built here or pulled."""

    name: str
    """As it is declared."""
    reference: str
    """Name and tag, or the digest when it has no tag."""
    digest: str
    """As a registry knows it; empty when it was in none."""
    size_bytes: int
    created: str
    labels: dict[str, str]

    def __str__(self) -> str:
        facts = [
            f"{title} {self.labels[key]}"
            for title, key in (("mlenv", VERSION), ("torch", TORCH), ("revision", REVISION))
            if key in self.labels
        ]
        return f"{self.reference}  {self.size_bytes / 1e6:,.0f} MB  {self.created[:16].replace('T', ' ')}  {', '.join(facts)}"


def kept_images(engine: Any) -> list[KeptImage]:
    """Newest first."""
    images = engine.images.list(filters={"label": INPUTS})
    return sorted((kept for image in images for kept in _kept(image)), key=lambda kept: kept.created, reverse=True)


def describe(engine: Any, reference: str) -> KeptImage:
    """One of them.

    Raises:
        ImageError: it is not here.
    """
    return next(_kept(_image(engine, reference)))


def bill_of_materials(engine: Any, reference: str) -> dict[str, Any]:
    """The CycloneDX bill that an image carries.

    Raises:
        ImageError: the image is not here, or carries none.
    """
    import docker

    container = engine.containers.create(_image(engine, reference).id, ["true"])
    try:
        parts, _ = container.get_archive(SBOM)
        with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as archive:
            file = archive.extractfile("sbom.json")
            assert file is not None
            bill: dict[str, Any] = json.load(file)
            return bill
    except docker.errors.APIError as error:
        raise ImageError(reference, expected=f"a bill of materials in {SBOM}", received=one_line(error)) from error
    finally:
        container.remove(force=True)


def old_images(images: Collection[KeptImage], keep: int) -> list[KeptImage]:
    """All but the newest ``keep`` of each name."""
    found: dict[str, int] = {}
    old = []
    for image in sorted(images, key=lambda image: image.created, reverse=True):
        found[image.name] = found.get(image.name, 0) + 1
        if found[image.name] > keep:
            old.append(image)
    return old


def remove(engine: Any, image: KeptImage) -> None:
    """Takes one away.

    Raises:
        ImageError: a container uses it.
    """
    import docker

    try:
        engine.images.remove(image.reference)
    except docker.errors.APIError as error:
        raise ImageError(image.reference, expected="an image that nobody uses", received=one_line(error)) from error


def _image(engine: Any, reference: str) -> Any:
    import docker

    try:
        return engine.images.get(reference)
    except docker.errors.ImageNotFound as error:
        raise ImageError(reference, expected="an image that is here", received="none", fix="mlenv image build, or pull") from error


def _kept(image: Any) -> Iterator[KeptImage]:
    digests = image.attrs["RepoDigests"] or [""]
    for reference in image.tags or [digests[0] or image.id]:
        yield KeptImage(
            name=image.labels.get(NAME, ""),
            reference=reference,
            digest=digests[0],
            size_bytes=image.attrs["Size"],
            created=image.attrs["Created"],
            labels=dict(image.labels),
        )
