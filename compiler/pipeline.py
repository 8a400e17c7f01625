"""The passes, in order. The names here are those of logs, timings and dumps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hif4c.compiler.choose import Choices
from hif4c.compiler.recipe import Recipe
from hif4c.passes.add_side_branches import add_side_branches
from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.choose_precision import choose_precision
from hif4c.passes.fold_channel_masks import fold_channel_masks
from hif4c.passes.fold_channel_shifts import fold_channel_shifts
from hif4c.passes.fold_high_precision import fold_high_precision
from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.fuse_gated_residual import fuse_gated_residual
from hif4c.passes.fuse_norm import fuse_norm
from hif4c.passes.fuse_norm_quantize import fuse_norm_quantize
from hif4c.passes.fuse_qk_norm_rotary import fuse_qk_norm_rotary
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_attention import lower_attention
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import PassResult, Program
from hif4c.passes.remove_noops import remove_noops
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.share_quantized_inputs import share_quantized_inputs
from hif4c.passes.verify import Stage, verify
from hif4c.runtime.errors import Hif4Error

__all__ = ["PASS_NAMES", "PassRecord", "run_passes"]

Pass = Callable[[Program, Choices, Recipe], PassResult]

PIPELINE: tuple[tuple[str, Pass, Stage], ...] = (
    ("remove_noops", lambda program, choices, recipe: remove_noops(program), Stage.CAPTURED),
    ("functionalize_rotary", lambda program, choices, recipe: functionalize_rotary(program), Stage.FUNCTIONAL),
    ("mark_boundaries", lambda program, choices, recipe: mark_boundaries(program), Stage.FUNCTIONAL),
    (
        "choose_precision",
        lambda program, choices, recipe: choose_precision(program, choices.plan.decisions),
        Stage.PLANNED,
    ),
    (
        "fold_channel_shifts",
        lambda program, choices, recipe: fold_channel_shifts(program, choices.shift_of),
        Stage.PLANNED,
    ),
    (
        "apply_channel_masks",
        lambda program, choices, recipe: apply_channel_masks(program, dict(choices.mask_of)),
        Stage.PLANNED,
    ),
    ("rotate_inputs", lambda program, choices, recipe: rotate_inputs(program, recipe.hadamard), Stage.PLANNED),
    ("fold_channel_masks", lambda program, choices, recipe: fold_channel_masks(program), Stage.PLANNED),
    ("insert_qdq", lambda program, choices, recipe: insert_qdq(program), Stage.QDQ),
    ("share_quantized_inputs", lambda program, choices, recipe: share_quantized_inputs(program), Stage.QDQ),
    ("add_side_branches", lambda program, choices, recipe: add_side_branches(program), Stage.QDQ),
    ("pack_weights", lambda program, choices, recipe: pack_weights(program), Stage.PACKED),
    ("lower_linears", lambda program, choices, recipe: lower_linears(program), Stage.LOWERED),
    ("fuse_activation", lambda program, choices, recipe: fuse_activation(program), Stage.LOWERED),
    ("fold_high_precision", lambda program, choices, recipe: fold_high_precision(program), Stage.LOWERED),
    ("fuse_gated_residual", lambda program, choices, recipe: fuse_gated_residual(program), Stage.FUSED),
    ("fuse_norm", lambda program, choices, recipe: fuse_norm(program), Stage.FUSED),
    ("fuse_norm_quantize", lambda program, choices, recipe: fuse_norm_quantize(program), Stage.FUSED),
    ("fuse_qk_norm_rotary", lambda program, choices, recipe: fuse_qk_norm_rotary(program), Stage.FUSED),
    ("lower_attention", lambda program, choices, recipe: lower_attention(program), Stage.FUSED),
)
"""(name, pass, the stage whose rules hold after it)."""

PASS_NAMES = tuple(name for name, _, _ in PIPELINE)


@dataclass(frozen=True)
class PassRecord:
    """What a pass did, for logs and the report."""

    name: str
    changed: bool
    notes: tuple[str, ...]
    nodes: int
    seconds: float


def run_passes(
    program: Program,
    choices: Choices,
    recipe: Recipe,
    *,
    stop_after: str | None = None,
    on_pass: Callable[[PassRecord, Program], None] | None = None,
) -> list[PassRecord]:
    """Run the pipeline on a captured program, verifying after every pass.

    Args:
        program: changed in place.
        choices: the plan's decisions, masks and shifts.
        recipe: what the passes are driven by.
        stop_after: name of the last pass to run, None for all.
        on_pass: called after every pass.

    Raises:
        Hif4Error: the recipe does not fit the model.
        ValueError: a pass broke a rule; the message names the pass and those before it.
    """
    if stop_after is not None and stop_after not in PASS_NAMES:
        raise ValueError(f"no pass is called {stop_after}")
    verify(program, Stage.CAPTURED)
    program.masks |= choices.masks
    program.shifts |= choices.shifts
    records: list[PassRecord] = []
    for name, transform, stage in PIPELINE:
        started = time.perf_counter()
        try:
            result = transform(program, choices, recipe)
            verify(program, stage)
        except Hif4Error:
            raise
        except Exception as error:
            before = ", ".join(record.name for record in records) or "none"
            raise ValueError(f"pass {name} failed: {error} (passes before it: {before})") from error
        seconds = time.perf_counter() - started
        record = PassRecord(name, result.changed, tuple(result.notes), len(program.graph.nodes), seconds)
        records.append(record)
        if on_pass is not None:
            on_pass(record, program)
        if name == stop_after:
            break
    return records
