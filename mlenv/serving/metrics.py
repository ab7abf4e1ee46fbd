"""What a model server has done, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from mlenv.datasets.encoded_rows import Floats

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SCORES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Upper ends of the bins of predictions; rates of clicks are small."""


class ServerMetrics:
    """Requests by status, how long they took, rows, and the predictions of each task."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks, self._registry = tasks, CollectorRegistry()
        self._requests = Counter("mlenv_serve_requests", "Requests for predictions", ["status"], registry=self._registry)
        self._seconds = Histogram("mlenv_serve_seconds", "Seconds from request to answer", buckets=SECONDS, registry=self._registry)
        self._rows = Counter("mlenv_serve_rows", "Rows that were scored", registry=self._registry)
        self._scores = Histogram("mlenv_serve_prediction", "Predictions", ["task"], buckets=SCORES, registry=self._registry)

    def answered(self, status: int, seconds: float) -> None:
        """Counts an answer of any kind."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def scored(self, predictions: Floats) -> None:
        """Counts predictions ``(rows, tasks)``."""
        self._rows.inc(len(predictions))
        for place, task in enumerate(self._tasks):
            histogram = self._scores.labels(task)
            for score in predictions[:, place].tolist():
                histogram.observe(score)

    def text(self) -> bytes:
        """In Prometheus' format, as ``CONTENT_TYPE_LATEST`` names it."""
        return generate_latest(self._registry)
