"""Asks a build service for an image."""

from __future__ import annotations

import http.client
import json
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from mlenv.errors import ImageError
from mlenv.images.build import Log
from mlenv.images.inputs import Inputs

_TIMEOUT_SECONDS: Final = 600
"""Without a byte. A step of a build may be silent for minutes."""


def build_at(service: str, token: str, inputs: Inputs, context: Path, *, labels: Mapping[str, str], log: Log = print) -> str:
    """Has an image built, or learns that it is there; its files are sent only when nobody sent them before.

    Args:
        service: address of ``mlenv image serve``.
        context: folder of the files of the inputs.
        labels: see ``mlenv.images.build.build``.

    Returns:
        Where the image can be had.

    Raises:
        ImageError: the service is away, refuses the request, or the build failed.
    """
    client = _Client(service.rstrip("/"), token)
    announced = json.dumps({"inputs": inputs.to_plain(), "labels": dict(labels)}).encode()
    job = client.ask("POST", "/builds", announced)
    if job["state"] == "wanted":
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as opened:
                for path in sorted(inputs.files):
                    opened.add(context / path, path, recursive=False)
            size = archive.tell()
            if size > job["max_context_bytes"]:
                fix = "leave out files or wheels, or start the service with a larger --max-context-mb"
                raise ImageError(service, expected=f"at most {job['max_context_bytes']:,} bytes of files", received=f"{size:,}", fix=fix)
            archive.seek(0)
            job = client.ask("PUT", f"/builds/{job['id']}/context", archive, size)
    if job["state"] != "built":
        with client.answer("GET", f"/builds/{job['id']}/log") as lines:
            for line in lines:
                log(line.decode(errors="replace").rstrip())
        job = client.ask("GET", f"/builds/{job['id']}")
    if job["state"] != "built":
        raise ImageError(f"{service}: {job['reference']}", expected="a build that ends well", received=job["error"] or job["state"])
    return str(job["image"])


class _Client:
    def __init__(self, service: str, token: str) -> None:
        self.service, self.token = service, token

    def ask(self, method: str, path: str, body: bytes | BinaryIO | None = None, size: int | None = None) -> dict[str, Any]:
        with self.answer(method, path, body, size) as answer:
            plain: dict[str, Any] = json.load(answer)
            return plain

    @contextmanager
    def answer(self, method: str, path: str, body: Any = None, size: int | None = None) -> Iterator[http.client.HTTPResponse]:
        headers = {"Authorization": f"Bearer {self.token}"} | ({} if size is None else {"Content-Length": str(size)})
        try:
            request = urllib.request.Request(self.service + path, body, headers, method=method)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error.read())
            raise ImageError(self.service, expected="a service that takes the request", received=f"{error.code}: {message}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            fix = "start mlenv image serve there, or name its address"
            raise ImageError(self.service, expected="a build service that answers", received=str(error), fix=fix) from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
