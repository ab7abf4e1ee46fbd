"""Checkpoints at a URL beside those on the disk, so that another machine can go on: whatever fsspec has a driver for."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

import fsspec

from mlenv.errors import CheckpointError, ConfigError
from mlenv.loops.checkpoint import MANIFEST, is_checkpoint_name, list_checkpoints, verify

logger = logging.getLogger(__name__)

KEY = "loop.checkpoint_url"
WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try."""

T = TypeVar("T")


class StoreError(OSError):
    """Something at the URL could not be read or written, however often it was tried."""


class CheckpointStore:
    """Folders of checkpoints below a URL, each named as on the disk.

    The manifest of a checkpoint is written last and removed first: without one there is no checkpoint.

    Raises:
        ConfigError: there is no driver for the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            options = {"auto_mkdir": True} if fsspec.utils.get_protocol(url) in ("file", "local") else {}
            self._files, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            fix = f"install the driver: {error}"
            raise ConfigError(KEY, expected="a URL that fsspec has a driver for", received=url, fix=fix) from error
        self._root = root.rstrip("/")
        self._manifests: dict[str, str] = {}
        """Of the checkpoints that are known to be there, so that each is read once."""

    def check(self) -> None:
        """Writes a small file and removes it.

        Raises:
            ConfigError: that is refused, or there is no such bucket.
        """
        probe = f"{self._root}/.mlenv"
        try:
            self._tried("write", self._files.pipe_file, probe, b"mlenv")
            self._tried("remove", self._files.rm_file, probe)
        except StoreError as error:
            fix = "make the bucket, and give this machine the right to list, read, write and delete there"
            raise ConfigError(KEY, expected="a place that can be written", received=str(error), fix=fix) from error

    def names(self, folder: str) -> list[str]:
        """Finished checkpoints of a folder, oldest first."""

        def find() -> list[str]:
            self._files.invalidate_cache()
            try:
                return list(self._files.find(f"{self._root}/{folder}"))
            except FileNotFoundError:
                return []

        parts = (file.rsplit("/", 2) for file in self._tried("list", find))
        return sorted(name for _, name, file in parts if file == MANIFEST and is_checkpoint_name(name))

    def put(self, folder: Path) -> None:
        """Copies the checkpoints of a folder on the disk that are not there yet, or are there with other documents."""
        there = self.names(folder.name)
        for checkpoint in list_checkpoints(folder):
            place, manifest = f"{self._root}/{folder.name}/{checkpoint.name}", (checkpoint / MANIFEST).read_text()
            if checkpoint.name in there:
                if place not in self._manifests:
                    self._manifests[place] = self.read(folder.name, checkpoint.name, MANIFEST)
                if self._manifests[place] == manifest:
                    continue
                self._tried("remove", self._files.rm_file, f"{place}/{MANIFEST}")
            if self._tried("list", self._files.exists, place):  # a copy that was cut, perhaps of other files
                self._tried("remove", self._files.rm, place, recursive=True)
            for file in sorted(checkpoint.iterdir(), key=lambda file: file.name == MANIFEST):
                self._tried("write", self._files.put_file, str(file), f"{place}/{file.name}")
            self._manifests[place] = manifest

    def remove(self, folder: str, names: Iterable[str]) -> None:
        """Removes checkpoints."""
        for name in names:
            place = f"{self._root}/{folder}/{name}"
            self._tried("remove", self._files.rm_file, f"{place}/{MANIFEST}")
            self._tried("remove", self._files.rm, place, recursive=True)

    def read(self, folder: str, name: str, file: str) -> str:
        """A document of a checkpoint."""
        content: bytes = self._tried("read", self._files.cat_file, f"{self._root}/{folder}/{name}/{file}")
        return content.decode()

    def fetch(self, folder: Path, name: str) -> Path:
        """Copies a checkpoint to the disk, where it is then there whole or not at all.

        Raises:
            CheckpointError: it is damaged.
        """
        final, temporary = folder / name, folder / f".{name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            for place in self._tried("list", self._files.find, f"{self._root}/{folder.name}/{name}"):
                self._tried("read", self._files.get_file, place, str(temporary / place.rsplit("/", 1)[1]))
            verify(temporary)
            shutil.rmtree(final, ignore_errors=True)
            return temporary.rename(final)
        except CheckpointError as error:
            place = f"{self.url}/{folder.name}/{name}"
            raise CheckpointError(place, expected="a whole checkpoint", received=str(error), fix="remove it") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def fetch_newest(self, folder: Path, names: Iterable[str]) -> Path | None:
        """The newest of these checkpoints that is whole; None without any.

        Raises:
            CheckpointError: all are damaged.
        """
        damage: CheckpointError | None = None
        for name in sorted(names, reverse=True):
            try:
                return self.fetch(folder, name)
            except CheckpointError as error:
                logger.warning("%s The checkpoint before it is used.", error)
                damage = error
        if damage is not None:
            raise damage
        return None

    def _tried(self, verb: str, action: Callable[..., T], *arguments: object, **options: object) -> T:
        """Tries again after a while, unless the answer would be the same: no right, no such bucket or file."""
        for wait in (*WAITS, None):
            try:
                return action(*arguments, **options)
            except (PermissionError, FileNotFoundError) as error:
                raise StoreError(f"{self.url}: cannot {verb} ({type(error).__name__}: {error})") from error
            except Exception as error:
                if wait is None:
                    raise StoreError(f"{self.url}: cannot {verb} ({type(error).__name__}: {error})") from error
                logger.info("%s: cannot %s (%s); once more in %g s", self.url, verb, error, wait)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")
