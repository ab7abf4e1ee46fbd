"""A package behind HTTP: raw feature values in, calibrated predictions out."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlenv.errors import MlenvError, check_at_least
from mlenv.serving.columns import RowsError, describe, from_rows, row_keys
from mlenv.serving.metrics import ServerMetrics
from mlenv.serving.predictor import Predictor
from mlenv.serving.served_log import ServedLog

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for other machines too. There is no password: put a gateway before it."""
    port: int = 8080
    """0 takes a free one."""
    max_rows: int = 1000
    """Rows of one request."""
    max_bytes: int = 4 << 20
    """Bytes of one request."""
    max_concurrent: int = 64
    """Requests at once; more are told to come again, with 503."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_bytes", "max_concurrent"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)


class _RefusedError(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status: int, message: str, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.status, self.answer = status, {"message": message, **({"errors": errors} if errors else {})}


def make_app(predictor: Predictor, options: ServerOptions, log: ServedLog | None = None) -> FastAPI:
    """The server's answers; the log is closed with it."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.concurrency import run_in_threadpool

    @asynccontextmanager
    async def whole_life(app: FastAPI) -> AsyncIterator[None]:
        yield
        if log is not None:
            log.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=whole_life)
    package, under_way, metrics = predictor.package, 0, ServerMetrics(predictor.tasks)

    def answer(body: bytes, request_id: str) -> dict[str, Any]:
        plain = _rows_of(body, options.max_rows)
        rows, keys = from_rows(plain, package.columns), row_keys(plain, package.row_key)
        predictions = predictor.predict(rows)
        metrics.scored(predictions)
        if log is not None:
            log.add(request_id, keys, rows, predictions)
        return {"request_id": request_id, "predictions": [dict(zip(predictor.tasks, row, strict=True)) for row in predictions.tolist()]}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": package.facts["name"], "schema_fingerprint": package.schema.fingerprint}

    @app.get("/schema")
    def schema() -> dict[str, Any]:
        return {
            "columns": describe(package.columns, package.row_key, package.schema),
            "tasks": list(predictor.tasks),
            "max_rows": options.max_rows,
            "max_bytes": options.max_bytes,
        }

    @app.get("/metrics")
    def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def predict(request: Request) -> JSONResponse:
        began, status = time.perf_counter(), 500  # unless there is an answer
        try:
            answered = await respond(request)
            status = answered.status_code
        finally:
            metrics.answered(status, time.perf_counter() - began)
        return answered

    async def respond(request: Request) -> JSONResponse:
        nonlocal under_way
        request_id = request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex
        if under_way >= options.max_concurrent:
            message = f"{options.max_concurrent} requests are under way; come again"
            return JSONResponse({"message": message, "request_id": request_id}, 503, {"Retry-After": "1"})
        under_way += 1
        try:
            return JSONResponse(await run_in_threadpool(answer, await _body(request, options.max_bytes), request_id))
        except _RefusedError as error:
            return JSONResponse({**error.answer, "request_id": request_id}, error.status)
        except RowsError as error:
            refused = {"message": str(error), "errors": [problem.to_plain() for problem in error.problems]}
            return JSONResponse({**refused, "request_id": request_id}, 422)
        finally:
            under_way -= 1

    predict.__annotations__["request"] = Request  # FastAPI reads the annotation, which is a text of this function's scope
    app.add_api_route("/predict", predict, methods=["POST"], response_model=None)
    return app


def serve(predictor: Predictor, options: ServerOptions, log: ServedLog | None = None) -> None:
    """Answers until it is interrupted; requests under way are answered first.

    Raises:
        MlenvError: the address or the port is taken.
    """
    import socket

    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen(2048)  # who reads the address below may call at once
    except (OSError, OverflowError) as error:
        listener.close()
        raise MlenvError(f"port {options.port} of {options.host}: {error}. Fix: choose another one with --port.") from error
    logger.info("answers at http://%s:%d/predict", *listener.getsockname()[:2])
    with listener, suppress(KeyboardInterrupt):  # the usual way to end it
        uvicorn.Server(uvicorn.Config(make_app(predictor, options, log), log_level="warning")).run(sockets=[listener])


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, of which no more is read than is allowed."""
    message = f"the request has more than the {max_bytes:,} bytes that are allowed"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _RefusedError(413, message)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise _RefusedError(413, message)
    return bytes(body)


def _rows_of(body: bytes, max_rows: int) -> list[dict[str, Any]]:
    try:
        plain = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(400, f"the request is no JSON: {error}") from error
    rows = plain.get("rows") if isinstance(plain, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _RefusedError(400, 'the request must be {"rows": [{"COLUMN": VALUE, ...}, ...]}; GET /schema names the columns')
    if len(rows) > max_rows:
        raise _RefusedError(413, f"the request has {len(rows):,} rows, more than the {max_rows:,} that are allowed")
    return rows


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON; write null where a value is not known")
