"""What is packed, what it hashes to, and what is refused before a build."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlenv.errors import ConfigError, DataError, MlenvError, Problems
from mlenv.images.declared import declared_images
from mlenv.images.inputs import Inputs, check_context, pack

Repo = Callable[..., Path]
Packed = Callable[[Path], tuple[Inputs, Path]]

AMD = "amd64"
ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_context_holds_the_declared_files_alone(repo: Repo, packed: Packed, wheel: Path) -> None:
    folder = repo(python_packages=["zebra==2", "ape==1.0"])
    (folder / "my_ranker" / "__pycache__").mkdir()
    (folder / "my_ranker" / "__pycache__" / "model.pyc").write_text("")
    (folder / "notes.txt").write_text("not asked for")
    inputs, context = packed(folder)
    assert sorted(inputs.files) == ["files/my_ranker/model.py", f"mlenv/{wheel.name}", "packages.txt"]
    assert (context / "packages.txt").read_text() == "ape==1.0\nzebra==2\n"
    assert inputs.pinned == {"ape": "1.0", "zebra": "2"}
    check_context(context, inputs)


def test_the_tag_is_the_hash_of_every_input(repo: Repo, packed: Packed) -> None:
    """Each of these changes leads to another tag, and going back to the first one."""
    lock = repo().parent / "lock.txt"
    lock.write_text("ape==1.0\n")

    def tags() -> Iterator[str]:
        first, _ = packed(repo(lock=str(lock)))
        yield first.tag("sha256:1", AMD)
        yield first.tag("sha256:2", AMD)
        yield first.tag("sha256:1", "arm64")
        lock.write_text("ape==1.1\n")
        yield packed(repo(lock=str(lock)))[0].tag("sha256:1", AMD)
        lock.write_text("ape==1.0\n")
        for keys in (
            {"environment": {"A": "b"}},
            {"user": "1000"},
            {"smoke_test": ["true"]},
            {"labels": {"a": "b"}},
            {"accelerator": "cuda"},
        ):
            yield packed(repo(lock=str(lock), **keys))[0].tag("sha256:1", AMD)
        folder = repo(lock=str(lock))
        (folder / "my_ranker" / "model.py").write_text("WIDTH = 16\n")
        yield packed(folder)[0].tag("sha256:1", AMD)
        folder = repo(lock=str(lock))
        (folder / "my_ranker" / "model.py").chmod(0o755)
        yield packed(folder)[0].tag("sha256:1", AMD)

    found = list(tags())
    assert len(set(found)) == len(found) == 11
    folder = repo(lock=str(lock))
    (folder / "my_ranker" / "model.py").chmod(0o644)
    assert packed(folder)[0].tag("sha256:1", AMD) == found[0]


def test_what_is_refused_is_named_at_once(repo: Repo, packed: Packed) -> None:
    lock = repo().parent / "lock.txt"
    lock.write_text("torch==2.13.0\ntorchrec==1.2.0  # old\nfbgemm-gpu==1.8.0\nfastapi==0.1\npolars>=1\n")
    folder = repo(lock=str(lock), files=["nowhere"], extras=["ray"], left_out=["torch"], wheels=str(lock.parent / "none"))
    with pytest.raises(Problems) as caught:
        packed(folder)
    text = str(caught.value)
    for part in (
        "lock.txt, line 5: expected a package with its version, name==1.2.3. Received: 'polars>=1'",
        "images.tiny.wheels: expected a folder with wheels",
        "images.tiny.files: expected a file or folder",
        "images.tiny.lock: expected versions that are built for each other. Received: 'torch 2.13.0 with torchrec 1.2.0 with fbgemm 1.8.0'",
        "images.tiny.lock: expected the build of fbgemm for cpu. Received: 'fbgemm-gpu'. Fix: take fbgemm-gpu-cpu",
        "images.tiny.extras: expected a package of the lock. Received: 'ray'",
    ):
        assert part in text
    lock.write_text("torch==2.12.0\n")
    with pytest.raises(Problems, match=r"expected torch==2\.13\.\*, which mlenv asks for\. Received: 'torch==2\.12\.0'"):
        packed(repo(lock=str(lock), left_out=["fastapi"]))


def test_a_link_out_of_the_repo_is_refused(repo: Repo, packed: Packed, tmp_path: Path) -> None:
    folder = repo()
    (tmp_path / "password").write_text("x")
    (folder / "my_ranker" / "data").symlink_to(tmp_path / "password")
    with pytest.raises(Problems, match="expected files inside the repo"):
        packed(folder)


def test_the_catalogue_packs(tmp_path: Path, wheel: Path) -> None:
    """Its locks hold what mlenv asks for, in versions that go together; no image holds what only another needs."""
    (tmp_path / "mlenv.yaml").write_text(
        yaml.safe_dump({"images": {name: {"extends": name, "mlenv": str(wheel)} for name in declared_images(tmp_path)}})
    )
    images = {name: pack(declared, tmp_path / name).pinned for name, declared in declared_images(tmp_path).items()}
    assert "torch" not in images["serve-cpu"]
    assert {"ray"} & images["ray-worker"].keys()
    assert not {"ray", "pytest", "fbgemm-gpu"} & images["train-cpu"].keys()
    assert "fbgemm-gpu" in images["train-cuda"]
    assert {"fbgemm-gpu-cpu", "fbgemm-gpu"} & images["serve-cuda"].keys() == set()
    assert (ROOT / "images/locks/dev.txt").read_text() == (ROOT / "requirements/cpu.txt").read_text(), "run make lock"
    shared = images["train-cpu"].keys() & images["dev"].keys()
    assert {name: images["train-cpu"][name] for name in shared} == {name: images["dev"][name] for name in shared}


def test_inputs_cross_machines_as_json(repo: Repo, packed: Packed) -> None:
    inputs, _ = packed(repo())
    again = Inputs.from_plain(json.loads(json.dumps(inputs.to_plain())))
    assert again == inputs
    assert again.digest("sha256:1", AMD) == inputs.digest("sha256:1", AMD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "expected name, spec, files and pinned"),
        ({"name": "a b"}, "name: expected a name"),
        ({"files": {"../../etc/passwd": "0"}}, "expected paths inside the context"),
        ({"files": {"/etc/passwd": "0"}}, "expected paths inside the context"),
        ({"files": {"mlenv/a.whl; curl": "0"}}, "files: expected one wheel of mlenv"),
        ({"files": {"a": 1}}, "files: expected a mapping of texts"),
        ({"spec": {"mlenv": "1.0 && curl"}}, "spec: expected no paths"),
        ({"spec": {"lock": "/etc/passwd"}}, "spec: expected no paths"),
        ({"spec": {"base": "a:1\nRUN curl"}}, "base: expected an image"),
        ({"spec": {"more": 1}}, "more: expected a key of ImageSpec"),
    ],
)
def test_tampered_inputs_are_refused(repo: Repo, packed: Packed, change: dict[str, Any], message: str) -> None:
    plain = packed(repo())[0].to_plain()
    with pytest.raises(MlenvError, match=message):
        Inputs.from_plain({**plain, **change, **({"spec": plain["spec"] | change["spec"]} if "spec" in change else {})})


def test_a_tampered_context_is_refused(repo: Repo, packed: Packed) -> None:
    inputs, context = packed(repo(python_packages=["ape==1.0"]))
    (context / "more").write_text("")
    with pytest.raises(DataError, match=r"context: more: expected no such file"):
        check_context(context, inputs)
    (context / "more").unlink()
    (context / "packages.txt").write_text("ape==1.0\n--index-url=http://it\n")
    with pytest.raises(DataError, match=r"context: packages\.txt"):
        check_context(context, inputs)


def test_mlenv_is_a_version_or_a_path(repo: Repo, packed: Packed) -> None:
    inputs, _ = packed(repo(mlenv="1.2.3"))
    assert "--root /mlenv-root mlenv==1.2.3" in inputs.dockerfile
    with pytest.raises(Problems, match="write a path with a slash"):
        packed(repo(mlenv="latest"))
    with pytest.raises(Problems, match="expected a wheel that is there"):
        packed(repo(mlenv="./none.whl"))


def test_config_error_of_nothing() -> None:
    with pytest.raises(ConfigError, match="inputs"):
        Inputs.from_plain([])
