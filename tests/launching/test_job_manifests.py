"""Jobs for schedulers: manifests against a schema of what Kubernetes takes, and the batch script as bash runs it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.errors import DONE, FAILED, GATE, STOPPED, WRONG_INPUT, Problems
from mlenv.launching.job_manifests import render
from mlenv.launching.job_submit import check_job

SCHEMAS = Path(__file__).parent / "job_schemas"
ARGUMENTS = ["train", "config.yaml", "data.train={end: 2026-01-02}"]
KUBERNETES = ["job.image=registry.example/ranker:1", "job.claims={data: /data, runs: /runs}", "output=/runs/a b"]
FULL = [
    *KUBERNETES,
    "job={nodes: 3, cpus_per_node: 8, gpus_per_node: 2, memory_gib_per_node: 64, time_limit_minutes: 90, namespace: ads}",
    "job.env={A: 'x y', B: '$C'}",
    "job.labels={team: ads}",
    "job.service_account=trainer",
]
ON_RAY = ["launch=ray", "launch.num_processes=6", "launch.gpus_per_process=1", "launch.cpus_per_process=4"]
BY_TORCHRUN = ["launch.num_processes=2"]


@pytest.fixture
def rendered(demo_arguments):
    file, *_ = demo_arguments()

    def run(kind: str, *settings: str) -> str:
        return render(compose(file, ["name=The model, 2", *settings]), kind, ARGUMENTS)

    return run


def check(manifest: dict, kind: str) -> None:
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(manifest)] == []


@pytest.mark.parametrize(("kind", "launch"), [("rayjob", ON_RAY), ("pytorchjob", BY_TORCHRUN)])
def test_manifests_are_what_kubernetes_takes(rendered, kind, launch):
    small = ["launch=ray"] if kind == "rayjob" else []
    for settings in ([*FULL, *launch], [*KUBERNETES, *small]):
        check(yaml.safe_load(rendered(kind, *settings)), kind)
    wrong = yaml.safe_load(rendered(kind, *KUBERNETES, *small))
    wrong["spec"]["entrypont"] = "x"
    with pytest.raises(AssertionError, match="entrypont"):
        check(wrong, kind)


def test_a_ray_job_has_the_machines_and_the_command(rendered):
    manifest = yaml.safe_load(rendered("rayjob", *FULL, *ON_RAY))
    assert manifest["metadata"] == {
        "name": "the-model-2",
        "labels": {"app.kubernetes.io/managed-by": "mlenv", "team": "ads"},
        "namespace": "ads",
    }
    spec = manifest["spec"]
    assert spec["entrypoint"] == "mlenv train config.yaml 'data.train={end: 2026-01-02}' launch.address=auto"
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (3, 5400)
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    for template in (workers["template"], spec["rayClusterSpec"]["headGroupSpec"]["template"]):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
        assert container["env"] == [{"name": "A", "value": "x y"}, {"name": "B", "value": "$C"}]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        claims = {volume["persistentVolumeClaim"]["claimName"]: mounts[volume["name"]] for volume in template["spec"]["volumes"]}
        assert claims == {"data": "/data", "runs": "/runs"}
        assert template["spec"]["serviceAccountName"] == "trainer"


def test_a_pytorch_job_runs_torchrun_on_every_node(rendered):
    specs = yaml.safe_load(rendered("pytorchjob", *FULL, *BY_TORCHRUN))["spec"]["pytorchReplicaSpecs"]
    assert {name: entry["replicas"] for name, entry in specs.items()} == {"Master": 1, "Worker": 2}
    commands = [entry["template"]["spec"]["containers"][0]["command"] for entry in specs.values()]
    assert commands[0] == commands[1]
    assert commands[0][:4] == ["torchrun", "--nnodes=3", "--nproc-per-node=2", "--node-rank=$(RANK)"]
    assert commands[0][-5:] == ["-m", "mlenv", *ARGUMENTS]
    assert list(yaml.safe_load(rendered("pytorchjob", *KUBERNETES))["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize(("kind", "launch"), [("rayjob", ["launch=ray"]), ("pytorchjob", [])])
def test_every_pod_runs_the_image_of_a_digest(rendered, kind, launch):
    image = f"registry.example:5000/ranker@sha256:{'0a' * 32}"
    manifest = yaml.safe_load(rendered(kind, *KUBERNETES, *launch, f"job.image={image}", "job.nodes=2"))
    check(manifest, kind)

    def images(node):
        if isinstance(node, dict):
            return [*([node["image"]] if "image" in node else []), *(found for entry in node.values() for found in images(entry))]
        return [found for entry in node for found in images(entry)] if isinstance(node, list) else []

    assert images(manifest) == [image, image]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("rayjob", KUBERNETES, "launch.kind: expected ray in a rayjob. Received: 'torchrun'. Fix: add launch=ray"),
        ("slurm", ["launch=ray"], "launch.kind: expected torchrun in a slurm"),
        ("rayjob", ["launch=ray", *KUBERNETES[1:]], "job.image: expected a container image"),
        ("rayjob", ["launch=ray", *KUBERNETES, "output=work/a"], "output: expected a folder of job.claims (/data, /runs)"),
        ("rayjob", ["launch=ray", *KUBERNETES, "launch.num_processes=2"], "job.cpus_per_node: expected 2 cpus on all nodes. Received: 1"),
        ("pytorchjob", [*KUBERNETES, "job.gpus_per_node=4"], "launch.num_processes: expected job.gpus_per_node, 4"),
        ("slurm", ["launch.num_processes=2"], "job.cpus_per_node: expected at least 2"),
        ("pytorchjob", [*KUBERNETES, "name=--"], "name: expected letters or digits"),
        ("slurm", ["job.claims={data: there}"], "job.claims.data: expected an absolute folder"),
        ("slurm", ["job.claims={My_Data: /data}"], "job.claims.My_Data: expected a name of Kubernetes"),
        ("slurm", ["job.env={'a b': c}"], "job.env: expected names of environment variables. Received: 'a b'"),
        ("slurm", ["job.partition='a b'"], "job.partition: expected a name of Slurm"),
        ("slurm", ["job.image=registry.example/ranker@sha256:abc"], "job.image: expected NAME:TAG or NAME@sha256:DIGEST"),
        ("slurm", ["job.image=a b"], "job.image: expected NAME:TAG or NAME@sha256:DIGEST"),
        ("slurm", ["job.nodes=0"], "job.nodes: expected a number >= 1"),
    ],
)
def test_what_a_scheduler_would_refuse_is_refused(rendered, kind, settings, message):
    with pytest.raises(Problems) as caught:
        rendered(kind, *settings)
    assert message in str(caught.value)


@pytest.fixture
def run_script(rendered, tmp_path):
    """The script as Slurm runs it, with programs in the place of Slurm's that write down what they are asked."""

    def run(*exit_codes: int, settings: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        asked = ["job={nodes: 2, cpus_per_node: 4, env: {A: 'x y'}}", "launch={num_processes: 2, max_restarts: 2}"]
        script = rendered("slurm", *asked, *settings)
        (tmp_path / "job.sh").write_text(script)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in exit_codes))
        programs = {
            "srun": 'echo "srun $A $MASTER_ADDR $MASTER_PORT" >> called; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "${@:3}"\n'
            "code=$(head -n 1 codes); sed -i 1d codes; exit $code",
            "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*" >> called; fi',
            "apptainer": 'echo "apptainer $*" >> called; while [ "$1" != mlenv ]; do shift; done; exec "$@"',
            "mlenv": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE mlenv $*" >> called',
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "called").write_text("")
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node-[a-b]"}
        process = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return process.returncode, (tmp_path / "called").read_text().splitlines(), process.stderr

    return run


def test_each_process_of_a_batch_script_knows_its_place(run_script):
    code, called, said = run_script(DONE)
    assert (code, said) == (DONE, "")
    assert called == ["srun x y node-a 20007", "3 1 4 mlenv train config.yaml data.train={end: 2026-01-02}"]


@pytest.mark.parametrize(("gpus", "options"), [(0, ""), (2, "--nv ")])
def test_each_process_of_a_batch_script_runs_in_its_image(run_script, gpus, options):
    image = f"registry.example/ranker@sha256:{'0a' * 32}"
    code, called, said = run_script(DONE, settings=(f"job.image={image}", f"job.gpus_per_node={gpus}"))
    assert (code, said) == (DONE, "")
    assert called[1].startswith(f"apptainer exec {options}docker://{image} mlenv train config.yaml ")
    assert called[2].startswith("3 1 4 mlenv train config.yaml ")


@pytest.mark.parametrize(
    ("codes", "expected", "requeues"),
    [
        ((WRONG_INPUT,), WRONG_INPUT, False),
        ((GATE,), GATE, False),
        ((STOPPED,), STOPPED, True),
        ((137, STOPPED), STOPPED, True),
        ((137, FAILED, DONE), DONE, False),
        ((137, 137, 137), 137, False),
    ],
)
def test_a_batch_script_tries_again_stops_and_is_put_back_into_the_queue(run_script, codes, expected, requeues):
    code, called, said = run_script(*codes)
    assert code == expected
    assert sum(line.startswith("srun") for line in called) == len(codes)
    assert ("scontrol requeue 20007" in called) is requeues
    assert said.count("ended with exit code") == sum(code in (FAILED, 137) for code in codes)


def test_a_batch_script_asks_slurm_for_the_machines(rendered):
    script = rendered("slurm", "job={nodes: 2, cpus_per_node: 9, gpus_per_node: 4, memory_gib_per_node: 7}", "launch.num_processes=4")
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    machines = {"job-name=the-model-2", "nodes=2", "ntasks-per-node=4", "cpus-per-task=2", "gpus-per-node=4", "mem=7G"}
    assert asked == machines | {"signal=USR1@120", "open-mode=append", "requeue"}
    assert "#SBATCH --time=30\n" in rendered("slurm", "job.time_limit_minutes=30")


def test_a_job_is_rendered_by_the_command_line(demo_arguments, tmp_path, capsys):
    file, *settings = demo_arguments("job.cpus_per_node=2")
    out = tmp_path / "job.sh"
    assert main(["job", "render", file, "--kind", "slurm", "--out", str(out), *settings, "--dry-run"]) == DONE
    shown = capsys.readouterr().out
    assert not out.exists()
    assert main(["job", "render", file, "--kind", "slurm", "--out", str(out), *settings]) == DONE
    assert out.read_text() == shown
    assert f"mlenv train {shlex.quote(str(file))} data.batch_size=128" in shown
    with pytest.raises(SystemExit, match=str(WRONG_INPUT)):
        main(["job", "render", file, "--kind", "rayjobs", "--out", str(out)])


def test_a_job_that_is_submitted_names_paths_of_the_cluster(demo_arguments, tmp_path, capsys):
    file, *settings = demo_arguments("launch=ray")
    address = "http://127.0.0.1:9"
    assert main(["job", "submit", file, "--address", address, *settings]) == WRONG_INPUT
    assert "--address: expected the address of a Ray cluster's dashboard that answers" in capsys.readouterr().err
    assert main(["job", "submit", file, "--address", address, *settings, "--dry-run"]) == DONE
    with pytest.raises(Problems, match=r"(?s)launch.kind: expected ray.*output: expected a path that is the same on every node"):
        check_job(compose(file, [*settings, "launch=torchrun", "output=work/a"]))
