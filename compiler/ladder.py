"""The ladder: recipes side by side on one yardstick; every row is kept on the disk as soon as it is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.compile import SMALL_MODEL_BYTES, CompileOptions, Events, compile_model
from hif4c.compiler.evaluation import Clip, measure_distance, sample_clips, score_clips
from hif4c.compiler.ladder_rows import (
    CalibrationFile,
    LadderResult,
    LadderRow,
    ReferenceFigures,
    append_row,
    open_calibration,
    read_clips,
    read_rows,
    write_clips,
)
from hif4c.compiler.locate import ModelLocation, locate_model
from hif4c.compiler.recipe import Recipe, builtin_recipes
from hif4c.compiler.report import summarize
from hif4c.compiler.tiny.world import Attributes
from hif4c.runtime.artifact import Artifact, canonical_json, open_artifact, sha256_file
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.pipeline import load_components, load_pipeline
from hif4c.runtime.sampling import SamplingSettings, open_image

__all__ = ["KINDS", "Yardstick", "ladder_recipes", "median_sqnr", "run_ladder", "vary_recipe"]

RUNGS = (
    "rtn", "smooth-max", "tail-aware", "rotate", "tail-aware-rotate", "gptq", "svd", "best", "weight-only",
)  # fmt: skip
"""The built-in recipes in the order in which they are compared; others follow by name."""

KINDS: dict[str, tuple[str, ...]] = {
    "attn1.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.out": ("attn1.to_out.0",),
    "attn2.q": ("attn2.to_q",),
    "attn2.kv": ("attn2.to_k", "attn2.to_v"),
    "attn2.out": ("attn2.to_out.0",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}
"""Kind of linear -> its paths inside a block."""

ROW_FILE = "rows.jsonl"
# Of a row's bar: a guess that only smooths it, as the estimate follows what was measured.
_COMPILE_SHARE = 0.3


@dataclass(frozen=True)
class Yardstick:
    """What every row of a ladder is measured on.

    Attributes:
        prompts: one a clip; clip i is sampled from seed + i.
        expected: what the scorer expects of each prompt, None for prompts that no scorer knows.
        settings: size, frames, steps, guidance.
        seed: seed of the first clip.
        batch: clips sampled together.
        image: first frame of every clip, for an image-to-video model.
    """

    prompts: tuple[str, ...]
    expected: tuple[Attributes, ...] | None
    settings: SamplingSettings
    seed: int = 0
    batch: int = 16
    image: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """All that a clip depends on beside the pipeline."""
        values = {"prompts": list(self.prompts), "settings": dataclasses.asdict(self.settings)}
        image = None if self.image is None else sha256_file(self.image)
        return {**values, "seed": self.seed, "batch": self.batch, "image": image}


def ladder_recipes() -> list[Recipe]:
    """The built-in recipes in the order of the ladder."""
    recipes = builtin_recipes()
    names = [name for name in RUNGS if name in recipes]
    return [recipes[name] for name in [*names, *sorted(recipes.keys() - set(names))]]


def vary_recipe(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one key changed, called "NAME KEY=VALUE"; Hif4Error for an unknown key or a bad value."""
    name = f"{recipe.name} {key}={value}"
    return Recipe.from_dict({**recipe.to_dict(), key: value, "name": name}, f"recipe {name}")


def run_ladder(
    model: str,
    recipes: Sequence[Recipe],
    calibrations: Sequence[Path],
    yardstick: Yardstick,
    work: Path,
    *,
    device: str = "cpu",
    kernels: str = "auto",
    keep: bool = False,
    events: Events = lambda event, value: None,
) -> LadderResult:
    """Compile and measure MODEL with every recipe and calibration file against its own bf16 clips.

    The bf16 model is sampled once; its clips and every row stay in `work`, so that a ladder that was interrupted goes
    on where it stopped, and a longer one measures only what is new. A row is measured again when the model's weights,
    the recipe's values, the calibration file, the prompts, seeds or settings, or the versions of hif4c or torch differ.

    Args:
        model: directory, built-in name or hub id.
        recipes: one artifact each, all experts alike; for a sweep, see `vary_recipe`.
        calibrations: calibration files. Recipes that need none are measured once, and take the first file only to
            measure their linears. Where a recipe needs one and there is none, a small model is calibrated here.
        yardstick: prompts, seeds and settings.
        work: directory for clips, rows and artifacts; made when missing.
        device: where both pipelines run.
        kernels: as `load_pipeline`.
        keep: leave the artifacts in `work`/artifacts.
        events: progress: ("total", amount) begins a count, in the end that of the rows still to measure,
            ("advance", amount) goes on with it, ("step", sentence).

    Raises:
        Hif4Error: a recipe needs calibration and there is none for this large model, a calibration file of other
            weights, two different recipes of one name, or as `compile_model`, `load_pipeline` and `sample_clips`.
    """
    recipes = _distinct(recipes)
    location = locate_model(model, expert_files_only=False)
    image = open_image(yardstick.image, location.pipeline.class_name, yardstick.settings)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Hif4Error(f"{work}: cannot be made a directory ({error.strerror}).") from None
    experts = {name: _fingerprint(location, name) for name in location.experts}
    if not calibrations and (names := [recipe.name for recipe in recipes if recipe.needs_calibration]):
        calibrations = [_calibrate(location, work / f"calibration-{_digest(experts)[:16]}.safetensors", names, events)]
    opened = [open_calibration(path, experts) for path in calibrations]
    files = list({file.digest: file for file in opened}.values())
    pairs = [(recipe, file) for recipe in recipes for file in (files if recipe.needs_calibration else [None])]
    base = {
        "experts": experts,
        "yardstick": yardstick.to_dict(),
        "device": device,
        "versions": {name: version(name) for name in ("hif4c", "torch")},
    }
    known = read_rows(work / ROW_FILE)
    keys = [_row_key(base, recipe, file, bool(files)) for recipe, file in pairs]
    missing = len(set(keys) - known.keys())
    bench = _Bench(model, location, yardstick, image, work, device, kernels, keep, events)
    cached = bench.reference_path(base).exists()
    events("total", missing + (not cached))
    clips, reference = bench.reference(base)
    rows: list[LadderRow] = []
    started, measured = time.perf_counter(), 0
    for key, (recipe, file) in zip(keys, pairs, strict=True):
        if key not in known:
            known[key] = bench.measure(key, recipe, file, files[0] if files else None, clips)
            append_row(work / ROW_FILE, known[key])
            measured += 1
            left = (missing - measured) * (time.perf_counter() - started) / measured
            rest = f"; about {_duration(left)} left" if left else ""
            events("step", f"{measured} of {missing}: {_describe(known[key])}{rest}")
        # Names are no part of the key: what was measured under another name is the same measurement.
        label = None if file is None else file.label
        rows.append(dataclasses.replace(known[key], recipe=recipe.name, values=recipe.to_dict(), calibration=label))
    source, count = location.source, len(yardstick.prompts)
    return LadderResult(source, count, yardstick.seed, yardstick.settings, reference, rows)


@dataclass(frozen=True)
class _Bench:
    """Where the measurements of one ladder are made."""

    model: str
    location: ModelLocation
    yardstick: Yardstick
    image: Any
    work: Path
    device: str
    kernels: str
    keep: bool
    events: Events

    def reference_path(self, base: Mapping[str, Any]) -> Path:
        """The file with the clips of the bf16 model."""
        return self.work / f"reference-{_digest(base)[:16]}.safetensors"

    def reference(self, base: Mapping[str, Any]) -> tuple[list[Clip], ReferenceFigures]:
        """The clips of the bf16 model, sampled now or earlier, and its figures."""
        path = self.reference_path(base)
        if not path.exists():
            self.events("step", "sampling the bf16 model")
            root, class_name = str(self.location.root), self.location.pipeline.class_name
            clips, seconds = self._sample(load_components(root, class_name).to(self.device), 1.0)
            write_clips(path, clips, seconds)
        clips, seconds = read_clips(path)
        return clips, ReferenceFigures(self._scores(clips), seconds)

    def measure(
        self,
        key: str,
        recipe: Recipe,
        file: CalibrationFile | None,
        rows: CalibrationFile | None,
        reference: Sequence[Clip],
    ) -> LadderRow:
        """Compile, sample, compare, and remove the artifact; `rows` is what SQNRs are measured on without a `file`."""
        label = recipe.name if file is None else f"{recipe.name}-{file.label}"
        path = self.work / "artifacts" / f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', label)[:80]}-{key[:8]}.hif4"
        shutil.rmtree(path, ignore_errors=True)  # of a run that was interrupted after the compile
        used = file or rows
        options = CompileOptions(
            dict.fromkeys(self.location.experts, recipe),
            components="none",
            golden=False,
            calibration=None if used is None else used.path,
        )
        try:
            return self._measure(path, options, key, recipe, file, reference)
        finally:
            if not self.keep:
                shutil.rmtree(path, ignore_errors=True)

    def _measure(
        self,
        path: Path,
        options: CompileOptions,
        key: str,
        recipe: Recipe,
        file: CalibrationFile | None,
        reference: Sequence[Clip],
    ) -> LadderRow:
        progress = _CompileProgress(self.events)
        started = time.perf_counter()
        compile_model(self.model, path, options, progress)
        progress.finish()
        compile_seconds = time.perf_counter() - started
        artifact = open_artifact(path)
        root = str(self.location.root)
        pipeline = load_pipeline(path, base=root, verify=False, device=self.device, kernels=self.kernels)
        clips, sample_seconds = self._sample(pipeline, 1 - _COMPILE_SHARE)
        experts = summarize(artifact)
        weights = sum(item.quantized_weights for item in experts)
        bits = sum(item.bits_per_weight * item.quantized_weights for item in experts)
        return LadderRow(
            key=key,
            model=self.location.source,
            recipe=recipe.name,
            values=recipe.to_dict(),
            calibration=None if file is None else file.label,
            calibration_seed=None if file is None else file.seed,
            calibration_prompts=None if file is None else file.prompts,
            prompts=len(clips),
            seed=self.yardstick.seed,
            scores=self._scores(clips),
            **measure_distance(reference, clips),
            sqnr=median_sqnr(artifact),
            compile_seconds=compile_seconds,
            sample_seconds=sample_seconds,
            artifact_bytes=sum(item.file_bytes for item in experts),
            bf16_bytes=sum(item.bf16_bytes for item in experts),
            bits_per_weight=bits / weights if weights else 0.0,
        )

    def _sample(self, pipeline: Any, share: float) -> tuple[list[Clip], float]:
        yardstick = self.yardstick
        part = share / (len(yardstick.prompts) * yardstick.settings.steps)
        started = time.perf_counter()
        clips = sample_clips(
            pipeline,
            yardstick.prompts,
            yardstick.settings,
            seed=yardstick.seed,
            batch=yardstick.batch,
            image=self.image,
            on_step=lambda count: self.events("advance", part * count),
        )
        return clips, time.perf_counter() - started

    def _scores(self, clips: Sequence[Clip]) -> dict[str, float] | None:
        return None if self.yardstick.expected is None else score_clips(clips, self.yardstick.expected)


def median_sqnr(artifact: Artifact) -> dict[str, float | None]:
    """Kind of linear -> median of the SQNRs (decibels) that the manifest records for it, None where it has none."""
    kinds = {path: kind for kind, paths in KINDS.items() for path in paths}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for info in artifact.experts.values():
        for linear in info.linears:
            kind = kinds.get(re.sub(r"^blocks\.\d+\.", "", linear["path"]))
            if kind is not None and linear.get("sqnr") is not None:
                found[kind].append(float(linear["sqnr"]))
    return {kind: float(np.median(values)) if values else None for kind, values in found.items()}


def _distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if found.setdefault(recipe.name, recipe) != recipe:
            raise Hif4Error(f"two different recipes are called {recipe.name!r}; rename one of their files.")
    return list(found.values())


def _fingerprint(location: ModelLocation, name: str) -> str:
    with Checkpoint(location.experts[name], location.configs[name], location.layout) as checkpoint:
        return checkpoint.fingerprint()


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _row_key(base: Mapping[str, Any], recipe: Recipe, file: CalibrationFile | None, has_sqnr: bool) -> str:
    content = {key: value for key, value in recipe.to_dict().items() if key not in ("name", "description")}
    digest = None if file is None else file.digest
    return _digest({**base, "recipe": content, "calibration": digest, "has_sqnr": has_sqnr})


def _calibrate(location: ModelLocation, path: Path, recipes: Sequence[str], events: Events) -> Path:
    """A calibration file of a small model, made now or by an earlier run."""
    sizes = [sum(file.stat().st_size for file in root.glob("*.safetensors")) for root in location.experts.values()]
    if sum(sizes) > SMALL_MODEL_BYTES:
        raise Hif4Error(
            f"{', '.join(recipes)}: a calibration is needed; make one with `hif4c calibrate {location.source} -o FILE` "
            "and give --calibration FILE."
        )
    if not path.exists():
        events("step", "calibrating (a small model; others take --calibration)")
        names = {"bytes": "advance"}
        run_calibration(
            location, path, CalibrationOptions(), lambda event, value: events(names.get(event, event), value)
        )
    return path


class _CompileProgress:
    """Turns the long steps of a compile into parts of a row: every one takes half of what is left of its share."""

    def __init__(self, events: Events) -> None:
        self._events, self._left, self._part, self._total = events, _COMPILE_SHARE, 0.0, 1.0

    def __call__(self, event: str, value: Any) -> None:
        if event == "total":
            self._part, self._total = self._left / 2, max(1.0, value)
        elif event == "bytes":
            self._advance(self._part * value / self._total)

    def finish(self) -> None:
        """Count the rest."""
        self._advance(self._left)

    def _advance(self, amount: float) -> None:
        self._left -= amount
        self._events("advance", amount)


def _describe(row: LadderRow) -> str:
    """A finished row in a few words."""
    name = row.recipe if row.calibration is None else f"{row.recipe}, {row.calibration}"
    mean = "" if row.scores is None else f"mean {row.scores['mean']:.3f}, "
    return f"{name}: {mean}latent SNR {row.distance['latent_snr']:.1f} dB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
