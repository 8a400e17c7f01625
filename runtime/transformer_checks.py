"""The config of a compiled transformer, and what its programs and inputs are checked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph

__all__ = ["CONFIG_KEYS", "TransformerConfig", "check_inputs", "check_shared_tensors", "in_ranges"]

CONFIG_KEYS = ("in_channels", "patch_size", "rope_max_seq_len", "text_dim")  # those that a call looks at


class TransformerConfig(dict[str, Any]):
    """The model's config; keys are attributes as well, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the transformer's config has no {name}") from None


def check_inputs(
    config: TransformerConfig, expand_timesteps: bool, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
) -> None:
    """Raise Hif4Error unless the shapes of the inputs of a call fit the model."""
    if video.dim() != 5 or video.shape[1] != config.in_channels:
        raise Hif4Error(f"hidden_states {list(video.shape)}: expected [B, {config.in_channels}, F, H, W].")
    batch, _, frames, height, width = video.shape
    patches = frames
    for name, size, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
        if size % patch or size == 0:
            raise Hif4Error(f"latent {name} {size} is not a multiple of the patch size {patch}; choose another size.")
        if size // patch > config.rope_max_seq_len:
            raise Hif4Error(f"latent {name} {size}: the model has positions for {config.rope_max_seq_len * patch}.")
        patches *= size // patch
    if not 0 < frames <= config.rope_max_seq_len:
        raise Hif4Error(f"{frames} latent frames: the model has positions for 1 to {config.rope_max_seq_len}.")
    expected = (batch, patches) if expand_timesteps else (batch,)
    if tuple(timestep.shape) != expected:
        raise Hif4Error(f"timestep {list(timestep.shape)}: expected {list(expected)} for these latents.")
    if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != config.text_dim or text.shape[1] == 0:
        raise Hif4Error(f"encoder_hidden_states {list(text.shape)}: expected [{batch}, text, {config.text_dim}].")


def check_shared_tensors(graph: Graph, other: Graph) -> None:
    """Raise Hif4Error unless the second program reads what the first one reads, as the same types."""
    known = {item.name: item.type for item in graph.tensors}
    for item in other.tensors:
        if item.name not in known:
            raise Hif4Error(
                f"the program for bf16 steps reads {item.name}, which the main program does not; compile it again."
            )
        if item.type != known[item.name]:
            raise Hif4Error(
                f"the program for bf16 steps reads {item.name} as {item.type}, the main program as "
                f"{known[item.name]}; compile it again."
            )


def in_ranges(timestep: torch.Tensor, ranges: Sequence[tuple[float, float]]) -> bool:
    """Whether the largest timestep, of any shape, lies in one of the ranges, both ends included."""
    if not ranges or timestep.numel() == 0:
        return False
    largest = timestep.max().item()
    return any(low <= largest <= high for low, high in ranges)
