"""Several ranks on this machine without the seconds that a fresh interpreter takes to import everything."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from hif4c.compiler.ranks import Ranks, start_ranks

__all__ = ["in_ranks"]

TIMEOUT = 120  # seconds; a rank that waits for one that never comes fails the test


def in_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run `work` in `count` forked ranks of one thread each; returns what each returned or the exception it raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run, args=(rank, count, port, work, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        return [_receive(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(TIMEOUT) else TimeoutError("the rank never ended")
    except EOFError as error:  # it was killed
        return error


def _run(rank: int, count: int, port: int, work: Callable[[Ranks], Any], pipe: Any) -> None:
    # A forked child has none of its parent's threads: it must not wait for OpenMP's.
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with start_ranks() as ranks:
            result = work(ranks)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        traceback.print_exc()
        result = error
    pipe.send(result)
    pipe.close()
