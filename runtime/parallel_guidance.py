"""Classifier-free guidance over two processes: one predicts with the prompt, the other with the negative prompt.

Diffusers' Wan pipelines call a transformer twice a step, inside `cache_context("cond")` and then `cache_context
("uncond")`, and use neither prediction before both are there. So rank 1 can let the first call pass, answer it with a
tensor that is not filled yet, and start at once with the second, while rank 0 computes the first. In the second call
the two exchange what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from hif4c.runtime.components import EXPERT_NAMES
from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_guidance_ranks", "split_guidance"]


def check_guidance_ranks(count: int, guidance: float) -> None:
    """Say before anything is loaded that there is nothing to share, or that there are too many to share it.

    Args:
        count: of the processes.
        guidance: scale of classifier-free guidance; diffusers guides above 1.

    Raises:
        Hif4Error: there are several ranks and not two, or two and no guidance.
    """
    if count > 2:
        raise Hif4Error(
            f"guidance is shared by 2 ranks, not {count}; start 2 with torchrun --nproc-per-node 2, or one."
        )
    if count == 2 and guidance <= 1:
        raise _no_guidance()


@contextmanager
def split_guidance(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Share the two predictions of every step of a pipeline between the two ranks of the default process group.

    To be entered by both ranks, each with its own copy of the same pipeline, around calls of it with equal arguments.
    Both get the result that one process gets, to the bit where both run on the same kind of machine: rank 0's latents
    are what both predict from, and every prediction is computed by one rank and copied to the other.

    Args:
        pipeline: `WanPipeline` or `WanImageToVideoPipeline`, with compiled experts or diffusers' own.

    Raises:
        Hif4Error: there are not two ranks; the pipeline was called without guidance, so that there is nothing to share;
            or the other rank has gone.
    """
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count != 2:
        raise Hif4Error(f"guidance is shared by 2 ranks, not {count}; start 2 with torchrun --nproc-per-node 2.")
    experts = {name: found for name in EXPERT_NAMES if (found := getattr(pipeline, name, None)) is not None}
    shared = {name: _SharedGuidance(expert, dist.get_rank()) for name, expert in experts.items()}
    for name, module in shared.items():
        setattr(pipeline, name, module)
    try:
        yield
        if any(module.pending is not None for module in shared.values()):
            raise _no_guidance()
    finally:
        for name, expert in experts.items():
            setattr(pipeline, name, expert)


@dataclass
class _Pending:
    """What a rank keeps from a step's first call until its second.

    Attributes:
        latents: rank 0's, which both predict from.
        sample: rank 0's prediction; on rank 1 the tensor that will hold it.
    """

    latents: torch.Tensor
    sample: torch.Tensor


class _SharedGuidance(nn.Module):
    """Stands for a transformer in the pipeline of one rank."""

    def __init__(self, expert: nn.Module, rank: int) -> None:
        super().__init__()
        self.expert: Any = expert
        self.rank = rank
        self.pending: _Pending | None = None
        self._call = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("expert"), name)  # config, dtype, device, ...

    @contextmanager
    def cache_context(self, name: str, **settings: Any) -> Iterator[None]:
        """Remember which of the two calls comes."""
        context: AbstractContextManager[None] = self.expert.cache_context(name, **settings)
        with context:
            self._call = name
            try:
                yield
            finally:
                self._call = ""

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True, **inputs: Any) -> Any:
        """As the transformer's own; with `return_dict=False`, as the pipelines call it, a tuple of one tensor."""
        if self._call not in ("cond", "uncond") or return_dict:
            raise Hif4Error(
                "this version of diffusers calls the transformer in another way than Wan's pipelines are known to; "
                "sample with one process."
            )
        return (self._first if self._call == "cond" else self._second)(hidden_states, inputs)

    def _first(self, latents: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor]:
        if self.pending is not None:
            raise _no_guidance()
        latents = latents.clone(memory_format=torch.contiguous_format)
        with _exchange():
            dist.broadcast(latents, 0)
        if self.rank == 0:
            sample = self.expert(hidden_states=latents, return_dict=False, **inputs)[0].contiguous()
        else:
            shape = (latents.shape[0], self.expert.config.out_channels, *latents.shape[2:])
            sample = torch.empty(shape, dtype=self.expert.dtype, device=latents.device)
        self.pending = _Pending(latents, sample)
        return (sample,)

    def _second(self, latents: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor]:
        if self.pending is None:
            raise Hif4Error("the pipeline predicted without the prompt before with it; sample with one process.")
        first, self.pending = self.pending, None
        if self.rank == 1:
            mine = self.expert(hidden_states=first.latents, return_dict=False, **inputs)[0].contiguous()
        else:
            mine = torch.empty_like(first.sample)
        with _exchange():
            dist.broadcast(first.sample, 0)
            dist.broadcast(mine, 1)
        return (mine,)


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"the other rank has gone ({reason}); start both again.") from None


def _no_guidance() -> Hif4Error:
    return Hif4Error("without guidance there is one prediction a step and nothing to share; sample with one process.")
