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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mlenv.errors import CheckpointError
from mlenv.loops.ranks import any_rank, is_main, wait_for_all

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step-"
_NAME = re.compile(_PREFIX + r"\d{8}")


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Any], documents: Mapping[str, str], keep: int) -> Path:
    """Writes ``folder/step-NNNNNNNN`` and removes all but the newest ``keep``; 0 keeps all.

    Args:
        tensors: by name; plain tensors or sharded ones.
        documents: text files by name; those of rank 0 are written. All ranks call this, and return when the checkpoint is there.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.part"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_all()
    failure: OSError | None = None
    try:
        _write_tensors(temporary, tensors)
        if is_main():
            _complete(temporary, documents)
    except OSError as error:
        failure = error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if any_rank(failure is not None):
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would be in the way of the next try
        raise failure or OSError("another process could not write its part")
    if is_main():
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    wait_for_all()
    return final


def _write_tensors(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Each rank its own shards, and of what all have alike a part; all return when all have written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own single-process mode
        try:
            save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                no_dist=not torch.distributed.is_initialized(),
            )
        except CheckpointException as error:
            causes = {rank: failure for rank, (failure, _) in error.failures.items()}
            if all(isinstance(failure, OSError) for failure in causes.values()):
                raise OSError("; ".join(f"rank {rank}: {failure}" for rank, failure in causes.items())) from error
            raise


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


def load_tensors(checkpoint: Path, tensors: Mapping[str, Any]) -> None:
    """Reads a verified checkpoint into tensors that exist already.

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
            load(dict(tensors), storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(str(checkpoint), expected="tensors that load", received=" ".join(str(error).split())[:300]) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name))


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
