"""Building with a real engine: once, small steps, nothing left of a failure."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlenv.errors import ConfigError, ImageError
from mlenv.images.build import BuildOptions, Image, base_of
from mlenv.images.kept import bill_of_materials, describe, kept_images, old_images
from mlenv.images.run import RunOptions, run

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Repo = Callable[..., Path]
Built = Callable[..., tuple[Image, list[str]]]

CERTIFICATES = "-----BEGIN CERTIFICATE----- planted-8c1f0e"


def printed(engine: Any, reference: str, *command: str) -> str:
    out = io.BytesIO()
    assert run(engine, reference, command, RunOptions(), out) == 0
    return out.getvalue().decode()


def layers(engine: Any, reference: str) -> bytes:
    """Every layer and the settings of an image, one after the other."""
    archive = io.BytesIO(b"".join(engine.images.get(reference).save(chunk_size=None)))
    everything = b""
    with tarfile.open(fileobj=archive) as opened:
        for member in opened:
            file = opened.extractfile(member)
            everything += file.read() if file else b""
    return everything


def test_an_image_is_built_once_and_a_changed_line_builds_the_last_layer(engine: Any, repo: Repo, built: Built, tmp_path: Path) -> None:
    secret = tmp_path / "ca.crt"
    secret.write_text(CERTIFICATES)
    folder = repo(environment={"BUILT": "once"})  # no other test has built it
    first, _ = built(folder, secrets={"ca": secret, "pip": secret, "netrc": secret})
    assert first.is_new

    start = time.perf_counter()
    second, log = built(folder)
    assert second == Image(first.reference)
    assert log == []
    assert time.perf_counter() - start < 2

    (folder / "my_ranker" / "model.py").write_text("WIDTH = 16\n")
    start = time.perf_counter()
    third, log = built(folder)
    assert third.is_new
    assert time.perf_counter() - start < 20
    steps = {line.partition(" ")[0]: line for line in log if " RUN " in line or " COPY " in line}
    anew = [step for number, step in steps.items() if f"{number} CACHED" not in log]
    assert ["COPY files /app" in step for step in anew] == [True]
    before, after = (engine.images.get(image.reference).attrs["RootFS"]["Layers"] for image in (first, third))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]

    assert printed(engine, third.reference, "cat", "my_ranker/model.py") == "WIDTH = 16\n"
    assert engine.images.get(third.reference).attrs["Config"]["User"] == "10001:10001"
    assert CERTIFICATES.encode() not in layers(engine, first.reference)

    kept = describe(engine, third.reference)
    assert kept.labels["mlenv.name"] == "tiny"
    assert kept.labels["mlenv.inputs"].startswith(third.reference.partition(":")[2])
    assert [component["name"] for component in bill_of_materials(engine, third.reference)["components"]] == ["mlenv"]
    tiny = [image for image in kept_images(engine) if image.reference in (first.reference, third.reference)]
    assert [image.reference for image in tiny] == [third.reference, first.reference]
    assert old_images(tiny, keep=1) == tiny[1:]


def test_the_layers_hold_what_is_planted_in_a_file(engine: Any, repo: Repo, built: Built) -> None:
    """Or the search for a secret above would find nothing in any image."""
    folder = repo(entry_point=["nowhere"])  # which the smoke test does without
    (folder / "my_ranker" / "certificate.txt").write_text(CERTIFICATES)
    image, _ = built(folder)
    assert CERTIFICATES.encode() in layers(engine, image.reference)


def names_of_images(engine: Any) -> set[str]:
    return {name for image in engine.images.list() for name in image.tags or [image.id]}


def test_a_smoke_test_that_fails_leaves_no_image(engine: Any, repo: Repo, built: Built) -> None:
    built(repo())
    before = names_of_images(engine)
    with pytest.raises(ImageError, match=r"images\.tiny: smoke test .*: expected exit code 0\. Received: '3: no such column'"):
        built(repo(smoke_test=["python", "-c", "print('no such column'); raise SystemExit(3)"]))
    with pytest.raises(ImageError, match=r"smoke test 'nowhere': expected a command that starts"):
        built(repo(smoke_test=["nowhere"]))
    assert names_of_images(engine) == before


def test_a_package_that_does_not_exist(engine: Any, repo: Repo, built: Built, wheel: Path) -> None:
    before = names_of_images(engine)
    with pytest.raises(ImageError, match=r"expected packages that there are\. Received: 'no-such-package==1\.0'\. Fix: correct the name"):
        built(repo(python_packages=["no-such-package==1.0"], wheels=str(wheel.parent)))
    assert names_of_images(engine) == before


def test_a_build_that_fails_half_way_or_takes_too_long(engine: Any, repo: Repo, built: Built) -> None:
    before = names_of_images(engine)
    with pytest.raises(ImageError, match=r"images\.tiny: build: expected a build that ends well\. Received: '.*apt-get: not found"):
        built(repo(system_packages=["git"]))
    with pytest.raises(ImageError, match=r"expected an end within 0\.001 minutes"):
        built(repo(environment={"NEW": "yes"}), timeout_minutes=0.001)
    assert names_of_images(engine) == before
    assert built(repo())[0].reference


def test_an_unknown_base(engine: Any) -> None:
    with pytest.raises(ImageError, match=r"images\.tiny\.base: expected an image\. Received: 'localhost:1/nobody:1: .*Fix: name an image"):
        base_of(engine, "tiny", "localhost:1/nobody:1")


def test_secrets_are_files_of_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--secret: expected one of ca, pip, apt, netrc"):
        BuildOptions(secrets={"password": tmp_path})
    with pytest.raises(ConfigError, match="--secret ca: expected a file"):
        BuildOptions(secrets={"ca": tmp_path})
