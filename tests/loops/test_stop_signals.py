"""Real signals to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from mlenv import compose, train
from mlenv.errors import StoppedError
from mlenv.loops import stop_signals
from mlenv.loops.stop_signals import STOP_SIGNALS, StopSignals, forward


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_what_is_going_on_and_is_noted_while_held(number):
    before = signal.getsignal(number)  # Ray, in a test before this one, may have put its own
    with StopSignals() as signals:
        with pytest.raises(StoppedError, match=number.name):
            os.kill(os.getpid(), number)
        signals.received = ""
        signals.hold()
        os.kill(os.getpid(), number)
        assert signals.received == number.name
        signals.release()
        with pytest.raises(StoppedError):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_it_is_no_failure_that_somebody_may_catch():
    assert not issubclass(StoppedError, Exception)


def test_one_inside_another_puts_back_the_outer_one():
    with StopSignals() as outer:
        outer.hold()
        with StopSignals():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.received == "SIGTERM"


def test_another_thread_leaves_the_signals_alone():
    def enter():
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before, handlers = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_a_signal_to_the_launcher_stops_the_training_of_a_worker(demo_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(stop_signals, "_forwarded", "")
    file, *settings = demo_arguments()
    forward("SIGTERM")
    with pytest.raises(StoppedError, match="SIGTERM after step 0"):
        train(compose(file, settings))
    assert not (tmp_path / "run of a test" / "checkpoints").exists()


LAUNCHED = """
import time
from mlenv.loops.stop_signals import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(20)
print("went on")
"""


def test_a_process_whose_launcher_is_killed_ends_too():
    launcher_code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHED!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher_code], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert launcher.stdout.read() == ""  # its end: nobody holds the pipe any more
