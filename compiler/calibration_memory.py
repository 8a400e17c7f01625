"""Whether the original pipeline fits where its prompts are to be sampled: asked before it is loaded."""

from __future__ import annotations

import os

import torch

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.disk_space import components_bytes
from hif4c.compiler.locate import ModelLocation
from hif4c.runtime.errors import Hif4Error

__all__ = ["check_pipeline_fits", "pipeline_bytes"]


def pipeline_bytes(location: ModelLocation) -> int:
    """Bytes of a pipeline's weights when it samples: the experts in bf16, the other components as they are stored."""
    count = components_bytes(location.root)
    for name, folder in location.experts.items():
        with Checkpoint(folder, location.configs[name], location.layout) as checkpoint:
            count += sum(2 * checkpoint.shape(tensor).numel() for tensor in checkpoint.names)
    return count


def check_pipeline_fits(location: ModelLocation, device: torch.device) -> None:
    """Refuse (Hif4Error) to sample from a pipeline whose weights alone are more than there is memory.

    Args:
        location: a model with its whole pipeline.
        device: where it would run.
    """
    there = _memory_of(device)
    if there is None or (needed := pipeline_bytes(location)) <= there:
        return
    advice = "calibrate from clips (--clips FOLDER), which needs no expert in memory"
    if location.pipeline.class_name == "WanImageToVideoPipeline":  # clips do not calibrate it
        advice = "calibrate on a larger machine"
    raise Hif4Error(
        f"{location.root}: sampling prompts needs the whole pipeline in memory, {format_bytes(needed)}, and {device} "
        f"has {format_bytes(there)}; {advice}."
    )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of memory in all; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
