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
from hif4c.runtime.transformer import check_device

__all__ = ["ALONE", "PeerError", "Ranks", "start_ranks"]

T = TypeVar("T")
TIMEOUT = timedelta(hours=24)
"""How long a rank waits for the others: one may pack layers for hours while another has none left."""
_TOLD = "_told_to_all_ranks"
"""Attribute of an exception that every rank has heard of."""


class PeerError(Hif4Error):
    """Another rank failed, and this one cannot go on without it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Every method with "all" or "barrier" in its name is to be called by every rank, in the same order.

    Attributes:
        rank: 0 to count - 1; rank 0 speaks to people and writes what exists once.
        count: how many there are.
        device: where tensors are summed: the rank's GPU with nccl, else the CPU with gloo.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this rank works on: every count-th one, so rank 0 has one wherever there is one."""
        return list(items[self.rank :: self.count])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather(None)

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
        with self._peers():
            dist.all_gather_object(found, value)
        return found

    def all_agree(self, error: Exception | None) -> None:
        """Raise where any rank failed, so that no rank waits for one that has gone.

        Raises:
            Exception: this rank's own error; or PeerError with the sentence of the first rank that failed.
        """
        sentences = self.all_gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            error.__dict__[_TOLD] = True
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise PeerError(f"rank {rank} failed: {sentence}")

    @staticmethod
    def have_heard(error: BaseException) -> bool:
        """Whether every rank has raised because of this error, rank 0 with its sentence."""
        return isinstance(error, PeerError) or _TOLD in error.__dict__

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block together: where one rank fails in it, every rank raises.

        The block may hold collective calls of its own, each row of them begun by an `all_agree`: there the others hear
        of a rank that has failed.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.have_heard(error):  # in a collective call within the block
                raise
            failed = error
        self.all_agree(failed)

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device, copy=True).contiguous()
        with self._peers():
            dist.all_reduce(moved, operation)
        return moved.to(tensor.device)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """A rank that was killed breaks its connections: that is one sentence, too."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise PeerError(f"rank {self.rank} lost the others ({reason}); see why the first of them ended.") from None


ALONE = Ranks()


@contextmanager
def start_ranks(device: torch.device | str = "cpu") -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be alone.

    Args:
        device: where the work will run. With "cuda" every rank takes the GPU of its local rank as its current device,
            whatever index is given, and tensors are summed by nccl; anything else means gloo.

    Raises:
        Hif4Error: the ranks do not find each other, or there are more local ranks than GPUs.
    """
    count, rank = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
    if count == 1:
        yield ALONE
        return
    place, backend = torch.device("cpu"), "gloo"
    if str(device).partition(":")[0] == "cuda":
        check_device("cuda")
        local, there = _from_environment("LOCAL_RANK", rank), torch.cuda.device_count()
        if local >= there:
            raise Hif4Error(f"local rank {local}: this machine has {there} GPUs; start at most one rank a GPU.")
        place, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"  # objects and sentences stay on the CPU
        torch.cuda.set_device(place)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"the ranks do not find each other ({reason}); start them with torchrun.") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int) -> int:
    """One of the numbers that torchrun gives to the processes that it starts."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise Hif4Error(f"{name}={text} in the environment is no number; start the ranks with torchrun.")
    return int(text)
