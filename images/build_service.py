"""The build queue behind HTTP.

``POST /builds`` announces the inputs of an image and answers whether it is there, under way or wanted; ``PUT /builds/ID/context`` sends the
files of a wanted one; ``GET /builds/ID/log`` is its log while it grows, ``GET /builds/ID`` how it stands.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlenv.errors import ConfigError, DataError, ImageError, MlenvError, check_at_least
from mlenv.images.build import BuildOptions
from mlenv.images.build_queue import BuildQueue, Job, QueueFullError
from mlenv.images.inputs import Inputs

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

logger = logging.getLogger(__name__)

_MAX_ANNOUNCEMENT: Final = 4 << 20
_LOG_SECONDS: Final = 0.1
_SHORTEST_TOKEN: Final = 16


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    folder: Path
    """Where uploads and logs lie."""
    tokens: tuple[str, ...] = field(repr=False)
    """Any of these lets a client in. It may then run what it likes in a build: give them to those who may."""
    host: str = "127.0.0.1"
    """Address to listen on. Tokens cross the network as they are: put a gateway with TLS before another one."""
    port: int = 8070
    """0 takes a free one."""
    max_queue: int = 20
    """Builds that wait; more clients are told to come again, with 503."""
    max_context_bytes: int = 500 << 20
    """Size of one upload, packed and unpacked."""
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        check_at_least("--max-queue", self.max_queue, 1)
        check_at_least("--max-context-mb", self.max_context_bytes, 1)


def read_tokens(file: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line.

    Raises:
        ConfigError: there is none, or one is too short to be a secret.
    """
    try:
        tokens = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--tokens", expected="a readable file with a token a line", received=f"{file}: {error}") from error
    if not tokens or min(map(len, tokens)) < _SHORTEST_TOKEN:
        fix = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        raise ConfigError("--tokens", expected=f"tokens of {_SHORTEST_TOKEN} letters or more in {file}", received=len(tokens), fix=fix)
    return tokens


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(engine: Any, options: ServiceOptions) -> FastAPI:
    """The service's answers; its queue ends with it."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool

    queue = BuildQueue(engine, options.folder, options.build, options.max_queue, options.max_context_bytes)

    @asynccontextmanager
    async def whole_life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=whole_life)

    def refusing(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Lets known clients in, and turns errors into a status and a message."""

        async def guarded(request: Request) -> Response:
            try:
                _check_token(request.headers.get("authorization", ""), options.tokens)
                return await answer(request)
            except _RefusedError as error:
                return JSONResponse({"message": str(error)}, error.status)
            except QueueFullError as error:
                return JSONResponse({"message": str(error)}, 503, {"Retry-After": "10"})
            except MlenvError as error:
                return JSONResponse({"message": str(error)}, 422)

        guarded.__annotations__["request"] = Request  # FastAPI reads the annotation, which is a text of this function's scope
        return guarded

    def job_of(request: Request) -> Job:
        job = queue.jobs.get(request.path_params["id"])
        if job is None:
            raise _RefusedError(404, "no such build; announce it again")
        return job

    async def announce(request: Request) -> Response:
        body = bytearray()
        await _receive(request, _MAX_ANNOUNCEMENT, body.extend)
        inputs, labels = _announced(bytes(body))
        job = await run_in_threadpool(queue.ask, inputs, labels)
        return JSONResponse({**job.to_plain(), "max_context_bytes": options.max_context_bytes})

    async def receive(request: Request) -> Response:
        job = job_of(request)
        with tempfile.NamedTemporaryFile(dir=options.folder, suffix=".tar") as archive:
            await _receive(request, options.max_context_bytes, archive.write)
            archive.flush()
            await run_in_threadpool(queue.receive, job, Path(archive.name))
        return JSONResponse(job.to_plain())

    async def state(request: Request) -> Response:
        return JSONResponse(job_of(request).to_plain())

    async def log(request: Request) -> Response:
        return StreamingResponse(_growing(job_of(request)), media_type="text/plain")

    for path, method, answer in (
        ("/builds", "POST", announce),
        ("/builds/{id}/context", "PUT", receive),
        ("/builds/{id}/log", "GET", log),
        ("/builds/{id}", "GET", state),
    ):
        app.add_api_route(path, refusing(answer), methods=[method], response_model=None)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": sum(job.state == "queued" for job in list(queue.jobs.values()))}

    return app


def serve(engine: Any, options: ServiceOptions) -> None:
    """Answers until it is interrupted; the build under way ends first.

    Raises:
        ImageError: the address or the port is taken.
    """
    import socket

    import uvicorn

    options.folder.mkdir(parents=True, exist_ok=True)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        received = f"{options.host}:{options.port}: {error}"
        raise ImageError("--port", expected="a free port", received=received, fix="choose another one") from error
    logger.info("builds images at http://%s:%d", *listener.getsockname()[:2])
    with listener:
        uvicorn.Server(uvicorn.Config(make_app(engine, options), log_level="warning")).run(sockets=[listener])


def _check_token(header: str, tokens: tuple[str, ...]) -> None:
    scheme, _, given = header.partition(" ")
    # All are compared, so that the time does not say which one was nearest.
    matches = [hmac.compare_digest(given.encode(), token.encode()) for token in tokens]
    if scheme.lower() != "bearer" or not any(matches):
        raise _RefusedError(401, "a token is missing or wrong. Fix: set MLENV_IMAGE_TOKEN to one that this service knows")


async def _receive(request: Request, max_bytes: int, take: Callable[[bytes], object]) -> None:
    """Hands the body on, of which no more is read than is allowed."""
    message = f"the request has more than the {max_bytes:,} bytes that are allowed"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _RefusedError(413, message)
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > max_bytes:
            raise _RefusedError(413, message)
        take(part)


def _announced(body: bytes) -> tuple[Inputs, dict[str, str]]:
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(400, f"the request is no JSON: {error}") from error
    if not (isinstance(plain, dict) and plain.keys() == {"inputs", "labels"} and isinstance(plain["labels"], dict)):
        raise _RefusedError(400, 'the request must be {"inputs": {...}, "labels": {...}}')
    for name, value in plain["labels"].items():
        if not (isinstance(value, str) and value.isprintable() and name.isprintable()):
            raise DataError(f"labels.{name}", expected="text in one line", received=value)
    return Inputs.from_plain(plain["inputs"]), plain["labels"]


async def _growing(job: Job) -> AsyncIterator[bytes]:
    """The log of a build until it is over."""
    with job.log.open("rb") as log:
        while True:
            is_over = job.is_over  # before reading: what was written until now is read below
            while part := log.read(1 << 16):
                yield part
            if is_over:
                return
            await asyncio.sleep(_LOG_SECONDS)
