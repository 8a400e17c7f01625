"""The experts of an artifact: what a recipe becomes for each, its program, its weight files, its manifest entry."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration import Calibration, ExpertCalibration
from hif4c.compiler.capture import capture
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices, choose
from hif4c.compiler.emit import to_graph
from hif4c.compiler.journal import Journal, run_on_first
from hif4c.compiler.linear_inputs import LinearInputs
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.lora import FusedCheckpoint
from hif4c.compiler.manifest import write_manifest
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pack import Written, write_weights
from hif4c.compiler.pipeline import PassRecord, run_passes
from hif4c.compiler.plan import ExpertPlan
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.solve import SolvedPlanes, solve
from hif4c.compiler.steps import StepError, choose_ranges, measure_steps
from hif4c.passes.program import Program
from hif4c.passes.relax_activations import relax_activations
from hif4c.passes.verify import Stage
from hif4c.passes.verify import verify as verify_program
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DTYPE_NAMES, TARGETS, Graph, encode
from hif4c.runtime.transformer import load_expert

__all__ = ["DTYPE", "Events", "ExpertBuilder"]

log = logging.getLogger(__name__)
DTYPE = torch.bfloat16

Events = Callable[[str, Any], None]
"""Called with (event, value): "step" sentence, "note" sentence, "pass" PassRecord; of a long step its "total", "unit"
"bytes" (else it counts pieces), "skipped" that was done before, and "bytes" for every amount that is done."""


class ExpertBuilder:
    """The experts of an artifact in the making: programs, weight files and what the manifest says of them.

    Args:
        location: where the checkpoints and the config of the model are.
        recipes: expert -> recipe.
        calibration: for the recipes that need one, and to measure every linear's SQNR.
        staging: the artifact's directory.
        scratch: a directory for what is not kept.
        events: progress, see `Events`.
        journal: of what is finished; what it holds is not done again.
        ranks: who share the work; every rank makes the same calls.

    Attributes:
        experts: expert -> its entry in the manifest.
        files: relative path -> (bytes, sha256) of the weight files.
    """

    def __init__(
        self,
        location: ModelLocation,
        recipes: Mapping[str, Recipe],
        calibration: Calibration | None,
        staging: Path,
        scratch: Path,
        events: Events,
        *,
        journal: Journal | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.experts: dict[str, Any] = {}
        self.files: dict[str, tuple[int, str]] = {}
        self._location, self._recipes, self._calibration = location, recipes, calibration
        self._staging, self._scratch, self._events = staging, scratch, events
        self._journal, self._ranks = journal or Journal(), ranks
        self._captured: dict[WanConfig, Program] = {}

    def expert(self, name: str, plan: ExpertPlan, checkpoint: Checkpoint) -> None:
        """Resolve the recipe, transform the program, and write graph and weights of one expert."""
        recipe, events = self._recipes[name], self._events
        if isinstance(checkpoint, FusedCheckpoint):
            events("step", f"adding LoRAs to {name}: {checkpoint.summary}")
            for note in checkpoint.notes:
                events("note", note)
        known = None if self._calibration is None else self._calibration.experts.get(name)
        used = known if recipe.needs_calibration else None
        if recipe.needs_calibration:
            events("step", f"choosing for {name}")
        choices = choose(plan, recipe, used, checkpoint, events, journal=self._journal, ranks=self._ranks)
        for note in choices.notes:
            events("note", note)
        program = self._transform(name, choices, recipe)
        folder = self._staging / name
        graph = _checked_graph(program)
        relaxed = _relaxed_graph(program) if recipe.bf16_steps else None

        def write_graphs() -> None:
            folder.mkdir(exist_ok=True)
            (folder / "graph.json").write_bytes(encode(graph))
            if relaxed is not None:
                (folder / "graph.bf16.json").write_bytes(encode(relaxed))

        run_on_first(self._ranks, write_graphs)
        solved = None
        if recipe.rounding == "gptq" and used is not None:
            solved = self._solve(name, program, graph, checkpoint, used)
        events("step", f"packing {name}")
        inputs = None if known is None else LinearInputs(program, known)
        written = write_weights(
            program, checkpoint, folder, events,
            solved=(lambda source: None) if solved is None else solved.get,
            statistics=(lambda source: None) if used is None or inputs is None else inputs.energy,
            measure=None if inputs is None else inputs.sqnr,
            journal=self._journal, ranks=self._ranks,
        )  # fmt: skip
        self.files |= {f"{name}/{file}": entry for file, entry in written.files.items()}
        config = self._location.configs[name]
        self.experts[name] = _expert_entry(config, recipe, choices, program, written)
        if isinstance(checkpoint, FusedCheckpoint):
            self.experts[name]["loras"] = checkpoint.record
        if known is not None and self._calibration is not None:
            self.experts[name]["calibration"] = {"sha256": self._calibration.digest(), "runs": self._calibration.runs}

    def choose_steps(self) -> None:
        """Let both programs of every expert predict the calibration's calls, and choose the steps for the second."""
        shares = {name: recipe.bf16_steps for name, recipe in self._recipes.items() if recipe.bf16_steps}
        if not shares:
            return
        assert self._calibration is not None
        self._events("step", "choosing the steps with bf16 activations")
        names = list(shares)
        calibrated = self._calibration.experts
        # The loader wants a manifest; the final one is written when all is known.
        run_on_first(self._ranks, lambda: write_manifest(self._staging, self._location, self.experts, dict(self.files)))
        artifact = open_artifact(self._staging)
        known = run_on_first(self._ranks, lambda: {name: self._journal.done(f"steps/{name}") for name in names})
        left = [name for name in names if known[name] is None]
        self._events("total", sum(len(self._ranks.share(range(calibrated[name].call_count))) for name in left))
        errors = [StepError(*values) for entry in known.values() if entry is not None for values in entry.values]
        for name in left:
            expert = load_expert(artifact, name, verify=False, release=True)
            found = measure_steps(name, expert, calibrated[name], partial(self._events, "bytes"), ranks=self._ranks)
            values = [dataclasses.astuple(error) for error in found]
            run_on_first(self._ranks, partial(self._journal.record, f"steps/{name}", values))
            errors += found
        errors.sort(key=lambda error: names.index(error.expert))
        # How long a step is depends on the next one, whoever serves it and whether it was recorded.
        ranges = choose_ranges(errors, shares, self._calibration.timesteps)
        for name in names:
            self.experts[name]["bf16_timesteps"] = [list(item) for item in ranges[name]]
            mine = [error for error in errors if error.expert == name]
            self.experts[name]["step_errors"] = [
                {"timestep": item.timestep, "w4a4": item.w4a4, "w4a16": item.w4a16} for item in mine
            ]
            for low, high in self.experts[name]["bf16_timesteps"]:
                self._events("note", f"{name}: bf16 activations at timesteps {low:g} to {high:g}")

    def _solve(
        self, name: str, program: Program, graph: Graph, checkpoint: Checkpoint, used: ExpertCalibration
    ) -> SolvedPlanes:
        """Round the weights whose rounding is "gptq"."""
        self._events("step", f"rounding {name} on its calibration calls (GPTQ)")
        solved = SolvedPlanes(self._journal, f"gptq/{name}")
        calls = [call for call, _ in used.calls()]
        solve(program, graph, checkpoint, calls, solved, self._events, scratch=self._scratch, ranks=self._ranks)
        return solved

    def _transform(self, name: str, choices: Choices, recipe: Recipe) -> Program:
        config = self._location.configs[name]
        if config not in self._captured:
            # Experts of one config have one captured program; weights and what is chosen for them differ.
            self._events("step", f"capturing {name}")
            self._captured[config] = capture(config, DTYPE, self._location.pipeline.expand_timesteps)
        program = self._captured[config].copy()

        def on_pass(record: PassRecord, _: Program) -> None:
            self._events("pass", record)
            log.info("%s: %s", record.name, "; ".join(record.notes))

        run_passes(program, choices, recipe, on_pass=on_pass)
        return program


def _checked_graph(program: Program) -> Graph:
    """A lowered program as a graph of operators that artifacts have (Hif4Error for others)."""
    graph = to_graph(program)
    if unknown := sorted({node.target for node in graph.nodes} - TARGETS.keys()):
        raise Hif4Error(
            f"the traced model uses operators that artifacts do not have: {', '.join(unknown)}; "
            "compile with the versions of torch and diffusers in constraints.txt."
        )
    return graph


def _relaxed_graph(program: Program) -> Graph:
    """The program with activations in bf16."""
    relaxed = program.copy()
    relax_activations(relaxed)
    verify_program(relaxed, Stage.FUSED)
    return _checked_graph(relaxed)


def _expert_entry(
    config: WanConfig,
    recipe: Recipe,
    choices: Choices,
    program: Program,
    written: Written,
) -> dict[str, Any]:
    """What the manifest says of one expert."""
    linears = []
    for linear in choices.plan.linears:
        decision = program.decisions[linear.decision.path]
        entry = {**dataclasses.asdict(decision), "in_features": linear.in_features, "out_features": linear.out_features}
        # An output of zeros has no ratio.
        if math.isfinite(written.sqnr.get(decision.path, math.nan)):
            entry["sqnr"] = written.sqnr[decision.path]
        if decision.path in choices.errors:
            entry["errors"] = dict(choices.errors[decision.path])
        if decision.mask is not None:
            entry["alpha"] = choices.alphas[decision.mask]
            entry["outlier_columns"] = int((program.masks[decision.mask] == 0).sum())
        linears.append(entry)
    return {
        "config": config.to_dict(),
        "dtype": DTYPE_NAMES[DTYPE],
        "recipe": recipe.to_dict(),
        "fingerprint": written.fingerprint,
        "linears": linears,
    }
