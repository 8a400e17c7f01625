"""Compile a model: plan, capture, passes, weights, artifact. One pass over the checkpoint, one tensor in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.compile_inputs import WEIGHTS, check_inputs, describe_inputs
from hif4c.compiler.components import copy_components
from hif4c.compiler.disk_space import check_disk, compile_disk, recorded_tokens
from hif4c.compiler.experts import DTYPE, Events, ExpertBuilder
from hif4c.compiler.fresh_process import verify_in_fresh_processes
from hif4c.compiler.journal import run_on_first
from hif4c.compiler.kernels import build_kernels, check_targets, trust_built_kernels
from hif4c.compiler.locate import ModelLocation, describe_model, locate_model
from hif4c.compiler.lora import fuse_loras
from hif4c.compiler.manifest import write_manifest
from hif4c.compiler.pieces import Piece, make_pieces, write_golden
from hif4c.compiler.plan import ExpertPlan, make_plan
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.report import write_report
from hif4c.compiler.staging import Unfinished, partial_directory
from hif4c.compiler.wan_parameters import parameter_shapes
from hif4c.runtime.artifact import MANIFEST, open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import cpu_target
from hif4c.runtime.native import native_kernels

__all__ = ["CompileOptions", "Events", "compile_model"]

SMALL_MODEL_BYTES = 2_000_000_000
"""Models up to this size are calibrated by `compile` itself where a recipe needs it."""
COMPONENT_MODES = ("copy", "link", "none")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        recipes: expert -> recipe; experts that are not named are left out of the artifact.
        components: what to do with the rest of the pipeline: "copy", "link" (hard links, no extra disk), "none".
        golden: record golden outputs (one small forward an expert).
        revision: revision of a hub model.
        calibration: file of `hif4c calibrate`. Without one, a recipe that needs it calibrates a small model itself.
            With one, the output SQNR of every linear is recorded, whatever the recipe.
        targets: what kernels are built for, of `hif4c.compiler.kernels.TARGETS`.
        loras: expert -> file and scale of each LoRA that is added to its weights first.
        resume: continue a compile into the same output that was killed or interrupted, or found the disk full.
    """

    recipes: Mapping[str, Recipe]
    components: str = "copy"
    golden: bool = True
    revision: str | None = None
    calibration: Path | None = None
    targets: tuple[str, ...] = ("cpu",)
    loras: Mapping[str, tuple[tuple[Path, float], ...]] = field(default_factory=dict)
    resume: bool = False


def compile_model(
    model: str, output: str | os.PathLike[str], options: CompileOptions, events: Events, *, ranks: Ranks = ALONE
) -> Path:
    """Compile MODEL into the artifact directory `output`.

    The directory appears under its name only when it is complete and a fresh process has verified it. What is finished
    before that is in `.NAME.partial` beside it; it is kept, to be continued with `resume`, when the process is killed
    or interrupted or the disk is full, and removed on any other failure.

    Args:
        model: local directory, built-in name, or hub id.
        output: the artifact's directory; must not exist.
        options: see `CompileOptions`.
        events: progress, see `Events`.
        ranks: who share the work; every rank makes the same call, and the output is on a file system that all see.

    Raises:
        Hif4Error: bad input of any kind, a full disk, another process that makes the same output, or an unfinished
            compile that is in the way or does not fit.
    """
    target = Path(output)
    own = options.calibration is None and any(recipe.needs_calibration for recipe in options.recipes.values())
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if options.components not in COMPONENT_MODES:
                raise Hif4Error(f"components {options.components!r}: choose one of {', '.join(COMPONENT_MODES)}.")
            check_targets(options.targets)
            if own:
                _refuse_large(model, options)
            whole = own or options.components != "none"
            location = locate_model(model, revision=options.revision, expert_files_only=not whole)
            plans = {name: make_plan(location.configs[name], recipe, DTYPE) for name, recipe in options.recipes.items()}
            checkpoints = stack.enter_context(_opened(location, options))
            inputs = describe_inputs(location, checkpoints, options.recipes, options.calibration, _settings(options))
            if ranks.first and not os.path.lexists(target):
                _check_disk(target, location, plans, options)
        unfinished = stack.enter_context(
            partial_directory(
                target, inputs, resume=options.resume, ranks=ranks, say=partial(events, "step"),
                accept=lambda before, journal: check_inputs(before, inputs, checkpoints, journal),
            )
        )  # fmt: skip
        if unfinished.complete:
            events("step", f"{target} was complete already; what was left beside it is removed")
        else:
            with ranks.together():
                _Compile(location, options, plans, checkpoints, unfinished, events, ranks).run()
            run_on_first(ranks, unfinished.publish)
        if ranks.first:
            trust_built_kernels(open_artifact(target), events)
    return target


def _settings(options: CompileOptions) -> dict[str, Any]:
    """What else decides the bytes of the artifact."""
    settings = {name: getattr(options, name) for name in ("components", "golden", "targets")}
    if any(recipe.needs_calibration for recipe in options.recipes.values()):
        # The last bit of what is summed on calibration rows and calls depends on it.
        settings["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    return settings


def _check_disk(
    target: Path, location: ModelLocation, plans: Mapping[str, ExpertPlan], options: CompileOptions
) -> None:
    """Refuse what does not fit on the disk; what an unfinished compile has left there counts."""
    tokens = {}
    if options.calibration is not None and any(recipe.rounding == "gptq" for recipe in options.recipes.values()):
        with Calibration(options.calibration) as calibration:
            known = {name: calibration.experts[name] for name in plans if name in calibration.experts}
            tokens = {name: recorded_tokens(expert, location.configs[name]) for name, expert in known.items()}
    copied = options.components == "copy" and location.layout == "diffusers"
    needs = compile_disk(
        plans, options.recipes, components=location.root if copied else None, targets=options.targets, tokens=tokens,
        expanded=location.pipeline.expand_timesteps,
    )  # fmt: skip
    check_disk(target, needs, doing="compiling")


@dataclass(frozen=True)
class _Compile:
    """One compile, from the opened checkpoints to a directory that needs no more than its name.

    Every piece of work that takes long is journaled when it is done; a later process that finds it there goes on.
    """

    location: ModelLocation
    options: CompileOptions
    plans: Mapping[str, ExpertPlan]
    checkpoints: Mapping[str, Checkpoint]
    unfinished: Unfinished
    events: Events
    ranks: Ranks

    def run(self) -> None:
        """Make the artifact; every rank calls this."""
        staging, journal, ranks = self.unfinished.artifact, self.unfinished.journal, self.ranks
        # First: what is missing there should be said before the long part.
        files = run_on_first(ranks, self._parts)
        with contextlib.ExitStack() as stack:
            calibration = self._calibration()
            if calibration is not None:
                stack.enter_context(calibration)
            build = ExpertBuilder(
                self.location, self.options.recipes, calibration, staging, self.unfinished.scratch, self.events,
                journal=journal, ranks=ranks,
            )  # fmt: skip
            build.files |= files
            with native_kernels():
                for name, checkpoint in self.checkpoints.items():
                    build.expert(name, self.plans[name], checkpoint)
                build.choose_steps()
        run_on_first(ranks, lambda: write_manifest(staging, self.location, build.experts, build.files))
        if self.options.golden:
            self.events("step", "recording golden outputs")
            build.files |= write_golden(staging, journal, self.events, ranks)
        run_on_first(ranks, lambda: self._finish(build))

    def _parts(self) -> dict[str, tuple[int, str]]:
        """Make what is no expert, and remove what a killed process may have left of what is written anew."""
        staging, options, pieces = self.unfinished.artifact, self.options, []
        for path in self.unfinished.scratch.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        for name in (MANIFEST, "report.json", "report.html"):
            (staging / name).unlink(missing_ok=True)
        if options.components != "none" and self.location.layout == "diffusers":

            def copy() -> None:
                self.events("step", "copying the rest of the pipeline")
                copy_components(self.location.root, staging / "pipeline", link=options.components == "link")

            pieces.append(Piece("pipeline", copy))
        for target in options.targets:
            folder = Path("kernels", cpu_target() if target == "cpu" else target)
            pieces.append(Piece(str(folder), partial(build_kernels, (target,), staging / "kernels", self.events)))
        return make_pieces(pieces, staging, self.unfinished.journal)

    def _calibration(self) -> Calibration | None:
        """The calibration that was given, checked against the weights; or one made here for a small model."""
        options, journal, path = self.options, self.unfinished.journal, self.options.calibration
        recipes = options.recipes
        if path is None:
            if not any(recipe.needs_calibration for recipe in recipes.values()):
                return None
            path = self.unfinished.scratch / "calibration.safetensors"
            if journal.done("calibration") is None:
                self.events("step", "calibrating (a small model; others take --calibration)")
                made = CalibrationOptions(loras=options.loras)
                run_calibration(self.location, path, made, self.events, ranks=self.ranks)
                if self.ranks.first:
                    journal.record("calibration")
        # Also for recipes that do without: the report then says how far every linear is off.
        calibration = Calibration(path)
        for name, recipe in recipes.items():
            if recipe.needs_calibration or name in calibration.experts:
                run_on_first(self.ranks, partial(self._check_weights, name, calibration))
        return calibration

    def _check_weights(self, name: str, calibration: Calibration) -> None:
        """Refuse a calibration of other weights; reads all of them, once."""
        key = f"{WEIGHTS}/{name}"
        if self.unfinished.journal.done(key) is None:
            self.events("step", f"comparing the weights of {name} with the calibration's")
            fingerprint = self.checkpoints[name].fingerprint()
            calibration.check(name, fingerprint)
            self.unfinished.journal.record(key, fingerprint)

    def _finish(self, build: ExpertBuilder) -> None:
        """Write what is told of the artifact, and see that it loads."""
        staging = self.unfinished.artifact
        write_report(open_artifact(staging), staging)
        write_manifest(staging, self.location, build.experts, build.files)
        self.events("step", "verifying in a fresh process")
        verify_in_fresh_processes(open_artifact(staging), self.events)


def _refuse_large(model: str, options: CompileOptions) -> None:
    """Say that a calibration is needed before anything is fetched or copied."""
    description = describe_model(model, revision=options.revision)
    plans = [make_plan(description.configs[name], recipe, DTYPE) for name, recipe in options.recipes.items()]
    image = description.pipeline.class_name == "WanImageToVideoPipeline"
    if image or sum(plan.bytes_before for plan in plans) > SMALL_MODEL_BYTES:
        names = ", ".join(sorted({recipe.name for recipe in options.recipes.values() if recipe.needs_calibration}))
        raise Hif4Error(
            f"recipe {names} needs a calibration; make one with `hif4c calibrate {model} -o FILE"
            f"{' --image FIRST_FRAME' if image else ''}` and give --calibration FILE, or choose a recipe without "
            "(--recipe rotate, --recipe rtn)."
        )


@contextlib.contextmanager
def _opened(location: ModelLocation, options: CompileOptions) -> Iterator[dict[str, Checkpoint]]:
    """Open and check the checkpoints of all experts before any work is done."""
    with contextlib.ExitStack() as stack:
        checkpoints = {}
        for name in options.recipes:
            config = location.configs[name]
            base = Checkpoint(location.experts[name], config, location.layout)
            checkpoint = stack.enter_context(fuse_loras(base, options.loras.get(name, ()), name))
            checkpoint.check(parameter_shapes(config))
            checkpoints[name] = checkpoint
        yield checkpoints
