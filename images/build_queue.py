"""Builds for several clients, one after the other; who asks for the same inputs shares one build."""

from __future__ import annotations

import logging
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Final, Literal

from mlenv.errors import DataError, MlenvError
from mlenv.images.build import BuildOptions, build, find, is_in_registry, reference_of
from mlenv.images.inputs import Inputs, check_context
from mlenv.images.transfer import push

logger = logging.getLogger(__name__)

State = Literal["wanted", "queued", "running", "built", "failed"]
"""wanted: its files are not here yet."""

_REMEMBERED: Final = 1000
"""Builds that can still be asked about."""


@dataclass(kw_only=True)
class Job:
    """One build; changed by the queue alone."""

    id: str
    """The whole hash of the inputs, with the base."""
    reference: str
    inputs: Inputs
    labels: Mapping[str, str]
    log: Path
    state: State = "wanted"
    error: str = ""
    context: Path | None = None
    image: str = ""
    """Where it can be had, once it is built; with its digest when a registry has it."""

    @property
    def is_over(self) -> bool:
        return self.state in ("built", "failed")

    def to_plain(self) -> dict[str, Any]:
        return {"id": self.id, "reference": self.reference, "state": self.state, "error": self.error, "image": self.image}


class QueueFullError(MlenvError):
    """Too many builds wait."""


@dataclass
class BuildQueue:
    """Holds the jobs, and a thread that does them."""

    engine: Any
    folder: Path
    """Where contexts and logs lie; contexts of an earlier service are removed."""
    options: BuildOptions
    max_queue: int
    max_context_bytes: int
    jobs: dict[str, Job] = field(default_factory=dict)
    waiting: SimpleQueue[Job | None] = field(default_factory=SimpleQueue)
    lock: Lock = field(default_factory=Lock)
    is_closed: bool = False

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder / "contexts", ignore_errors=True)
        for name in ("contexts", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.thread = Thread(target=self._work, name="image builds", daemon=True)
        self.thread.start()

    def ask(self, inputs: Inputs, labels: Mapping[str, str]) -> Job:
        """The build of these inputs: one that is over well, under way, or wanted.

        Raises:
            QueueFullError: it would have to wait behind too many.
            ImageError: its base is not known.
        """
        reference, digest, _ = reference_of(self.engine, inputs, self.options.registry)
        is_there = is_in_registry(self.engine, reference) if self.options.registry else bool(find(self.engine, reference, digest))
        with self.lock:
            known = self.jobs.get(digest)
            if known and (not known.is_over or (known.state == "built" and is_there)):
                return known
            job = Job(id=digest, reference=reference, inputs=inputs, labels=labels, log=self.folder / "logs" / f"{digest}.log")
            if is_there:
                job.state, job.image = "built", reference
            else:
                self._check_room()
            job.log.write_text("")
            self.jobs[digest] = job
            for old in [key for key, entry in self.jobs.items() if entry.is_over or entry.state == "wanted"][:-_REMEMBERED]:
                del self.jobs[old]
            return job

    def receive(self, job: Job, archive: Path) -> None:
        """Takes the files of a build, and puts it into the queue unless another client was faster.

        Raises:
            DataError: they are not those that were announced.
            QueueFullError: too many builds wait by now.
        """
        context = Path(tempfile.mkdtemp(dir=self.folder / "contexts"))
        try:
            _unpack(archive, context, job.inputs, self.max_context_bytes)
            check_context(context, job.inputs)
            with self.lock:
                if job.state != "wanted":
                    return
                self._check_room()
                job.state, job.context = "queued", context
                self.waiting.put(job)
        finally:
            if job.context != context:
                shutil.rmtree(context)

    def close(self) -> None:
        """Ends after the build that is under way."""
        self.is_closed = True
        self.waiting.put(None)
        self.thread.join()

    def _check_room(self) -> None:
        waiting = sum(job.state == "queued" for job in self.jobs.values())
        if waiting >= self.max_queue:
            raise QueueFullError(f"{waiting} builds wait already; come again")

    def _work(self) -> None:
        while (job := self.waiting.get()) and not self.is_closed:
            assert job.context is not None
            job.state = "running"
            try:
                with job.log.open("a", buffering=1) as log:
                    job.image = self._built(job, lambda line: print(line, file=log))
                job.state = "built"
            except (MlenvError, OSError) as error:
                job.error, job.state = str(error), "failed"
            except Exception as error:
                logger.exception("the build of %s", job.reference)
                job.error, job.state = f"{type(error).__name__}: {error}", "failed"
            finally:
                shutil.rmtree(job.context, ignore_errors=True)
            logger.info("%s: %s %s", job.reference, job.state, job.error)

    def _built(self, job: Job, log: Any) -> str:
        assert job.context is not None
        image = build(self.engine, job.inputs, job.context, self.options, labels=job.labels, log=log)
        return push(self.engine, image.reference, log) if self.options.registry and not image.is_remote else image.reference


def _unpack(archive: Path, context: Path, inputs: Inputs, max_bytes: int) -> None:
    """The announced files out of an archive, and no more bytes than are allowed."""
    total = 0
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                total += member.size
                if not member.isreg() or member.name not in inputs.files:
                    raise DataError(f"context: {member.name}", expected="an announced file", received="another one")
                if total > max_bytes:
                    raise DataError("context", expected=f"at most {max_bytes:,} bytes", received=f"{total:,}")
                opened.extract(member, context, filter="data")
    except tarfile.TarError as error:
        raise DataError("context", expected="a tar archive", received=str(error)) from error
