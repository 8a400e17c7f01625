"""Data-parallel training in a few single-threaded processes.

On two busy cores, one OpenMP thread a process and one process a core is several times faster than one process of two
threads.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["average_gradients", "broadcast_parameters", "run_workers"]


def _worker(rank: int, world_size: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the workers are on one machine
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        target(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()


def run_workers(target: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `target(rank, world_size, *arguments)` in `world_size` new processes of one gloo group; wait for all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(world_size, port, target, arguments), nprocs=world_size, join=True)


def broadcast_parameters(parameters: Iterable[torch.Tensor]) -> None:
    """Give every process rank 0's values."""
    for parameter in parameters:
        dist.broadcast(parameter.data, 0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients by their mean over the processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
