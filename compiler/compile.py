"""Compile a model: plan, capture, passes, weights, artifact. One pass over the checkpoint, one tensor in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.capture import build_transformer, capture
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.components import copy_components
from hif4c.compiler.emit import to_graph
from hif4c.compiler.locate import ModelLocation, locate_model
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pack import write_weights
from hif4c.compiler.pipeline import PassRecord, run_passes
from hif4c.compiler.plan import ExpertPlan, make_plan
from hif4c.compiler.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from hif4c.compiler.report import write_report
from hif4c.compiler.sampling_defaults import sampling_defaults
from hif4c.passes.program import Program
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
from hif4c.runtime.graph import DTYPE_NAMES, TARGETS, encode
from hif4c.runtime.native import is_available
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.transformer import load_expert

__all__ = ["CompileOptions", "compile_model", "resolve_recipes"]

log = logging.getLogger(__name__)
DTYPE = torch.bfloat16
COMPONENT_MODES = ("copy", "link", "none")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        recipes: expert -> recipe; experts that are not named are left out of the artifact.
        components: what to do with the rest of the pipeline: "copy", "link" (hard links, no extra disk), "none".
        golden: record golden outputs (one small forward an expert).
        revision: revision of a hub model.
    """

    recipes: Mapping[str, Recipe]
    components: str = "copy"
    golden: bool = True
    revision: str | None = None


Events = Callable[[str, Any], None]
"""Called with (event, value): "step" sentence, "total" bytes to read, "bytes" bytes read, "pass" PassRecord."""


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
    if target.exists() or target.is_symlink():
        raise Hif4Error(f"{target}: already exists; choose another name, or remove it first.")
    if options.components not in COMPONENT_MODES:
        raise Hif4Error(f"components {options.components!r}: choose one of {', '.join(COMPONENT_MODES)}.")
    location = locate_model(model, revision=options.revision, expert_files_only=options.components == "none")
    plans = {name: make_plan(location.configs[name], recipe, DTYPE) for name, recipe in options.recipes.items()}
    with _opened(location, list(options.recipes)) as checkpoints, _staging(target) as staging:
        events("total", sum(checkpoint.total_bytes for checkpoint in checkpoints.values()))
        # First: what is missing there should be said before the long part.
        if options.components != "none" and location.layout == "diffusers":
            events("step", "copying the rest of the pipeline")
            copy_components(location.root, staging / "pipeline", link=options.components == "link")
        experts: dict[str, Any] = {}
        files: dict[str, tuple[int, str]] = {}
        programs: dict[tuple[WanConfig, Recipe], Program] = {}
        for name, recipe in options.recipes.items():
            config = location.configs[name]
            if (config, recipe) not in programs:
                # Experts of one config and recipe have one program; only their weights differ.
                events("step", f"capturing {name}")
                programs[config, recipe] = _transform(config, plans[name], recipe, location, events)
            events("step", f"packing {name}")
            program = programs[config, recipe]
            written, fingerprint = _write_expert(program, checkpoints[name], staging / name, events)
            files |= {f"{name}/{file}": entry for file, entry in written.items()}
            experts[name] = _expert_entry(config, recipe, plans[name], program, fingerprint)
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


def _transform(config: WanConfig, plan: ExpertPlan, recipe: Recipe, location: ModelLocation, events: Events) -> Program:
    program = capture(config, DTYPE, location.pipeline.expand_timesteps)

    def on_pass(record: PassRecord, _: Program) -> None:
        events("pass", record)
        log.info("%s: %s", record.name, "; ".join(record.notes))

    run_passes(program, plan, recipe, on_pass=on_pass)
    return program


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


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A directory beside the target, removed again unless it was renamed away; so are parents that it had to make."""
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
    except OSError as error:
        raise Hif4Error(f"{target.parent}: cannot be written ({error.strerror}).") from None
    try:
        yield staging
    except OSError as error:
        where = error.filename or target
        raise Hif4Error(f"{where}: reading or writing failed while compiling ({error.strerror}).") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if nothing was put there


def _write_expert(
    program: Program, checkpoint: Checkpoint, folder: Path, events: Events
) -> tuple[dict[str, tuple[int, str]], str]:
    """Write graph and weights of one expert; returns weight file -> (bytes, sha256), and the weights' fingerprint."""
    graph = to_graph(program)
    if unknown := sorted({node.target for node in graph.nodes} - TARGETS.keys()):
        raise Hif4Error(
            f"the traced model uses operators that artifacts do not have: {', '.join(unknown)}; "
            "compile with the versions of torch and diffusers in constraints.txt."
        )
    folder.mkdir()
    (folder / "graph.json").write_bytes(encode(graph))
    return write_weights(program, checkpoint, folder, lambda size: events("bytes", size))


def _expert_entry(
    config: WanConfig, recipe: Recipe, plan: ExpertPlan, program: Program, fingerprint: str
) -> dict[str, Any]:
    """What the manifest says of one expert."""
    linears = []
    for linear in plan.linears:
        decision = program.decisions[linear.decision.path]
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        linears.append({**dataclasses.asdict(decision), **sizes})
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
        golden = make_golden(load_expert(artifact, name, verify=False))
        specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in golden.items()]
        with StreamingWriter(staging / "golden", specs, base_name=name) as writer:
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
