"""The page about a machine: each thing held to its limits, and the whole in a folder of few packages, without any program."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from mlenv.cli import main
from mlenv.condition import Condition, is_fine
from mlenv.doctor import compatibility_conditions, compatible_versions, installed_versions, package_condition
from mlenv.errors import DONE, FAILED, WRONG_INPUT
from mlenv.machine_conditions import disk_condition, judge_accelerator, judge_cores, shared_memory_condition
from mlenv.server_conditions import mlflow_condition, ray_condition

ROWS = [{"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"}, {"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm": "1.7.0"}]


@pytest.mark.parametrize(
    ("version", "specifier", "is_needed", "severity", "found"),
    [
        ("2.13.0+cpu", "==2.13.*", True, "pass", "2.13.0+cpu"),
        ("2.14.0", "==2.13.*", True, "fail", "2.14.0, but mlenv asks for ==2.13.*"),
        ("2.14.0", "==2.13.*", False, "fail", "2.14.0, but mlenv asks for ==2.13.*"),
        ("1.9.0a1", ">=1.8", False, "pass", "1.9.0a1"),
        ("", "==1.8.*", True, "fail", "not installed"),
        ("", "==1.8.*", False, "pass", "not installed"),
    ],
)
def test_a_package_is_held_to_what_mlenv_asks_for(version, specifier, is_needed, severity, found):
    condition = package_condition("torch", version, specifier, is_needed=is_needed, install="pip install it")
    assert condition == Condition("torch", severity, found, "pip install it" if severity == "fail" else "")


@pytest.mark.parametrize(
    ("versions", "severity", "words"),
    [
        ({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"}, "pass", "go together"),
        ({"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm": "1.7.0"}, "pass", "go together"),
        ({"torch": "2.13.0"}, "pass", "torch 2.13.0 is tested"),
        ({"torch": "2.13.0", "torchrec": "1.7.0", "fbgemm": "1.7.0"}, "fail", "install torchrec 1.8.0 and fbgemm 1.8.0"),
        ({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.7.0"}, "fail", "install torchrec 1.8.0 and fbgemm 1.8.0"),
        ({"torch": "2.11.0", "torchrec": "1.8.0"}, "fail", "install torch 2.13.0, 2.12.0"),
        ({"torch": "2.11.0"}, "warn", "install torch 2.13.0, 2.12.0"),
    ],
)
def test_versions_that_do_not_fit_are_found(versions, severity, words):
    (condition,) = compatibility_conditions(versions, ROWS)
    assert condition.severity == severity
    assert words in f"{condition.found} {condition.fix}"


def test_what_is_installed_here_goes_together():
    versions = installed_versions()
    assert {"torch", "torchrec", "fbgemm"} <= set(versions)
    (condition,) = compatibility_conditions(versions, compatible_versions())
    assert condition.severity == "pass"
    assert list(compatibility_conditions({"ray": "2.60"}, ROWS)) == []


@pytest.mark.parametrize(
    ("cuda", "gpus", "driver", "is_needed", "severity", "words"),
    [
        ("12.8", ["A, 80 GiB"], "570.1", True, "pass", "A, 80 GiB; CUDA 12.8, driver 570.1"),
        ("12.8", ["A", "A"], "", False, "pass", "2 x A; CUDA 12.8, driver unknown"),
        ("12.8", [], "470.1", False, "warn", "a newer driver"),
        ("12.8", [], "470.1", True, "fail", "a newer driver"),
        ("", [], "570.1", False, "warn", "install torch for CUDA"),
        ("", [], "", False, "pass", "compute on the CPU"),
        ("", [], "", True, "fail", "run where there is a GPU"),
    ],
)
def test_an_accelerator_is_judged(cuda, gpus, driver, is_needed, severity, words):
    condition = judge_accelerator(cuda, gpus, driver, is_needed=is_needed)
    assert condition.severity == severity
    assert "take driver 580 or newer" in judge_accelerator("13.0", [], "470.1", is_needed=is_needed, least_driver="580").fix
    assert words in f"{condition.found} {condition.fix}"


@pytest.mark.parametrize(("threads", "severity"), [("", "pass"), ("2", "pass"), ("3", "warn"), ("all", "pass")])
def test_more_threads_than_cores_are_looked_at(threads, severity):
    assert judge_cores(2, threads).severity == severity


def test_room_is_measured_where_the_folder_would_be(tmp_path):
    condition = disk_condition("disk", tmp_path / "not" / "there", fail=0, warn=0)
    assert condition.severity == "pass"
    assert condition.found.endswith(f"in {tmp_path}")
    assert disk_condition("disk", tmp_path, fail=0, warn=1 << 60).severity == "warn"
    full = disk_condition("disk", tmp_path, fail=1 << 60, warn=1 << 60)
    assert (full.severity, full.fix) == ("fail", f"make room: checkpoints need it in {tmp_path}")
    assert not is_fine([condition, full])
    missing = shared_memory_condition(tmp_path / "shm")
    assert (missing.severity, missing.found) == ("warn", f"{tmp_path / 'shm'} cannot be written")


def test_servers_that_are_not_named_are_not_asked():
    assert [mlflow_condition("").severity, ray_condition("").severity] == ["pass", "pass"]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (lambda: mlflow_condition("http://user:secret@127.0.0.1:9"), "MLflow at http://"),
        (lambda: mlflow_condition("sqlite:////nowhere/mlflow.db"), "no such file"),
        (lambda: ray_condition("http://127.0.0.1:9"), "http://127.0.0.1:9: <urlopen error"),
        (lambda: ray_condition("127.0.0.1:9"), "expected a Ray cluster that answers"),
        (lambda: ray_condition("ray://127.0.0.1:9"), "expected auto, host:port"),
    ],
)
def test_a_server_that_does_not_answer_is_wrong(condition, words):
    found = condition()
    assert found.severity == "fail"
    assert words in found.found
    assert "secret" not in found.found
    assert "Fix" in found.found or found.fix


@pytest.mark.parametrize(
    ("answer", "severity", "words"),
    [
        (f'{{"version": "4", "ray_version": "{metadata.version("ray")}"}}', "pass", "answers, Ray"),
        ('{"version": "4", "ray_version": "1.13.0"}', "fail", "runs Ray 1.13.0, here is"),
        ("<html>another server</html>", "fail", "is no dashboard of Ray"),
    ],
)
def test_a_dashboard_has_the_same_ray(answer, severity, words):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        condition = ray_condition(f"http://127.0.0.1:{server.server_port}/")
        thread.join()
    assert condition.severity == severity
    assert words in condition.found


SLIM = ("mlenv", "packaging", "PyYAML")
"""Packages of a container in which nothing else is."""


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to installed packages, as a container that holds few of them."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "mlenv").symlink_to(Path(__file__).resolve().parent.parent / "mlenv")
    for name in SLIM:
        files = metadata.files(name)
        assert files is not None
        for top in {file.parts[0] for file in files if not file.parts[0].startswith(".") and not file.name.endswith(".pth")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(metadata.distribution(name).locate_file(top))
    return folder


def run_slim(site: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Without any program on the path, and with no package but those of the folder."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from mlenv.cli import main; sys.exit(main())"
    command = [sys.executable, "-I", "-S", "-c", code, "doctor", "--json", *arguments]
    process = subprocess.run(command, cwd=site, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert process.stderr == ""
    shown = json.loads(process.stdout)
    assert (process.returncode == DONE) is shown["is_fine"]
    return process.returncode, {condition["subject"]: condition for condition in shown["conditions"]}


def test_a_slim_container_is_examined(slim):
    code, conditions = run_slim(slim)
    assert code == FAILED
    assert conditions["mlenv"]["severity"] == conditions["python"]["severity"] == "pass"
    assert conditions["torchrec"] == {"subject": "torchrec", "severity": "pass", "found": "not installed", "fix": ""}
    assert (conditions["torch"]["severity"], conditions["torch"]["found"]) == ("fail", "not installed")
    assert conditions["polars"]["severity"] == "fail"
    assert conditions["cores"]["severity"] == "pass"

    left_out = [name for name, condition in conditions.items() if condition["severity"] == "fail"]
    code, conditions = run_slim(slim, *(f"--without={name}" for name in left_out))
    assert code == DONE
    code, conditions = run_slim(slim, *(f"--without={name}" for name in left_out), "--need=ray")
    assert code == FAILED
    assert conditions["ray"]["fix"] == "pip install 'mlenv[ray]'"


def test_a_page_of_this_machine_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["doctor"])
    page = capsys.readouterr().out
    for subject in ("mlenv", "python", "torch", "torchrec", "fbgemm", "lightning", "ray", "mlflow", "compatibility", "accelerator"):
        assert f"\npass  {subject} " in f"\n{page}"
    assert len(page.splitlines()) < 30
    assert main(["doctor", "--dry-run"]) == DONE
    assert capsys.readouterr().out.startswith("would look at versions")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--need", "torchrek"], "--need: expected a package of mlenv. Received: 'torchrek'. Fix: did you mean 'torchrec'"),
        (["--without", "gpu"], "--without: expected a package of mlenv"),
        (["--need", "ray", "--without", "ray"], "--without: expected no package that --need names. Received: 'ray'"),
    ],
)
def test_a_package_that_is_not_known_is_refused(arguments, message, capsys):
    assert main(["doctor", *arguments]) == WRONG_INPUT
    assert message in capsys.readouterr().err
