"""The passes, in order. The names here are those of logs, timings and dumps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hif4c.compiler.plan import ExpertPlan
from hif4c.compiler.recipe import Recipe
from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.choose_precision import choose_precision
from hif4c.passes.fold_high_precision import fold_high_precision
from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import PassResult, Program
from hif4c.passes.remove_noops import remove_noops
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.share_quantized_inputs import share_quantized_inputs
from hif4c.passes.verify import Stage, verify

__all__ = ["PASS_NAMES", "PassRecord", "run_passes"]

Pass = Callable[[Program, ExpertPlan, Recipe], PassResult]

PIPELINE: tuple[tuple[str, Pass, Stage], ...] = (
    ("remove_noops", lambda program, plan, recipe: remove_noops(program), Stage.CAPTURED),
    ("functionalize_rotary", lambda program, plan, recipe: functionalize_rotary(program), Stage.FUNCTIONAL),
    ("mark_boundaries", lambda program, plan, recipe: mark_boundaries(program), Stage.FUNCTIONAL),
    ("choose_precision", lambda program, plan, recipe: choose_precision(program, plan.decisions), Stage.PLANNED),
    ("apply_channel_masks", lambda program, plan, recipe: apply_channel_masks(program), Stage.PLANNED),
    ("rotate_inputs", lambda program, plan, recipe: rotate_inputs(program, recipe.hadamard), Stage.PLANNED),
    ("insert_qdq", lambda program, plan, recipe: insert_qdq(program), Stage.QDQ),
    ("share_quantized_inputs", lambda program, plan, recipe: share_quantized_inputs(program), Stage.QDQ),
    ("pack_weights", lambda program, plan, recipe: pack_weights(program), Stage.PACKED),
    ("lower_linears", lambda program, plan, recipe: lower_linears(program), Stage.LOWERED),
    ("fuse_activation", lambda program, plan, recipe: fuse_activation(program), Stage.LOWERED),
    ("fold_high_precision", lambda program, plan, recipe: fold_high_precision(program), Stage.LOWERED),
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
    plan: ExpertPlan,
    recipe: Recipe,
    *,
    stop_after: str | None = None,
    on_pass: Callable[[PassRecord, Program], None] | None = None,
) -> list[PassRecord]:
    """Run the pipeline on a captured program, verifying after every pass.

    Args:
        program: changed in place.
        plan: the decisions.
        recipe: what the passes are driven by.
        stop_after: name of the last pass to run, None for all.
        on_pass: called after every pass.

    Raises:
        ValueError: a pass broke a rule; the message names the pass and those before it.
    """
    if stop_after is not None and stop_after not in PASS_NAMES:
        raise ValueError(f"no pass is called {stop_after}")
    verify(program, Stage.CAPTURED)
    records: list[PassRecord] = []
    for name, transform, stage in PIPELINE:
        started = time.perf_counter()
        try:
            result = transform(program, plan, recipe)
            verify(program, stage)
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
