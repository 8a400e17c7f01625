"""The program of a compiled expert at any stage of the pipeline, from the manifest alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hif4c.compiler.capture import capture
from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import PASS_NAMES, PassRecord, run_passes
from hif4c.compiler.plan import ExpertPlan, make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.passes.program import Program
from hif4c.runtime.artifact import Artifact, ExpertInfo
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph

__all__ = ["Traced", "graph_at_stage", "trace_again"]


def graph_at_stage(artifact: Artifact, expert: str, stage: str) -> Graph:
    """Trace the expert's config again and run the passes up to and including `stage`.

    Raises:
        Hif4Error: no pass has that name, or the manifest's config or recipe cannot be used.
    """
    if stage not in PASS_NAMES:
        raise Hif4Error(f"no pass is called {stage!r}; the passes are {', '.join(PASS_NAMES)}.")
    traced = trace_again(artifact, expert)
    traced.run(stop_after=stage)
    return to_graph(traced.program)


@dataclass(frozen=True)
class Traced:
    """A captured program, and what the passes were driven by when the artifact was compiled."""

    program: Program
    choices: Choices
    recipe: Recipe
    where: str

    def run(
        self,
        stop_after: str | None = None,
        on_pass: Callable[[PassRecord, Program], None] | None = None,
    ) -> list[PassRecord]:
        """`run_passes` on the program, once.

        Raises:
            Hif4Error: the manifest's linears do not fit its config.
        """
        try:
            return run_passes(self.program, self.choices, self.recipe, stop_after=stop_after, on_pass=on_pass)
        except ValueError as error:
            raise Hif4Error(
                f"{self.where}: its linears do not fit its config ({error}); compile the model again."
            ) from error


def trace_again(artifact: Artifact, expert: str, captured: dict[tuple[Any, ...], Program] | None = None) -> Traced:
    """Trace an expert's config again; needs no weights.

    Args:
        artifact: an opened artifact.
        expert: the expert's name.
        captured: what was traced before; an expert with a config of its own is added. Experts of one config then cost
            one trace. None traces, and keeps nothing.

    Raises:
        Hif4Error: the manifest's config, recipe or linears cannot be used.
    """
    info = artifact.expert(expert)
    where = f"{artifact.root}/manifest.json"
    config = WanConfig.from_dict(info.config, where)
    recipe = Recipe.from_dict(info.recipe, where)
    choices = _choices(make_plan(config, recipe, info.dtype), info, where)
    key = (config, info.dtype, artifact.expand_timesteps)
    if captured is None:
        return Traced(capture(*key), choices, recipe, where)
    if key not in captured:
        captured[key] = capture(*key)
    return Traced(captured[key].copy(), choices, recipe, where)


def _choices(plan: ExpertPlan, info: ExpertInfo, where: str) -> Choices:
    """What was chosen when the artifact was compiled, as far as it shapes the program.

    The numbers in masks and shifts do not: they are ones, zeros for outlier columns, and zeros.
    """
    known = {linear["path"]: linear for linear in info.linears}
    linears, masks, shifts = [], {}, {}
    mask_of, shift_of = {}, {}
    try:
        for linear in plan.linears:
            entry, path = known[linear.decision.path], linear.decision.path
            decision = replace(
                linear.decision, precision=entry["precision"], reason=entry["reason"], rank=entry.get("rank", 0)
            )
            linears.append(replace(linear, decision=decision))
            if entry.get("mask") is not None:
                mask_of[path] = entry["mask"]
                masks[entry["mask"]] = torch.ones(linear.in_features)
                masks[entry["mask"]][: entry.get("outlier_columns", 0)] = 0
            if entry.get("shift") is not None:
                shift_of[path] = entry["shift"]
                shifts[entry["shift"]] = torch.zeros(linear.in_features)
    except (KeyError, TypeError) as error:
        raise Hif4Error(
            f"{where}: its linears are not those of its config ({error}); compile the model again."
        ) from None
    return Choices(replace(plan, linears=tuple(linears)), masks, mask_of, shifts, shift_of)
