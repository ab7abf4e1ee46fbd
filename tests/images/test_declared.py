"""Declarations: over the catalogue, in one of two files, and refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mlenv.errors import ConfigError, Problems
from mlenv.images.declared import CATALOGUE, declared_images, find_image
from mlenv.images.spec import ImageSpec, pins


def declare(folder: Path, text: str, file: str = "mlenv.yaml") -> Path:
    (folder / file).write_text(text)
    return folder


def test_the_catalogue_is_there_without_a_file(tmp_path: Path) -> None:
    images = declared_images(tmp_path)
    assert set(images) == {"train-cpu", "train-cuda", "serve-cpu", "serve-cuda", "ray-worker", "dev"}
    assert all(Path(image.spec.lock).is_file() for image in images.values())
    assert images["train-cuda"].spec.extras == images["train-cpu"].spec.extras == ("torchrec",)


def test_an_image_extends_another_key_by_key(tmp_path: Path) -> None:
    declare(
        tmp_path,
        """
pipeline: {whatever: belongs to others}
images:
  trainer: {extends: train-cpu, files: [config.yaml], environment: {A: b}}
  nightly: {extends: trainer, lock: own.txt}
  dev: {extends: dev, user: '1000'}
""",
    )
    images = declared_images(tmp_path)
    assert images["nightly"].spec.files == ("config.yaml",)
    assert images["nightly"].spec.lock == str(tmp_path / "own.txt")
    assert images["trainer"].spec.lock == str(CATALOGUE.parent.resolve() / "locks/train-cpu.txt")
    assert images["dev"].spec.user == "1000"
    assert images["dev"].spec.extras == ("torchrec", "ray")


def test_pyproject_says_the_same(tmp_path: Path) -> None:
    declare(
        tmp_path,
        '[tool.mlenv.images.trainer]\nextends = "train-cpu"\nfiles = ["config.yaml"]\nmlenv = "./mlenv-1.0.whl"\n',
        "pyproject.toml",
    )
    spec = find_image(tmp_path, "trainer").spec
    assert (spec.files, spec.mlenv) == (("config.yaml",), str(tmp_path / "mlenv-1.0.whl"))
    declare(tmp_path, "images: {trainer: {extends: dev}}")
    with pytest.raises(ConfigError, match=r"images in mlenv\.yaml or in pyproject\.toml"):
        declared_images(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bse": "python:3"}, r"images\.it\.bse: expected a key of ImageSpec.*did you mean 'base'"),
        ({"extends": "train-gpu"}, r"images\.it\.extends: expected another image\. Received: 'train-gpu'\. Fix: did you mean 'train-cpu'"),
        ({"extends": "it"}, r"images\.it\.extends"),
        ({"base": "python"}, r"images\.it\.base: expected an image with a tag or a digest"),
        ({"base": "python:3 && rm"}, r"images\.it\.base: expected an image, such as"),
        ({"accelerator": "tpu"}, r"images\.it\.accelerator: expected one of \['cpu', 'cuda'\]"),
        ({"python_packages": ["polars"]}, r"images\.it\.python_packages: expected a package with its version.*pin it"),
        ({"python_packages": ["x==1 --index-url=http://it"]}, r"python_packages"),
        ({"system_packages": ["git; curl"]}, r"system_packages: expected a Debian package"),
        ({"user": "root"}, r"user: expected the number of a user"),
        ({"user": "0:0"}, r"user: expected a user that is not root"),
        ({"files": ["../other"]}, r"files: expected a path inside the repo"),
        ({"files": ["/etc/passwd"]}, r"files: expected a path"),
        ({"labels": {"a": "b\nRUN c"}}, r"labels: expected text in one line"),
        ({"environment": {"A B": "c"}}, r"environment: expected the name of an environment variable"),
    ],
)
def test_what_cannot_be_declared(tmp_path: Path, image: dict[str, object], message: str) -> None:
    declare(tmp_path, yaml.safe_dump({"images": {"it": image}}))
    with pytest.raises(Problems, match=message):
        declared_images(tmp_path)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    declare(tmp_path, "images: {one: {user: '0'}, Two: {}, three: {extends: four}, four: {extends: three}}")
    with pytest.raises(Problems) as caught:
        declared_images(tmp_path)
    places = [str(problem).partition(":")[0] for problem in caught.value.problems]
    assert places == ["images.one.user", "images.Two", "images.four.extends", "images.three.extends"]


@pytest.mark.parametrize(
    ("file", "text"), [("mlenv.yaml", "images: ["), ("mlenv.yaml", "[1]"), ("pyproject.toml", "a b"), ("mlenv.yaml", "images: [1]")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, file: str, text: str) -> None:
    with pytest.raises(ConfigError, match=file):
        declared_images(declare(tmp_path, text, file))


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image: expected one that .*Received: 'train'\. Fix: did you mean 'train-cpu'"):
        find_image(tmp_path, "train")


def test_pins_and_the_smoke_test() -> None:
    assert pins(["# comment", "Torch_Rec==1.8.0", "a[b]==2", "polars>=1"]) == {"torch-rec": "1.8.0", "a": "2"}
    spec = ImageSpec(extras=("ray",), left_out=("torch",))
    assert spec.smoke_command == ("mlenv", "doctor", "--json", "--need", "ray", "--without", "torch")
