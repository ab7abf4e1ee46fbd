"""Checkpoints: a directory that is there whole or not at all, and that is verified before anything is read from it.

Tensors are safetensors files written by PyTorch's distributed checkpointing, each rank its own shards, so that they load
on another number of ranks; everything else is JSON and YAML. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import xxhash
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mlenv.errors import CheckpointError
from mlenv.loops.ranks import any_rank, is_main, objects_of_all, rank
from mlenv.loops.safetensors_writer import write_shards

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step-"
_NAME = re.compile(_PREFIX + r"\d{8}")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a folder stay."""

    newest: int = 0
    """So many of the newest; 0 keeps all."""
    every_steps: int = 0
    """Those at a multiple of so many steps stay too; 0 keeps none of them."""

    def outdated(self, names: Iterable[str]) -> list[str]:
        """Names of checkpoints that need not stay, of all those that are there."""
        older = sorted(names)[: -self.newest]
        return [name for name in older if not self.every_steps or step_of(name) % self.every_steps]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Any],
    documents: Mapping[str, str],
    retention: Retention = Retention(),
    group: ProcessGroup | None = None,
) -> Path:
    """Writes ``folder/step-NNNNNNNN`` and removes what need not stay.

    Args:
        tensors: by name; plain tensors or sharded ones.
        documents: text files by name; those of rank 0 are written. All ranks call this, and return when the checkpoint is there.
        group: in which the ranks talk about it, where it is not written in the main thread.
    """

    def write(temporary: Path) -> None:
        _write_tensors(temporary, tensors, group)

    def complete(temporary: Path) -> None:
        if is_main():
            _complete(temporary, documents)

    return _place(folder, checkpoint_name(step), (write, complete), retention, group)


def link_checkpoint(checkpoint: Path, folder: Path, retention: Retention = Retention(), group: ProcessGroup | None = None) -> Path:
    """Puts a checkpoint into another folder as well, as further names of the same files where the disk has them."""

    def fill(temporary: Path) -> None:
        if is_main():
            for file in checkpoint.iterdir():
                try:
                    os.link(file, temporary / file.name)
                except OSError:
                    shutil.copyfile(file, temporary / file.name)
                    _sync(temporary / file.name)
            _sync(temporary)

    return _place(folder, checkpoint.name, (fill,), retention, group)


def _place(folder: Path, name: str, steps: Sequence[Callable[[Path], None]], retention: Retention, group: ProcessGroup | None) -> Path:
    """Has a folder filled under another name, and gives it its own when nothing has failed. No rank begins a step before all have done
    the one before: what rank 0 says of the files must be true of those of all."""
    final, temporary = folder / name, folder / f".{name}.part"

    def begin() -> None:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish() -> None:
        if is_main():
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(folder)
            for old in retention.outdated(path.name for path in list_checkpoints(folder)):
                shutil.rmtree(folder / old)

    try:
        together(begin, group)
        for step in steps:
            together(partial(step, temporary), group)
        together(finish, group)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would be in the way of the next try
        raise
    return final


def together(part: Callable[[], None], group: ProcessGroup | None) -> None:
    """Has all ranks do their part, and lets none go on when one of them could not."""
    failure: OSError | None = None
    try:
        part()
    except OSError as error:
        failure = error
    if any_rank(failure is not None, group):
        raise failure or OSError("another process could not write its part")


def _write_tensors(folder: Path, tensors: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """Each rank its own shards, and of what all have alike a part: all ranks know all plans, and come to the same division."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=is_main())
    divided, _ = planner.create_global_plan(objects_of_all(planner.create_local_plan(), group))
    write_shards(folder, rank() + 1, planner.finish_plan(divided[rank()]), planner)


def _complete(folder: Path, documents: Mapping[str, str]) -> None:
    """Adds the documents and the manifest to the tensors, and waits until all of it is on the disk."""
    for name, text in documents.items():
        (folder / name).write_text(text)
    manifest = {file.name: _entry(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def add_document(checkpoint: Path, name: str, text: str) -> None:
    """Adds a text file to a finished checkpoint, or replaces one. A process killed in between leaves the checkpoint whole, without it."""
    if read_document(checkpoint, name) == text:
        return
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if manifest.pop(name, None) is not None:
        _replace(checkpoint / MANIFEST, json.dumps(manifest, indent=2))  # between two texts the manifest names neither
    _replace(checkpoint / name, text)
    manifest[name] = _entry(checkpoint / name)
    _replace(checkpoint / MANIFEST, json.dumps(manifest, indent=2))


def read_document(checkpoint: Path, name: str) -> str | None:
    """A text file of a verified checkpoint; None when its manifest does not name it."""
    named = json.loads((checkpoint / MANIFEST).read_text())
    return (checkpoint / name).read_text() if name in named else None


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint, by name."""
    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}


def load_tensors(checkpoint: Path, tensors: Mapping[str, Any], *, alone: bool = False) -> None:
    """Reads a verified checkpoint into tensors that exist already.

    Args:
        alone: this rank reads for itself; otherwise all ranks call this.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ShardedTensor, which TorchRec still gives, and of single-process mode
            for name, tensor in tensors.items():
                shape = getattr(stored.get(name), "size", None)
                if shape != tensor.size():
                    received = "no such tensor" if shape is None else f"shape {tuple(shape)}"
                    expected = f"shape {tuple(tensor.size())}"
                    raise CheckpointError(
                        f"{checkpoint}, tensor {name!r}", expected=expected, received=received, fix="use the config it was saved with"
                    )
            load(dict(tensors), storage_reader=reader, no_dist=alone or not torch.distributed.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(str(checkpoint), expected="tensors that load", received=" ".join(str(error).split())[:300]) from error


def checkpoint_name(step: int) -> str:
    """``step-NNNNNNNN``."""
    return f"{_PREFIX}{step:08d}"


def step_of(name: str) -> int:
    """The step of ``step-NNNNNNNN``."""
    return int(name.removeprefix(_PREFIX))


def is_checkpoint_name(name: str) -> bool:
    """Whether it reads ``step-NNNNNNNN``."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and is_checkpoint_name(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over. None when there has never been one.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    checkpoints = list_checkpoints(folder)
    damage: CheckpointError | None = None
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("%s The checkpoint before it is used.", error)
            damage = error
        else:
            return checkpoint
    if damage is not None:
        raise damage
    return None


def verify(checkpoint: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: names the first file that is missing, cut or changed.
    """
    fix = "remove the checkpoint; an older one or a new training takes its place"
    try:
        manifest = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in json.loads((checkpoint / MANIFEST).read_text()).items()}
        if not manifest:
            raise ValueError("it names no files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            str(checkpoint / MANIFEST), expected="the manifest of the checkpoint", received=str(error), fix=fix
        ) from error
    for name, (expected_bytes, expected_checksum) in manifest.items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected_bytes:
            raise CheckpointError(
                str(file), expected=f"{expected_bytes} bytes", received="no file" if size is None else f"{size} bytes", fix=fix
            )
        if (checksum := _checksum(file)) != expected_checksum:
            raise CheckpointError(str(file), expected=f"checksum {expected_checksum}", received=checksum, fix=fix)


def _entry(file: Path) -> dict[str, int | str]:
    """What the manifest says of a file."""
    return {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}


def _replace(file: Path, text: str) -> None:
    """Writes a file whole or not at all, and waits until it is on the disk."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        temporary.write_text(text)
        _sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(file.parent)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
