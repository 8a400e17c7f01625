"""The experts of an artifact: what a recipe becomes for each, its program, its weight files, its manifest entry."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.capture import capture
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices, choose
from hif4c.compiler.emit import to_graph
from hif4c.compiler.linear_error import linear_sqnr
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.manifest import write_manifest
from hif4c.compiler.masks import rotated
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pack import write_weights
from hif4c.compiler.pipeline import PassRecord, run_passes
from hif4c.compiler.plan import ExpertPlan
from hif4c.compiler.planes import InputStatistics, Planes, prepared_weight
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.solve import solve
from hif4c.compiler.steps import choose_ranges, measure_steps
from hif4c.passes.program import Program, TensorSource
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
"""Called with (event, value): "step" sentence, "note" sentence, "pass" PassRecord; "total", "bytes" of a long step.

Where a step does not go through bytes, "total" and "bytes" count its pieces."""


class ExpertBuilder:
    """The experts of an artifact in the making: programs, weight files and what the manifest says of them.

    Args:
        location: where the checkpoints and the config of the model are.
        recipes: expert -> recipe.
        calibration: for the recipes that need one, and to measure every linear's SQNR.
        staging: the artifact's directory.
        scratch: a directory for what is not kept.
        events: progress, see `Events`.

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
    ) -> None:
        self.experts: dict[str, Any] = {}
        self.files: dict[str, tuple[int, str]] = {}
        self._location, self._recipes, self._calibration = location, recipes, calibration
        self._staging, self._scratch, self._events = staging, scratch, events
        self._captured: dict[WanConfig, Program] = {}

    def expert(self, name: str, plan: ExpertPlan, checkpoint: Checkpoint) -> None:
        """Resolve the recipe, transform the program, and write graph and weights of one expert."""
        recipe, events = self._recipes[name], self._events
        known = None if self._calibration is None else self._calibration.experts.get(name)
        used = known if recipe.needs_calibration else None
        if recipe.needs_calibration:
            events("step", f"choosing for {name}")
        if used is not None:
            events("total", len(used.groups))
        choices = choose(plan, recipe, used, checkpoint, lambda count: events("bytes", count))
        for note in choices.notes:
            events("note", note)
        program = self._transform(name, choices, recipe)
        folder = self._staging / name
        folder.mkdir()
        graph = _write_graph(program, folder / "graph.json")
        if recipe.bf16_steps:
            relaxed = program.copy()
            relax_activations(relaxed)
            verify_program(relaxed, Stage.FUSED)
            _write_graph(relaxed, folder / "graph.bf16.json")
        solved = None
        if recipe.rounding == "gptq" and used is not None:
            events("step", f"rounding {name} on its calibration calls (GPTQ)")
            weights = [str(source.source) for source in program.tensors.values() if source.plane == "codes"]
            events("total", sum(checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize for name in weights))
            calls = [call for call, _ in used.calls()]
            (self._scratch / name).mkdir()
            solved = solve(program, graph, checkpoint, calls, self._scratch / name, lambda size: events("bytes", size))
        events("step", f"packing {name}")
        events("total", checkpoint.total_bytes)
        measured: dict[str, float] = {}

        def measure(source: TensorSource, planes: Planes) -> None:
            if known is not None:
                path = str(source.source).removesuffix(".weight")
                decision, group = program.decisions[path], known.group_of(path)
                if group is not None:
                    weight = prepared_weight(source, checkpoint.read(str(source.source)), program)
                    mask = None if decision.mask is None else program.masks[decision.mask]
                    shift = None if decision.shift is None else program.shifts[decision.shift]
                    measured[path] = linear_sqnr(decision, known.rows(group).float(), weight, planes, mask, shift)

        def energy(source: TensorSource) -> InputStatistics | None:
            path = str(source.source).removesuffix(".weight")
            group = None if used is None else used.group_of(path)
            if used is None or group is None:
                return None
            rows, shift = used.rows(group).float(), program.decisions[path].shift
            rows = rows if shift is None else rows - program.shifts[shift]
            mask = None if source.mask is None else program.masks[source.mask]
            return InputStatistics(rotated(rows, mask, source.hadamard).square().mean(0), len(rows))

        written, fingerprint = write_weights(
            program, checkpoint, folder, lambda size: events("bytes", size),
            solved=(lambda source: None) if solved is None else solved.get, statistics=energy, on_planes=measure,
        )  # fmt: skip
        self.files |= {f"{name}/{file}": entry for file, entry in written.items()}
        config = self._location.configs[name]
        self.experts[name] = _expert_entry(config, recipe, choices, program, fingerprint, measured)
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
        self._events("total", sum(self._calibration.experts[name].call_count for name in names))
        # The loader wants a manifest; the final one is written when all is known.
        write_manifest(self._staging, self._location, self.experts, dict(self.files))
        artifact = open_artifact(self._staging)
        errors = [
            error
            for name in names
            for error in measure_steps(
                name,
                load_expert(artifact, name, verify=False),
                self._calibration.experts[name],
                lambda count: self._events("bytes", count),
            )
        ]
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


def _write_graph(program: Program, path: Path) -> Graph:
    """Write a lowered program as graph.json."""
    graph = to_graph(program)
    if unknown := sorted({node.target for node in graph.nodes} - TARGETS.keys()):
        raise Hif4Error(
            f"the traced model uses operators that artifacts do not have: {', '.join(unknown)}; "
            "compile with the versions of torch and diffusers in constraints.txt."
        )
    path.write_bytes(encode(graph))
    return graph


def _expert_entry(
    config: WanConfig,
    recipe: Recipe,
    choices: Choices,
    program: Program,
    fingerprint: str,
    measured: Mapping[str, float],
) -> dict[str, Any]:
    """What the manifest says of one expert."""
    linears = []
    for linear in choices.plan.linears:
        decision = program.decisions[linear.decision.path]
        entry = {**dataclasses.asdict(decision), "in_features": linear.in_features, "out_features": linear.out_features}
        # An output of zeros has no ratio.
        if math.isfinite(measured.get(decision.path, math.nan)):
            entry["sqnr"] = measured[decision.path]
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
        "fingerprint": fingerprint,
        "linears": linears,
    }
