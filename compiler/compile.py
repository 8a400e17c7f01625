"""Compile a model: plan, capture, passes, weights, artifact. One pass over the checkpoint, one tensor in memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.components import copy_components
from hif4c.compiler.experts import DTYPE, Events, ExpertBuilder
from hif4c.compiler.kernels import build_kernels, check_targets, trust_built_kernels
from hif4c.compiler.locate import ModelLocation, describe_model, locate_model
from hif4c.compiler.manifest import write_manifest
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.report import write_report
from hif4c.compiler.staging import staged_directory
from hif4c.compiler.wan_parameters import parameter_shapes
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import make_golden
from hif4c.runtime.native import native_kernels, portable_kernels
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.transformer import load_expert

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
    """

    recipes: Mapping[str, Recipe]
    components: str = "copy"
    golden: bool = True
    revision: str | None = None
    calibration: Path | None = None
    targets: tuple[str, ...] = ("cpu",)


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
    check_targets(options.targets)
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
        build_kernels(options.targets, staging / "kernels", events)
        with contextlib.ExitStack() as stack:
            scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."))
            )
            calibration = _find_calibration(location, options, own, scratch, checkpoints, events)
            if calibration is not None:
                stack.enter_context(calibration)
            build = ExpertBuilder(location, options.recipes, calibration, staging, scratch, events)
            with native_kernels():
                for name in options.recipes:
                    build.expert(name, plans[name], checkpoints[name])
                build.choose_steps()
            experts, files = build.experts, build.files
        write_manifest(staging, location, experts, files)
        if options.golden:
            events("step", "recording golden outputs")
            _write_golden(staging)
        write_report(open_artifact(staging), staging)
        write_manifest(staging, location, experts, files)
        events("step", "verifying in a fresh process")
        _verify_in_fresh_process(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            raise Hif4Error(f"{target}: the finished artifact cannot be moved there ({error.strerror}).") from None
    trust_built_kernels(open_artifact(target), events)
    return target


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
            checkpoint.check(parameter_shapes(config))
            checkpoints[name] = checkpoint
        yield checkpoints


def _write_golden(staging: Path) -> None:
    """Record golden outputs with the runtime, from the bytes that were written.

    With the portable kernels, which define what an operator computes to the last bit.
    """
    artifact = open_artifact(staging)
    (staging / "golden").mkdir()
    for name in artifact.experts:
        expert = load_expert(artifact, name, verify=False)
        for variant in (None, *artifact.variants(name)):
            with portable_kernels():
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
