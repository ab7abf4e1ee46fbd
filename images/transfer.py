"""Images to a registry and back. A digest says which one it was."""

from __future__ import annotations

from typing import Any

from mlenv.errors import ImageError
from mlenv.images.build import INPUTS, Log, find, one_line


def push(engine: Any, reference: str, log: Log = print) -> str:
    """Sends an image that ``build`` named, which it does after the smoke test alone.

    Returns:
        Its name with the digest that the registry gave it.

    Raises:
        ImageError: there is no such image, or the registry refuses it.
    """
    import docker

    image = find(engine, reference)
    if image is None:
        raise ImageError(reference, expected="an image that is here", received="none", fix="mlenv image build")
    if INPUTS not in image.labels:
        raise ImageError(reference, expected="an image that mlenv built and tried out", received="another one", fix="mlenv image build")
    name, _, tag = reference.rpartition(":")
    fix = "log in with docker login, or name a registry with --registry"
    digest = ""
    try:
        for line in engine.images.push(name, tag=tag, stream=True, decode=True):
            if "error" in line:  # the SDK raises nothing
                raise ImageError(reference, expected="a registry that takes it", received=one_line(ValueError(line["error"])), fix=fix)
            digest = line.get("aux", {}).get("Digest", digest)
            if line.get("status") and "progressDetail" not in line:
                log(line["status"])
    except docker.errors.APIError as error:
        raise ImageError(reference, expected="a registry that takes it", received=one_line(error), fix=fix) from error
    return f"{name}@{digest}"


def pull(engine: Any, reference: str) -> Any:
    """Fetches an image by tag or by digest, and gives it its tag when it has one.

    Raises:
        ImageError: the registry has no such image.
    """
    import docker

    try:
        return engine.images.pull(reference)
    except docker.errors.APIError as error:
        fix = "mlenv image push it first, or log in with docker login"
        raise ImageError(reference, expected="an image that the registry has", received=one_line(error), fix=fix) from error
