"""Processes that are forked from one that has torch and TorchRec loaded already: ranks as a launcher starts them, and commands."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed

SECONDS = 240

CONTEXT = multiprocessing.get_context("forkserver")  # the process of the tests has threads, which do not survive a fork
CONTEXT.set_forkserver_preload(
    ["mlenv.cli", "mlenv.training", "torchrec.distributed.planner", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
)


class Command:
    """``mlenv ARGUMENTS`` in a process of its own, some seconds of CPU cheaper than one that imports everything anew."""

    def __init__(self, arguments: Sequence[str], said: Path) -> None:
        """
        Args:
            said: file that gets its standard error.
        """
        self._process = CONTEXT.Process(target=_run_command, args=(list(arguments), said), daemon=True)
        self._said = said
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int | None:
        """The exit code."""
        self._process.join(SECONDS)
        return self.exit_code

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """While it runs."""
        while not condition():
            assert self.exit_code is None, self.said
            time.sleep(0.002)

    def end(self) -> None:
        """Kills it if it still runs."""
        self._process.kill()
        self._process.join()


def _run_command(arguments: list[str], said: Path) -> None:
    from mlenv.cli import main

    with said.open("wb") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    with open(os.devnull, "wb") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
    sys.exit(main(arguments))


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function of a test module in each process, and returns what they return, in the order of the ranks. One is no launcher's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiving, sending = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(sending, rank, num_ranks, port, function, arguments), daemon=True)
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    try:
        answers = [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return answers


def _answer(pipe: Connection, rank: int) -> Any:
    assert pipe.poll(SECONDS), f"rank {rank} gave no answer in {SECONDS} s"
    error, result = pipe.recv()
    assert not error, f"rank {rank}:\n{error}"
    return result


def _run(pipe: Connection, rank: int, num_ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if num_ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in names.items()}, MASTER_ADDR="127.0.0.1", TORCH_CPP_LOG_LEVEL="ERROR")
        torch.distributed.init_process_group("gloo")
    try:
        answer = ("", function(*arguments))
    except BaseException:  # noqa: BLE001 - the test that waits is to see it
        answer = (traceback.format_exc(), None)
    pipe.send(answer)
    pipe.close()
