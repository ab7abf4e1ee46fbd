"""Builds for others, over HTTP, with a real engine behind it."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlenv.errors import ConfigError, ImageError
from mlenv.images.build import BuildOptions
from mlenv.images.build_client import build_at
from mlenv.images.build_service import ServiceOptions, make_app, read_tokens
from mlenv.images.inputs import Inputs

Repo = Callable[..., Path]
Packed = Callable[[Path], tuple[Inputs, Path]]

TOKEN = "a-token-of-this-test"


@pytest.fixture
def service(engine: Any, python_base: str, tmp_path: Path) -> Iterator[str]:
    """The address of one that takes small uploads, and one build behind the one under way."""
    import uvicorn

    folder = tmp_path / "service"
    folder.mkdir()
    options = ServiceOptions(
        folder=folder, tokens=(TOKEN,), max_queue=1, max_context_bytes=5 << 20, build=BuildOptions(network="none", timeout_minutes=5)
    )
    server = uvicorn.Server(uvicorn.Config(make_app(engine, options), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def ask(service: str, method: str, path: str, body: bytes | None = None, token: str = TOKEN) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(service + path, body, {"Authorization": f"Bearer {token}"} if token else {}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def upload_of(service: str, path: str, size: int) -> int:
    """The answer to an upload of this size that is announced, and not sent."""
    connection = http.client.HTTPConnection(service.removeprefix("http://"))
    with closing(connection):
        connection.putrequest("PUT", path)
        for name, value in (("Authorization", f"Bearer {TOKEN}"), ("Content-Length", str(size))):
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status


def announced(inputs: Inputs) -> bytes:
    return json.dumps({"inputs": inputs.to_plain(), "labels": {}}).encode()


@pytest.mark.engine
@pytest.mark.slow
def test_two_clients_get_one_build_and_a_failed_one_holds_up_nobody(service: str, engine: Any, repo: Repo, packed: Packed) -> None:
    failing, failing_context = packed(repo(smoke_test=["python", "-c", "raise SystemExit('it is broken')"]))
    inputs, context = packed(repo(environment={"SERVICE": "one build"}))
    logs: list[list[str]] = [[], []]
    with ThreadPoolExecutor(3) as clients:
        broken = clients.submit(build_at, service, TOKEN, failing, failing_context, labels={}, log=lambda line: None)
        while ask(service, "POST", "/builds", announced(failing))[1]["state"] == "wanted":
            time.sleep(0.01)
        both = [clients.submit(build_at, service, TOKEN, inputs, context, labels={"team": "ads"}, log=log.append) for log in logs]
        names = [client.result() for client in both]
        with pytest.raises(ImageError, match=r"smoke test .*it is broken"):
            broken.result()
    assert names[0] == names[1]
    assert engine.images.get(names[0]).labels["team"] == "ads"
    assert logs[0] == logs[1]  # of the one build
    assert sum("COPY files /app" in line for line in logs[0]) == 1

    start = time.perf_counter()
    again: list[str] = []
    assert build_at(service, TOKEN, inputs, context, labels={}, log=again.append) == names[0]
    assert again == []
    assert time.perf_counter() - start < 2

    # Who asks for the broken one again may try again.
    assert ask(service, "POST", "/builds", announced(failing))[1]["state"] == "wanted"


@pytest.mark.engine
def test_what_the_service_refuses(service: str, repo: Repo, packed: Packed, tmp_path: Path) -> None:
    inputs, context = packed(repo(environment={"SERVICE": "refuses"}))
    for token in ("", "another-token-of-16"):
        status, answer = ask(service, "POST", "/builds", announced(inputs), token)
        assert (status, answer["message"]) == (
            401,
            "a token is missing or wrong. Fix: set MLENV_IMAGE_TOKEN to one that this service knows",
        )
    with pytest.raises(ImageError, match="401: a token is missing"):
        build_at(service, "wrong", inputs, context, labels={})

    assert ask(service, "POST", "/builds", b"{")[0] == 400
    assert ask(service, "POST", "/builds", b"[]")[0] == 400
    assert ask(service, "GET", "/builds/none")[0] == 404
    tampered = {**inputs.to_plain(), "files": {**inputs.files, "../evil": "0"}}
    status, answer = ask(service, "POST", "/builds", json.dumps({"inputs": tampered, "labels": {}}).encode())
    assert status == 422
    assert "expected paths inside the context" in answer["message"]

    job = ask(service, "POST", "/builds", announced(inputs))[1]
    assert job["state"] == "wanted"
    assert ask(service, "PUT", f"/builds/{job['id']}/context", b"no archive")[0] == 422
    assert upload_of(service, f"/builds/{job['id']}/context", 6 << 20) == 413
    (context / "files/my_ranker/model.py").write_text("WIDTH = 666\n")
    with pytest.raises(ImageError, match=r"422: context: files/my_ranker/model\.py: expected"):
        build_at(service, TOKEN, inputs, context, labels={})
    assert ask(service, "GET", f"/builds/{job['id']}")[1]["state"] == "wanted"

    folder = repo()
    (folder / "my_ranker" / "weights").write_bytes(bytes(6 << 20))
    with pytest.raises(ImageError, match=r"expected at most 5,242,880 bytes of files\. Received: '[67],.*Fix: leave out"):
        build_at(service, TOKEN, *packed(folder), labels={})
    assert ask(service, "GET", "/health", token="") == (200, {"status": "ok", "waiting": 0})
    assert [path.name for path in (tmp_path / "service" / "contexts").iterdir()] == []


@pytest.mark.engine
@pytest.mark.slow
def test_a_full_queue_says_so(service: str, repo: Repo, packed: Packed) -> None:
    with ThreadPoolExecutor(3) as clients:
        builds = []
        for name in ("first", "second", "third"):
            slow = packed(repo(environment={"SERVICE": name}, smoke_test=["sleep", "2"]))
            builds.append(clients.submit(build_at, service, TOKEN, *slow, labels={}, log=lambda line: None))
            time.sleep(0.5)
        errors = [str(build.exception()) for build in builds if build.exception()]
    assert len(errors) == 1
    assert "503: 1 builds wait already; come again" in errors[0]


def test_tokens_are_long_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with pytest.raises(ConfigError, match="--tokens: expected a readable file"):
        read_tokens(file)
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="--tokens: expected tokens of 16 letters or more"):
        read_tokens(file)
    file.write_text(f"{TOKEN}\n\nanother-token-of-16\n")
    tokens = read_tokens(file)
    assert tokens == (TOKEN, "another-token-of-16")
    assert TOKEN not in repr(ServiceOptions(folder=tmp_path, tokens=tokens))


def test_a_service_that_is_away(repo: Repo, packed: Packed) -> None:
    with pytest.raises(ImageError, match=r"http://127\.0\.0\.1:1: expected a build service that answers"):
        build_at("http://127.0.0.1:1", TOKEN, *packed(repo()), labels={})
