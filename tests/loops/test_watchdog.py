"""Hangs of this process and of others."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mlenv.loops.watchdog import Watchdog


def test_steps_that_end_keep_it_quiet_and_nothing_is_left(tmp_path, caplog):
    watchdog = Watchdog(tmp_path, timeout_seconds=0.5)
    watchdog.start()
    for _ in range(30):
        time.sleep(0.05)
        watchdog.beat()
    watchdog.close()
    watchdog.close()
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_a_hang_that_ends_leaves_the_stacks_and_one_line(tmp_path, caplog):
    def hang_for_a_while():
        time.sleep(1.5)

    watchdog = Watchdog(tmp_path, timeout_seconds=1)
    watchdog.start()
    hang_for_a_while()
    watchdog.beat()
    time.sleep(0.4)
    watchdog.close()
    assert "hang_for_a_while" in (tmp_path / "stacks-rank0.txt").read_text()
    assert len(caplog.records) == 1
    assert f"no step has ended for 1 s: the stacks of all threads are in {tmp_path / 'stacks-rank0.txt'}" in caplog.text


HANGS = {
    "python": "threading.Event().wait()",
    # A native call that never gives Python's lock back.
    "native": "ctypes.PyDLL(None).sleep(600)",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_process_that_hangs_ends_with_exit_code_1(tmp_path, how):
    code = f"""
import ctypes, pathlib, threading
from mlenv.loops.watchdog import Watchdog

def this_hangs():
    {HANGS[how]}

Watchdog(pathlib.Path({str(tmp_path)!r}), timeout_seconds=0.5).start()
this_hangs()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert process.returncode == 1
    assert "this_hangs" in (tmp_path / "stacks-rank0.txt").read_text()
