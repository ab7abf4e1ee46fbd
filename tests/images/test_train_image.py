"""From a declaration to a training on two containers: the catalogue's train-cpu, for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_servers import host_of, may_start_engines, registry, second_engine

from mlenv.cli import main
from mlenv.images.kept import bill_of_materials, describe

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = [pytest.mark.engine, pytest.mark.long]


def unpacked_bytes(wheels: Path) -> int:
    return sum(entry.file_size for wheel in wheels.glob("*.whl") for entry in zipfile.ZipFile(wheel).infolist())


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def model_repo(
    tmp_path: Path, ads: Path, tiny_config: str, python_base: str, session_labels: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A config, the catalogue's image over this machine's Python, and the wheels of its lock."""
    folder = tmp_path / "model repo"
    (folder / "work").mkdir(parents=True)
    shutil.copytree(ads, folder / "work" / "ads")
    (folder / "config.yaml").write_text(tiny_config.replace(str(ads), "work/ads") + "tracking: {enabled: false}\n")
    wheels = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(tmp_path / "wheels")]
    python = sys.executable if (Path(sys.prefix) / "bin" / "pip").exists() else "python3"
    subprocess.run([python, *wheels, "-r", str(ROOT / "images/locks/train-cpu.txt")], check=True)
    image = {
        "extends": "train-cpu",
        "base": python_base,
        "wheels": str(tmp_path / "wheels"),
        "files": ["config.yaml"],
        "system_packages": [],
        "labels": session_labels,
    }
    (folder / "mlenv.yaml").write_text(yaml.safe_dump({"images": {"trainer": image}}))
    monkeypatch.chdir(folder)
    return folder


def test_a_repo_trains_in_its_image_as_it_does_outside(
    engine: Any, model_repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_start_engines():
        pytest.skip("a second engine is started beside the one of tests/images/with_engine.sh alone")

    with registry(tmp_path) as address:
        assert main(["image", "build", "trainer", "--registry", f"{address}/team", "--network", "none", "--push"]) == 0
        digest = capfd.readouterr().out.splitlines()[-1]
        assert digest.startswith(f"{address}/team/trainer@sha256:")
        kept = describe(engine, digest)
        ratio = kept.size_bytes / unpacked_bytes(tmp_path / "wheels")
        names = {component["name"] for component in bill_of_materials(engine, digest)["components"]}
        assert ratio < 1.15
        assert {"torch", "torchrec", "fbgemm-gpu-cpu", "mlenv"} <= names
        reference = kept.reference
        with Path("config.yaml").open("a") as config:
            config.write("# one line more\n")
        start = time.perf_counter()
        assert main(["image", "build", "trainer", "--network", "none"]) == 0
        seconds = time.perf_counter() - start
        before, after = (engine.images.get(one).attrs["RootFS"]["Layers"] for one in (reference, capfd.readouterr().out.splitlines()[-1]))
        assert before[:-1] == after[:-1]
        assert seconds < 20, f"a changed line took {seconds:.1f} s"
        engine.api.prune_builds()  # room for a second copy of everything
        outside = ["train", "config.yaml", "output=work/outside"]
        subprocess.run([sys.executable, "-m", "mlenv", *outside], check=True)

        with second_engine() as home, monkeypatch.context() as patch:
            patch.setenv("DOCKER_HOST", host_of(home))
            capfd.readouterr()
            assert main(["image", "list"]) == 0
            assert capfd.readouterr().out == ""
            assert main(["image", "pull", digest]) == 0
            inside = ["--network", "none", "--data", "work/ads", "--out", "work/inside", "--", "mlenv", "train", "config.yaml"]
            assert main(["image", "run", digest, *inside, "output=work/inside"]) == 0
        assert metrics(Path("work/inside")) == metrics(Path("work/outside"))
        owner = Path("work/inside/metrics.json").stat()
        assert (owner.st_uid, owner.st_gid) == (os.getuid(), os.getgid())

    torchrun_over_two_containers(engine, reference)


def torchrun_over_two_containers(engine: Any, reference: str) -> None:
    """One process in each, which find each other by name on a network that leads nowhere else."""
    network = engine.networks.create("mlenv-test", internal=True)
    try:
        containers = []
        for rank in range(2):
            rendezvous = [f"--node-rank={rank}", "--nnodes=2", "--nproc-per-node=1", "--master-addr=mlenv-test-0", "--master-port=29500"]
            command = ["mlenv", "image", "run", reference, "--network", "mlenv-test", "--container", f"mlenv-test-{rank}"]
            mounts = ["--data", "work/ads", "--out", "work/two", "--env", "OMP_NUM_THREADS=1"]
            train = ["--", "torchrun", *rendezvous, "-m", "mlenv", "train", "config.yaml", "output=work/two", "embeddings.engine=torchrec"]
            containers.append(
                subprocess.Popen([sys.executable, "-m", *command, *mounts, *train], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        said = [container.communicate(timeout=300)[0].decode() for container in containers]
        assert [container.returncode for container in containers] == [0, 0], "\n".join(said)
    finally:
        network.remove()
    assert metrics(Path("work/two")) == pytest.approx(metrics(Path("work/outside")), rel=1e-6)
    sharding = json.loads(Path("work/two/sharding.json").read_text())
    assert {shard["rank"] for table in sharding.values() for shard in table["shards"]} == {0, 1}  # a table in each container
