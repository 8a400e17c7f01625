"""The program of a compiled expert at any stage of the pipeline, from the manifest alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from hif4c.compiler.capture import capture
from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import PASS_NAMES, run_passes
from hif4c.compiler.plan import ExpertPlan, make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.runtime.artifact import Artifact, ExpertInfo
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph

__all__ = ["graph_at_stage"]


def graph_at_stage(artifact: Artifact, expert: str, stage: str) -> Graph:
    """Trace the expert's config again and run the passes up to and including `stage`.

    Raises:
        Hif4Error: no pass has that name, or the manifest's config or recipe cannot be used.
    """
    if stage not in PASS_NAMES:
        raise Hif4Error(f"no pass is called {stage!r}; the passes are {', '.join(PASS_NAMES)}.")
    info = artifact.expert(expert)
    where = f"{artifact.root}/manifest.json"
    config = WanConfig.from_dict(info.config, where)
    recipe = Recipe.from_dict(info.recipe, where)
    choices = _choices(make_plan(config, recipe, info.dtype), info, where)
    program = capture(config, info.dtype, artifact.expand_timesteps)
    try:
        run_passes(program, choices, recipe, stop_after=stage)
    except ValueError as error:
        raise Hif4Error(f"{where}: its linears do not fit its config ({error}); compile the model again.") from error
    return to_graph(program)


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
