"""Tensors to safetensors files, straight from their memory.

PyTorch's own writer of distributed checkpoints first puts a whole file together in memory, twice, and no other thread runs meanwhile:
for 1.5 GB of tables the training would stand still for more than a second.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shards(folder: Path, number: int, plan: SavePlan, planner: SavePlanner) -> None:
    """Writes what a plan of distributed checkpointing gives to one rank, as ``HuggingFaceStorageReader`` reads it.

    Args:
        number: of the rank, from 1; part of the names of the files.
    """
    files: list[dict[str, WriteItem]] = []
    for item in plan.items:
        # A file has one shard of a name: a rank that holds several of a table writes several files.
        file = next((file for file in files if item.index.fqn not in file), None)
        if file is None:
            files.append(file := {})
        file[item.index.fqn] = item
    for place, file in enumerate(files, start=1):
        tensors, offsets = {}, {}
        for name, item in file.items():
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            tensors[name], offsets[name] = tensor, {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        write_safetensors(folder / f"shard-{number:05d}-model-{place:05d}-of-{len(files):05d}.safetensors", tensors, offsets)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Any]) -> None:
    """Writes tensors to a file, and waits until it is on the disk.

    Args:
        offsets: where each lies in the whole tensor, as distributed checkpointing says it.

    Source: the format of safetensors, https://huggingface.co/docs/safetensors.
    """
    named = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each begins at a multiple of its size
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
    end = 0
    for name, tensor in named:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in named:
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
