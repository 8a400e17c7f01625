"""Is there room for what will be written: asked before any work is done."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.interpret import MEMORY
from hif4c.compiler.models import WanConfig, read_json_object
from hif4c.compiler.plan import ExpertPlan
from hif4c.compiler.recipe import Recipe
from hif4c.passes.program import Precision
from hif4c.runtime.components import DATA_SUFFIXES, component_names
from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    from hif4c.compiler.calibration import ExpertCalibration

__all__ = [
    "check_disk",
    "compile_disk",
    "components_bytes",
    "existing_folder",
    "free_bytes",
    "partial_directory_of",
    "present_bytes",
    "recorded_tokens",
    "waiting_bytes",
]

GOLDEN_BYTES = 1 << 20
"""Golden outputs of one block, at most: they are of one small call, and do not grow with the model's width."""
CPU_KERNEL_BYTES, GPU_KERNEL_BYTES = 1 << 20, 16 << 20
"""Compiled kernels of one target, generously."""


def compile_disk(
    plans: Mapping[str, ExpertPlan],
    recipes: Mapping[str, Recipe],
    *,
    components: Path | None = None,
    targets: Sequence[str] = ("cpu",),
    tokens: Mapping[str, int] | None = None,
    expanded: bool = False,
) -> dict[str, int]:
    """What a compile writes: a word for it -> bytes, for `check_disk`. Headers and programs aside.

    Args:
        plans: of the experts.
        recipes: of the same experts.
        components: the pipeline's directory whose other components are copied; None for none (or for links).
        targets: what kernels are built for.
        tokens: expert -> tokens of its recorded calls (`recorded_tokens`), for rounding by GPTQ; None for few.
        expanded: whether every token has a timestep of its own.
    """
    weights = planes = values = blocks = 0
    for name, plan in plans.items():
        recipe = recipes[name]
        quantized = [linear for linear in plan.linears if linear.decision.quantized]
        weights += max(plan.bytes_after, _budget_bytes(plan, recipe))
        blocks += len({linear.decision.path.split(".")[1] for linear in quantized})
        if recipe.rounding == "gptq":
            planes += sum(linear.plane_bytes for linear in quantized)
            waiting = waiting_bytes(plan, expanded) * (tokens or {}).get(name, 0)
            values = max(values, waiting - MEMORY)  # experts come one after the other
    kernels = sum(CPU_KERNEL_BYTES if target == "cpu" else GPU_KERNEL_BYTES for target in targets)
    needs = {
        "weights": weights,
        "golden outputs and kernels": blocks * GOLDEN_BYTES + kernels,
        "the rest of the pipeline": 0 if components is None else components_bytes(components),
        "rounded weights on the way": planes,
        "activations on the way": values,
    }
    return {name: count for name, count in needs.items() if count > 0}


def waiting_bytes(plan: ExpertPlan, expanded: bool = False) -> int:
    """Bytes of a token while GPTQ waits for all calls to arrive: the residual stream and the widest quantized input.

    A token with a timestep of its own (`expanded`) has its embedding and six modulations as well.
    """
    widths = [linear.out_features for linear in plan.linears if linear.decision.path.endswith("attn1.to_out.0")]
    inputs = [
        linear.in_features * 9 // 16 if linear.decision.precision == Precision.W4A4 else 2 * linear.in_features
        for linear in plan.linears
        if linear.decision.quantized
    ]
    return 2 * max(widths, default=0) * (8 if expanded else 1) + max(inputs, default=0)


def recorded_tokens(calibration: ExpertCalibration, config: WanConfig) -> int:
    """Tokens of all calls that a calibration has recorded of an expert: GPTQ runs on these."""
    patch = math.prod(config.patch_size)
    videos = (call.hidden_states for call, _ in calibration.calls())
    return sum(video.shape[0] * math.prod(video.shape[2:]) // patch for video in videos)


def components_bytes(root: Path) -> int:
    """Bytes of what `copy_components` copies from a pipeline's directory; missing components count nothing."""
    index = root / "model_index.json"
    if not index.is_file():
        return 0
    folders = [root / name for name in component_names(read_json_object(index), index)]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files if path.suffix in DATA_SUFFIXES)


def check_disk(target: Path, needs: Mapping[str, int], *, doing: str) -> None:
    """Refuse work whose result does not fit, before any of it is done.

    What an unfinished run has left in `.NAME.partial` beside the target NAME is there already and is not needed again.

    Args:
        target: the file or directory that will be made; its folder may not be there yet.
        needs: a word for it -> bytes that will be written to the target's file system.
        doing: for the sentence: "compiling".

    Raises:
        Hif4Error: less is free than needed: how much of both, and where.
    """
    folder = existing_folder(target.parent)
    needed = sum(needs.values()) - present_bytes(partial_directory_of(target))
    free = free_bytes(folder)
    if free is None or needed <= free:
        return
    parts = ", ".join(f"{format_bytes(count)} {name}" for name, count in needs.items())
    left = "" if needed == sum(needs.values()) else " more"
    raise Hif4Error(
        f"{target}: {doing} needs {format_bytes(needed)}{left} of disk there ({parts}) and {format_bytes(free)} are "
        f"free in {folder}; free some, or choose another place."
    )


def free_bytes(path: Path) -> int | None:
    """Bytes that may be written to the file system of a path, of which parents are enough; None where nobody knows."""
    try:
        return shutil.disk_usage(existing_folder(path)).free
    except OSError:
        return None


def partial_directory_of(target: Path) -> Path:
    """Where an unfinished compile of a target is kept."""
    return target.with_name(f".{target.name}.partial")


def present_bytes(folder: Path) -> int:
    """Bytes on the disk below a folder; 0 where there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:
                continue  # it has just been removed
            # Blocks of 512 bytes, wherever there are such: a file may have its size before it has its space.
            total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return total


def _budget_bytes(plan: ExpertPlan, recipe: Recipe) -> int:
    """Bytes of the expert if a recipe spends all of its bits."""
    if recipe.average_bits is None:
        return 0
    quantized = [linear for linear in plan.linears if linear.decision.quantized]
    weights = sum(linear.in_features * linear.out_features for linear in quantized)
    kept = plan.bytes_before - 2 * weights
    return kept + int(recipe.average_bits * weights / 8)


def existing_folder(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.exists()), path)
