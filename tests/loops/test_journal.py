"""The journal: what is in it after a kill, after a resume, and when somebody edited it."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlenv.errors import DataError
from mlenv.loops.journal import Journal, JournalFollower


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(journal: Journal | JournalFollower) -> list[float]:
    return [line["step"] for line in journal.read()]


def test_what_is_appended_is_read_back_to_the_bit(path: Path) -> None:
    before = time.time()
    journal = Journal(path)
    journal.append(1, {"train/click/loss": 0.1 + 0.2, "train/rows_per_second": 12_345})
    journal.append(2, {})
    first, second = Journal(path).read()
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"step": 1, "train/click/loss": 0.1 + 0.2, "train/rows_per_second": 12_345.0}
    assert second == {"step": 2}


def test_numbers_that_are_not_finite_stay_valid_json(path: Path) -> None:
    Journal(path).append(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert '"a": "nan", "b": "inf", "c": "-inf"}' in path.read_text()
    line = Journal(path).read()[0]
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


def test_no_file_is_no_lines(path: Path) -> None:
    journal = Journal(path)
    journal.sync()
    journal.truncate(3)
    assert journal.read() == []
    assert not path.exists()


def test_half_a_last_line_is_passed_over_and_then_replaced(path: Path) -> None:
    journal = Journal(path)
    journal.append(1, {"loss": 0.5})
    journal.append(2, {"loss": 0.4})
    path.write_bytes(path.read_bytes()[:-7])
    assert steps(Journal(path)) == [1]
    Journal(path).append(3, {"loss": 0.3})
    assert steps(Journal(path)) == [1, 3]


def test_truncate_keeps_the_checkpoint_step_and_appending_goes_on(path: Path) -> None:
    journal = Journal(path)
    for step in (10, 20, 20, 30):
        journal.append(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4')
    journal.truncate(20)
    journal.append(30, {"loss": 7.0})
    journal.sync()
    assert steps(journal) == [10, 20, 20, 30]
    assert journal.read()[-1]["loss"] == 7.0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[1, 2]",
        "{}",
        '{"step": 1}',
        '{"step": 1.5, "time": 1.0}',
        '{"step": 1, "time": "nan"}',
        '{"step": 1, "time": 1.0, "loss": "low"}',
        "\0\0",
    ],
)
def test_a_broken_line_is_named_and_nothing_is_changed(path: Path, broken: str) -> None:
    Journal(path).append(1, {"loss": 0.5})
    with path.open("a") as file:
        file.write(broken + "\n")
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: expected a JSON object.*Fix: remove the line"):
        Journal(path).read()
    with pytest.raises(DataError, match="line 2"):
        Journal(path).truncate(1)
    assert path.read_bytes() == content


def test_a_follower_reads_each_line_once(path: Path) -> None:
    journal, follower = Journal(path), JournalFollower(path)
    assert steps(follower) == []
    journal.append(1, {"loss": 0.5})
    journal.append(2, {"loss": 0.5})
    assert steps(follower) == [1, 2]
    with path.open("ab") as file:
        file.write(b'{"step": 3, "ti')
        file.flush()
        assert steps(follower) == []
        file.write(b'me": 1.0}\n')
    assert steps(follower) == [3]
    assert steps(follower) == []


def test_a_follower_starts_again_after_truncate(path: Path) -> None:
    journal, follower = Journal(path), JournalFollower(path)
    for step in range(1, 5):
        journal.append(step, {"loss": 0.5})
    assert steps(follower) == [1, 2, 3, 4]
    journal.truncate(2)
    for step in range(3, 9):
        journal.append(step, {"loss": 0.5})
    assert steps(follower) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_long_journal_and_a_long_line_are_read_whole(path: Path) -> None:
    journal = Journal(path)
    journal.append(0, {f"metric_{index}": index / 7 for index in range(60_000)})
    for step in range(1, 20_000):
        journal.append(step, {"train/click/loss": 0.5, "train/conversion/loss": 0.25})
    assert path.stat().st_size > 3 << 20
    assert steps(journal) == list(range(20_000))


def test_every_line_is_whole_after_kill_minus_9(path: Path) -> None:
    writer = """
import itertools, sys
from pathlib import Path
from mlenv.loops.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in itertools.count():
    journal.append(step, {"loss": 1 / (step + 1)})
"""
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
    try:
        while not path.exists() or path.stat().st_size < 100_000:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = Journal(path).read()
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(line["loss"] == 1 / (line["step"] + 1) for line in lines)
