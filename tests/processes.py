"""Processes that know each other, as a launcher starts them, but forked from one that has torch and TorchRec loaded already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed

SECONDS = 240


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function of a test module in each process, and returns what they return, in the order of the ranks. One is no launcher's."""
    context = multiprocessing.get_context("forkserver")  # the process of the tests has threads, which do not survive a fork
    context.set_forkserver_preload(
        ["mlenv.training", "torchrec.distributed.planner", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sending, rank, num_ranks, port, function, arguments), daemon=True)
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
