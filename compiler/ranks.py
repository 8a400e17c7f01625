"""The processes that share a calibration or a compile: one, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hif4c.runtime.errors import Hif4Error

__all__ = ["ALONE", "Ranks", "start_ranks"]

T = TypeVar("T")
TIMEOUT = timedelta(hours=24)
"""How long a rank waits for the others: one may pack layers for hours while another has none left."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Every method with "all" or "barrier" in its name is to be called by every rank, in the same order.

    Attributes:
        rank: 0 to count - 1; rank 0 speaks to people and writes what exists once.
        count: how many there are.
        device: where the tensors of collective calls must be: the CPU for gloo, the rank's GPU for nccl.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this rank works on: every count-th one."""
        return list(items[self.rank :: self.count])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks. Integers add exactly; of floats the order of summation is not defined."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The maximum of a tensor over the ranks."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def all_gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in the order of the ranks; tensors in it must be on the CPU."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def all_agree(self, error: Exception | None) -> None:
        """Raise where any rank failed, so that no rank waits for one that has gone.

        Raises:
            Exception: this rank's own error; or Hif4Error with the sentence of the first rank that failed.
        """
        sentences = self.all_gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise Hif4Error(f"rank {rank} failed: {sentence}")

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(moved, operation)
        return moved.to(tensor.device)


ALONE = Ranks()


@contextmanager
def start_ranks(device: torch.device | str = "cpu") -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be alone.

    Args:
        device: "cpu" for gloo; a GPU for nccl, where every rank takes the GPU of its local rank.

    Raises:
        Hif4Error: the ranks do not find each other, or there are more local ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    found = torch.device(device)
    if found.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise Hif4Error(
                f"local rank {local}: this machine has {torch.cuda.device_count()} GPUs; start at most one rank a GPU."
            )
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    try:
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"the ranks do not find each other ({reason}); start them with torchrun.") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), found)
    finally:
        dist.destroy_process_group()
