"""Compile a model: plan, capture, passes, weights, artifact. One pass over the checkpoint, one tensor in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
from hif4c.compiler.capture import build_transformer, capture
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices, choose
from hif4c.compiler.components import copy_components
from hif4c.compiler.emit import to_graph
from hif4c.compiler.linear_error import linear_sqnr
from hif4c.compiler.locate import ModelLocation, describe_model, locate_model
from hif4c.compiler.masks import rotated
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pack import InputStatistics, Planes, prepared_weight, write_weights
from hif4c.compiler.pipeline import PassRecord, run_passes
from hif4c.compiler.plan import ExpertPlan, make_plan
from hif4c.compiler.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from hif4c.compiler.report import write_report
from hif4c.compiler.sampling_defaults import sampling_defaults
from hif4c.compiler.solve import solve
from hif4c.compiler.staging import staged_directory
from hif4c.compiler.steps import choose_ranges, measure_steps
from hif4c.passes.program import Program, TensorSource
from hif4c.passes.relax_activations import relax_activations
from hif4c.passes.verify import Stage
from hif4c.passes.verify import verify as verify_program
from hif4c.runtime.artifact import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    canonical_json,
    manifest_digest,
    open_artifact,
    sha256_file,
)
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import make_golden
from hif4c.runtime.graph import DTYPE_NAMES, TARGETS, Graph, encode
from hif4c.runtime.native import is_available, native_kernels
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.transformer import load_expert

__all__ = ["CompileOptions", "compile_model", "resolve_recipes"]

log = logging.getLogger(__name__)
DTYPE = torch.bfloat16
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
    """

    recipes: Mapping[str, Recipe]
    components: str = "copy"
    golden: bool = True
    revision: str | None = None
    calibration: Path | None = None


Events = Callable[[str, Any], None]
"""Called with (event, value): "step" sentence, "note" sentence, "pass" PassRecord; "total", "bytes" of a long step."""


def resolve_recipes(experts: list[str], chosen: list[str], only: list[str]) -> dict[str, Recipe]:
    """Turn `--recipe` and `--expert` values into one recipe an expert.

    Args:
        experts: those that the model has.
        chosen: "NAME" for all experts, or "EXPERT=NAME"; later ones win.
        only: experts to compile, empty for all.

    Raises:
        Hif4Error: an expert that the model does not have, or an unknown recipe.
    """
    for name in [*only, *(item.split("=", 1)[0] for item in chosen if "=" in item)]:
        if name not in experts:
            raise Hif4Error(f"the model has no expert {name!r}; it has {', '.join(experts)}.")
    names = dict.fromkeys(experts, DEFAULT_RECIPE)
    for item in chosen:
        expert, found, recipe = item.partition("=")
        names.update({expert: recipe} if found else dict.fromkeys(experts, item))
    return {expert: load_recipe(name) for expert, name in names.items() if not only or expert in only}


def compile_model(model: str, output: str | os.PathLike[str], options: CompileOptions, events: Events) -> Path:
    """Compile MODEL into the artifact directory `output`.

    The directory appears under its name only when it is complete and a fresh process has verified it; on any failure
    nothing is left behind.

    Args:
        model: local directory, built-in name, or hub id.
        output: the artifact's directory; must not exist.
        options: see `CompileOptions`.
        events: progress, see `Events`.

    Raises:
        Hif4Error: bad input of any kind, or a full disk.
    """
    target = Path(output)
    if options.components not in COMPONENT_MODES:
        raise Hif4Error(f"components {options.components!r}: choose one of {', '.join(COMPONENT_MODES)}.")
    own = options.calibration is None and any(recipe.needs_calibration for recipe in options.recipes.values())
    if own:
        _refuse_large(model, options)
    elif options.calibration is not None:
        Calibration(options.calibration).close()  # what is wrong with the file should be said before the long part
    whole = own or options.components != "none"
    location = locate_model(model, revision=options.revision, expert_files_only=not whole)
    plans = {name: make_plan(location.configs[name], recipe, DTYPE) for name, recipe in options.recipes.items()}
    with _opened(location, list(options.recipes)) as checkpoints, staged_directory(target, "compiling") as staging:
        # First: what is missing there should be said before the long part.
        if options.components != "none" and location.layout == "diffusers":
            events("step", "copying the rest of the pipeline")
            copy_components(location.root, staging / "pipeline", link=options.components == "link")
        with contextlib.ExitStack() as stack:
            scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."))
            )
            calibration = _find_calibration(location, options, own, scratch, checkpoints, events)
            if calibration is not None:
                stack.enter_context(calibration)
            build = _Build(location, options, calibration, staging, scratch, events)
            with native_kernels():
                for name in options.recipes:
                    build.expert(name, plans[name], checkpoints[name])
                build.choose_steps()
            experts, files = build.experts, build.files
        _write_manifest(staging, location, experts, files)
        if options.golden:
            events("step", "recording golden outputs")
            _write_golden(staging)
        write_report(open_artifact(staging), staging)
        _write_manifest(staging, location, experts, files)
        events("step", "verifying in a fresh process")
        _verify_in_fresh_process(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            raise Hif4Error(f"{target}: the finished artifact cannot be moved there ({error.strerror}).") from None
    # So that the first load on this machine does not have to.
    events("step", "building the CPU kernels for this machine")
    if not is_available():
        events("step", "no CPU kernels: without a C++ compiler (g++ or clang++) 4-bit layers run on the portable ones")
    return target


class _Build:
    """The experts of an artifact in the making: programs, weight files and what the manifest says of them."""

    def __init__(
        self,
        location: ModelLocation,
        options: CompileOptions,
        calibration: Calibration | None,
        staging: Path,
        scratch: Path,
        events: Events,
    ) -> None:
        self.experts: dict[str, Any] = {}
        self.files: dict[str, tuple[int, str]] = {}
        self._location, self._options, self._calibration = location, options, calibration
        self._staging, self._scratch, self._events = staging, scratch, events
        self._captured: dict[WanConfig, Program] = {}

    def expert(self, name: str, plan: ExpertPlan, checkpoint: Checkpoint) -> None:
        """Resolve the recipe, transform the program, and write graph and weights of one expert."""
        recipe, events = self._options.recipes[name], self._events
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
            verify_program(relaxed, Stage.LOWERED)
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
        shares = {name: recipe.bf16_steps for name, recipe in self._options.recipes.items() if recipe.bf16_steps}
        if not shares:
            return
        assert self._calibration is not None
        self._events("step", "choosing the steps with bf16 activations")
        names = list(shares)
        self._events("total", sum(self._calibration.experts[name].call_count for name in names))
        # The loader wants a manifest; the final one is written when all is known.
        _write_manifest(self._staging, self._location, self.experts, dict(self.files))
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


def _find_calibration(
    location: ModelLocation,
    options: CompileOptions,
    own: bool,
    scratch: Path,
    checkpoints: Mapping[str, Checkpoint],
    events: Events,
) -> Calibration | None:
    """The calibration that was given, checked against the weights; or one made here for a small model."""
    if options.calibration is not None:
        # Also for recipes that do without: the report then says how far every linear is off.
        calibration = Calibration(options.calibration)
        for name, recipe in options.recipes.items():
            if recipe.needs_calibration or name in calibration.experts:
                calibration.check(name, checkpoints[name].fingerprint())
        return calibration
    if own:
        events("step", "calibrating (a small model; others take --calibration)")
        run_calibration(location, scratch / "calibration.safetensors", CalibrationOptions(), events)
        return Calibration(scratch / "calibration.safetensors")
    return None


@contextlib.contextmanager
def _opened(location: ModelLocation, names: list[str]) -> Iterator[dict[str, Checkpoint]]:
    """Open and check the checkpoints of all experts before any work is done."""
    with contextlib.ExitStack() as stack:
        checkpoints = {}
        for name in names:
            config = location.configs[name]
            checkpoint = stack.enter_context(Checkpoint(location.experts[name], config, location.layout))
            parameters = build_transformer(config, DTYPE).named_parameters()
            checkpoint.check({key: tuple(value.shape) for key, value in parameters})
            checkpoints[name] = checkpoint
        yield checkpoints


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


def _write_manifest(
    staging: Path, location: ModelLocation, experts: dict[str, Any], known: dict[str, tuple[int, str]]
) -> None:
    """List every file that is in the directory now. Written again when files are added.

    `known` maps relative paths to (bytes, sha256): files in it are not read again, new ones are added to it.
    """
    for path in sorted(staging.rglob("*")):
        relative = path.relative_to(staging).as_posix()
        if path.is_file() and relative != MANIFEST and relative not in known:
            known[relative] = (path.stat().st_size, sha256_file(path))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "source": location.source,
            "pipeline_class": location.pipeline.class_name,
            "boundary_ratio": location.pipeline.boundary_ratio,
            "expand_timesteps": location.pipeline.expand_timesteps,
            "experts": list(location.configs),
            "sampling": sampling_defaults(location.configs),
        },
        "experts": experts,
        "targets": ["portable"],
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(known.items())},
        "versions": {name: importlib.metadata.version(name) for name in ("hif4c", "torch", "diffusers")},
    }
    (staging / MANIFEST).write_bytes(canonical_json({**manifest, "digest": manifest_digest(manifest)}))


def _write_golden(staging: Path) -> None:
    """Record golden outputs with the runtime, from the bytes that were written."""
    artifact = open_artifact(staging)
    (staging / "golden").mkdir()
    for name in artifact.experts:
        expert = load_expert(artifact, name, verify=False)
        for variant in (None, *artifact.variants(name)):
            golden = make_golden(expert.variant(variant))
            specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in golden.items()]
            base_name = name if variant is None else f"{name}.{variant}"
            with StreamingWriter(staging / "golden", specs, base_name=base_name) as writer:
                for key, value in golden.items():
                    writer.write(key, value)


def _verify_in_fresh_process(staging: Path) -> None:
    """An artifact that does not load is no artifact: what was written is verified without anything of this process."""
    code = (
        "import sys; from hif4c.runtime.verify import verify_artifact; "
        "checks = verify_artifact(sys.argv[1], kernels='portable'); "
        "wrong = [check for check in checks if check.replay and not check.replay.identical]; "
        "sys.exit(str(wrong[0]) if wrong else 0)"
    )
    # -P: nothing in the user's current directory may stand in for a module of the standard library.
    command = [sys.executable, "-P", "-c", code, str(staging)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise Hif4Error(f"the written artifact does not verify in a fresh process, so it was not kept: {lines[-1]}")
