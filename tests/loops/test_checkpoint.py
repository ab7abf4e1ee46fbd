from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from mlenv.errors import CheckpointError
from mlenv.loops.checkpoint import (
    MANIFEST,
    Retention,
    add_document,
    link_checkpoint,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    read_document,
    save_checkpoint,
    verify,
)


def tensors(value):
    return {
        "weight": torch.full((3, 2), float(value)),
        "step": torch.tensor(float(value)),
        "none": torch.zeros(0),
        "random": torch.arange(10, dtype=torch.uint8) + value,
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "counts": torch.tensor([value, 2**40]),
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "with a space"
    for step in (1, 2, 3):
        save_checkpoint(folder, step, tensors(step), {"progress.json": str(step)}, Retention(newest=2))
    return folder


def test_what_is_loaded_is_what_was_saved(folder):
    loaded = tensors(0)
    load_tensors(folder / "step-00000003", loaded)
    for name, tensor in tensors(3).items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype
    assert (folder / "step-00000003" / "progress.json").read_text() == "3"


def test_only_the_newest_stay(folder):
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_of_the_older_ones_those_at_round_steps_stay(tmp_path):
    names = [f"step-{step:08d}" for step in (5, 10, 15, 20, 25)]
    assert Retention(newest=2).outdated(names) == names[:3]
    assert Retention(newest=2, every_steps=10).outdated(reversed(names)) == [names[0], names[2]]
    assert Retention().outdated(names) == []
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, tensors(step), {}, Retention(newest=1, every_steps=2))
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "4", "5"]


def test_a_checkpoint_has_a_place_in_another_folder_too(folder):
    linked = link_checkpoint(folder / "step-00000003", folder.parent / "best")
    verify(linked)
    add_document(linked, "more.json", "one")
    verify(folder / "step-00000003")
    assert read_document(folder / "step-00000003", "more.json") is None


def test_a_killed_save_leaves_no_checkpoint(folder):
    shutil.copytree(folder / "step-00000003", folder / ".step-00000004.part")
    assert newest_checkpoint(folder).name == "step-00000003"
    save_checkpoint(folder, 4, tensors(4), {}, Retention(newest=2))
    assert newest_checkpoint(folder).name == "step-00000004"
    assert not (folder / ".step-00000004.part").exists()


def damage(folder, how):
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "manifest":
        (folder / MANIFEST).unlink()
    elif how == "document":
        (folder / "progress.json").write_text("9")


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "manifest", "document"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, how, caplog):
    damage(folder / "step-00000003", how)
    with pytest.raises(CheckpointError, match="step-00000003"):
        verify(folder / "step-00000003")
    assert newest_checkpoint(folder).name == "step-00000002"
    assert "step-00000003" in caplog.text
    damage(folder / "step-00000002", how)
    with pytest.raises(CheckpointError, match="step-00000002"):
        newest_checkpoint(folder)


def test_other_tensors_are_refused_by_name(folder):
    with pytest.raises(CheckpointError, match=r"tensor 'weight': expected shape \(4, 2\)\. Received: 'shape \(3, 2\)'"):
        load_tensors(folder / "step-00000003", {"weight": torch.zeros(4, 2)})
    with pytest.raises(CheckpointError, match="tensor 'other'"):
        load_tensors(folder / "step-00000003", {"other": torch.zeros(1)})


def test_folders_of_other_names_are_no_checkpoints(folder):
    shutil.copytree(folder / "step-00000003", folder / "step-best")
    save_checkpoint(folder, 4, tensors(4), {}, Retention(newest=1))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-best"]


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"a": 1}', "{"])
def test_a_manifest_that_is_none_is_damage(folder, text):
    (folder / "step-00000003" / MANIFEST).write_text(text)
    assert newest_checkpoint(folder).name == "step-00000002"


def test_a_save_that_fails_leaves_nothing_behind(folder):
    with pytest.raises(OSError, match="no/such"):
        save_checkpoint(folder, 4, tensors(4), {"no/such/document": ""}, Retention(newest=2))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_document_is_added_and_replaced(folder):
    checkpoint = folder / "step-00000003"
    assert read_document(checkpoint, "more.json") is None
    for text in ("one", "two", "two"):
        add_document(checkpoint, "more.json", text)
        verify(checkpoint)
        assert read_document(checkpoint, "more.json") == text
    (checkpoint / "more.json").write_text("tow")
    with pytest.raises(CheckpointError, match=r"more\.json: expected checksum"):
        verify(checkpoint)


@pytest.mark.parametrize("renames", range(3))
@pytest.mark.parametrize("before", [None, "one"])
def test_a_document_that_is_killed_while_it_is_added_leaves_the_checkpoint_whole(folder, monkeypatch, renames, before):
    checkpoint = folder / "step-00000003"
    if before is not None:
        add_document(checkpoint, "more.json", before)
    replace, done = Path.replace, []

    def killed(self, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        add_document(checkpoint, "more.json", "two")
    monkeypatch.undo()
    verify(checkpoint)
    assert read_document(checkpoint, "more.json") in (before, None, "two")
    load_tensors(checkpoint, tensors(0))
    add_document(checkpoint, "more.json", "three")
    verify(checkpoint)
    assert read_document(checkpoint, "more.json") == "three"
