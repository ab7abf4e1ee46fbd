"""What is written while the training goes on."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
import torch
import torch.distributed
from processes import run_ranks
from rank_jobs import save_apart
from torch.distributed import HashStore
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from mlenv.loops.checkpoint import MANIFEST, load_tensors, save_checkpoint
from mlenv.loops.checkpoint_writer import CheckpointWriter


def test_a_step_goes_on_while_what_was_before_it_is_written(tmp_path):
    writer, release, outcomes = CheckpointWriter(), threading.Event(), []
    weight = torch.zeros(3)
    tensors = writer.copied({"weight": weight})
    writer.begin(lambda group: release.wait(), outcomes.append)
    writer.begin(lambda group: save_checkpoint(tmp_path, 1, tensors, {}, group=group) and None, outcomes.append)
    weight += 1
    writer.look()
    assert outcomes == []
    release.set()
    writer.wait()
    assert outcomes == [None, None]
    load_tensors(tmp_path / "step-00000001", {"weight": weight})
    assert weight.tolist() == [0, 0, 0]
    writer.close()


def test_the_memory_of_a_copy_is_used_again():
    writer = CheckpointWriter()
    tensors = {"weight": torch.ones(3), "state": torch.ones(2)}
    before = dict(writer.copied(tensors))
    tensors = {"weight": torch.full((3,), 2.0), "state": torch.zeros(4)}
    after = writer.copied(tensors)
    assert after["weight"] is before["weight"]
    assert [after[name].tolist() for name in tensors] == [[2, 2, 2], [0, 0, 0, 0]]
    assert after["weight"] is not tensors["weight"]
    writer.close()


def test_a_failure_is_told_to_whom_it_concerns_and_another_error_to_all():
    writer, outcomes = CheckpointWriter(), []

    def fail(error, group):
        raise error

    full = OSError("full")
    writer.begin(partial(fail, full), outcomes.append)
    writer.begin(lambda group: None, outcomes.append)
    writer.begin(partial(fail, RuntimeError("a bug")), outcomes.append)
    with pytest.raises(RuntimeError, match="a bug"):
        writer.wait()
    assert outcomes == [full, None]
    writer.close()


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield
    torch.distributed.destroy_process_group()


def test_a_rank_with_several_shards_of_a_table_writes_them_all(tmp_path, alone):
    places = [ShardMetadata(shard_offsets=[0, start], shard_sizes=[4, 2], placement="rank:0/cpu") for start in (0, 2)]
    whole = torch.arange(16.0).reshape(4, 4)
    shards = [Shard(whole[:, start : start + 2].clone(), place) for start, place in zip((0, 2), places, strict=True)]
    properties = TensorProperties(dtype=torch.float32)
    metadata = ShardedTensorMetadata(shards_metadata=places, size=torch.Size([4, 4]), tensor_properties=properties)
    table = ShardedTensor._init_from_local_shards_and_global_metadata(shards, sharded_tensor_metadata=metadata)
    writer = CheckpointWriter()
    tensors = writer.copied({"table": table, "flags": torch.tensor([True, False])})
    shards[0].tensor.zero_()
    writer.begin(lambda group: save_checkpoint(tmp_path, 1, tensors, {}, group=group) and None, lambda failure: None)
    writer.wait()
    writer.close()
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) == 2
    assert torch.equal(writer.copied({"table": table})["table"].local_shards()[0].tensor, torch.zeros(4, 2))
    loaded = {"table": torch.zeros(4, 4), "flags": torch.zeros(2, dtype=torch.bool)}
    load_tensors(tmp_path / "step-00000001", loaded)
    assert torch.equal(loaded["table"], whole)
    assert loaded["flags"].tolist() == [True, False]


def test_a_rank_that_is_late_is_waited_for_and_one_that_fails_ends_it_for_all(tmp_path):
    assert run_ranks(2, save_apart, tmp_path) == [["", "another process could not write its part"], ["", "no room"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]
    manifest = json.loads((tmp_path / "step-00000000" / MANIFEST).read_text())
    assert {path.name for path in (tmp_path / "step-00000000").iterdir()} == {MANIFEST, *manifest}
    assert len(manifest) == 2
    found = {f"own.{number}": torch.zeros(3) for number in range(2)}
    load_tensors(tmp_path / "step-00000000", found)
    assert all(tensor.tolist() == [1, 1, 1] for tensor in found.values())
