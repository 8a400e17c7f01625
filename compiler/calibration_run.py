"""`hif4c calibrate`: find the model, let its pipeline make the inputs, run the calibration, write the file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration_calls import StoredCalls
from hif4c.compiler.calibration_inputs import calls_from_clips, calls_from_trajectory, find_clips
from hif4c.compiler.calibration_memory import check_pipeline_fits
from hif4c.compiler.calibration_writer import check_calibration_path, scratch_folder
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.disk_space import check_disk
from hif4c.compiler.estimate import calibration_disk, latent_tokens
from hif4c.compiler.locate import ModelDescription, ModelLocation
from hif4c.compiler.lora import FusedCheckpoint, LoraFile
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.sampling_defaults import sampling_defaults
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.pipeline import check_device, load_components
from hif4c.runtime.sampling import SamplingSettings, open_image

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CalibrationOptions", "builtin_prompts", "run_calibration"]

Events = Callable[[str, Any], None]
SMALL_WIDTH, SMALL_MODEL_BATCH = 512, 16
"""Models up to this width sample this many prompts together; a call of a larger one fills the memory alone."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        prompts: captions to sample; empty for `count` of the built-in ones.
        count: how many of the built-in prompts.
        clips: folder of clips with captions that are noised instead of sampling.
        image: first frame, for an image-to-video model.
        seed: of the noise and of every choice.
        calls: recorded calls an expert; what they hold while they run through the program waits on the disk.
        batch: prompts sampled together, and clips in a recorded call; None for 16 of a small model, 1 of a large one.
        device: where pipeline and program run.
        sampling: settings that differ from the model's usual ones (height, width, frames, steps, guidance).
        loras: expert -> files with their scales, fused as `hif4c compile` will with the same ones.
    """

    prompts: tuple[str, ...] = ()
    count: int = 16
    clips: Path | None = None
    image: Path | None = None
    seed: int = 0
    calls: int = 32
    batch: int | None = None
    device: str = "cpu"
    sampling: tuple[tuple[str, float], ...] = ()
    loras: Mapping[str, tuple[tuple[Path, float], ...]] = field(default_factory=dict)


def builtin_prompts(model: ModelDescription, count: int, seed: int) -> list[str]:
    """Prompts that suit the model, drawn without repeats.

    For wan-tiny, captions that it was trained on (those it is evaluated with are others); else general descriptions.

    Raises:
        Hif4Error: fewer than one, or more than there are.
    """
    if all(config.text_dim == 64 for config in model.configs.values()):
        from hif4c.compiler.tiny.world import NUM_TEMPLATES, caption, training_attributes

        known = [caption(item, template) for item in training_attributes() for template in range(NUM_TEMPLATES)]
    else:
        text = resources.files("hif4c.compiler").joinpath("prompts", "general.txt").read_text(encoding="utf-8")
        known = text.splitlines()
    if not 1 <= count <= len(known):
        raise Hif4Error(f"{count} calibration prompts: there are 1 to {len(known)} built in; give a file for others.")
    return random.Random(seed).sample(known, count)


def run_calibration(
    location: ModelLocation,
    output: Path,
    options: CalibrationOptions,
    events: Events = lambda event, value: None,
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Calibrate a model and write the file `output`.

    Args:
        location: a model with its whole pipeline.
        output: the file; its folder is made, and an older file gives way when the new one is complete.
        options: see `CalibrationOptions`.
        events: ("step", sentence), ("total", amount), ("unit", "bytes") and ("bytes", amount).
        ranks: share the sampling and the calls; each with the memory of one alone. With as many threads each, they
            make the file that one alone makes, byte for byte.

    Raises:
        Hif4Error: no prompt, no pipeline beside the experts, a pipeline that is larger than the memory, a LoRA that
            does not fit, a device that is not there, a full disk.
    """
    with ranks.together():
        device = check_device(ranks.device if ranks.device.type != "cpu" else options.device)
        settings = SamplingSettings.from_defaults(sampling_defaults(location.configs), **dict(options.sampling))
        if location.layout != "diffusers" or not (location.root / "model_index.json").is_file():
            raise Hif4Error(f"{location.root}: has no pipeline (model_index.json); calibrate a diffusers directory.")
        loras = _check_loras(location, options, events if ranks.first else lambda event, value: None)
        check_calibration_path(output)
        size = latent_tokens(next(iter(location.configs.values())), settings.height, settings.width, settings.frames)
        tokens = options.calls * (options.batch or _usual_batch(location)) * size
        needs = calibration_disk(location.configs, tokens, expanded=location.pipeline.expand_timesteps)
        check_disk(output, needs, doing="calibrating")
    with scratch_folder(output, ranks) as folder:
        make_calls = _calls_from_trajectory if options.clips is None else _calls_from_clips
        calls, source = make_calls(location, settings, options, folder, device, ranks, events)
        source |= {"seed": options.seed, "steps": settings.steps, "guidance": settings.guidance}
        source |= {"height": settings.height, "width": settings.width, "frames": settings.frames}
        source["calls"] = {name: len(found) for name, found in calls.items()}
        if loras:
            source["loras"] = loras
        calibrate(
            location, calls, output, [source], seed=options.seed, device=device, loras=options.loras, ranks=ranks,
            events=events,
        )  # fmt: skip


def _check_loras(location: ModelLocation, options: CalibrationOptions, events: Events) -> dict[str, Any]:
    """Open the LoRAs before anything is loaded; what the file's header says of them."""
    record = {}
    for name in options.loras:
        if name not in location.experts:
            raise Hif4Error(f"{location.root}: has no {name} for a LoRA, only {', '.join(location.experts)}.")
        with _fused(location, options, name) as checkpoint:
            record[name] = checkpoint.record
            for note in checkpoint.notes:
                events("note", f"{name}: {note}")
    return record


def _fused(location: ModelLocation, options: CalibrationOptions, name: str) -> FusedCheckpoint:
    stored = Checkpoint(location.experts[name], location.configs[name], location.layout)
    return FusedCheckpoint(stored, [LoraFile(*item) for item in options.loras[name]], name)


def _schedule(pipeline: DiffusionPipeline) -> list[float]:
    """The timesteps of all steps, whether a call of theirs was kept or not."""
    return [float(value) for value in pipeline.scheduler.timesteps]


def _usual_batch(location: ModelLocation) -> int:
    return SMALL_MODEL_BATCH if all(item.inner_dim <= SMALL_WIDTH for item in location.configs.values()) else 1


Made = tuple[dict[str, StoredCalls], dict[str, Any]]
"""Calls of every expert, and where they came from."""


def _calls_from_trajectory(
    location: ModelLocation,
    settings: SamplingSettings,
    options: CalibrationOptions,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    events: Events,
) -> Made:
    with ranks.together():
        image = open_image(options.image, location.pipeline.class_name, settings)
        prompts = options.prompts or builtin_prompts(location, options.count, options.seed)
        batch = options.batch or _usual_batch(location)
        check_pipeline_fits(location, device)
        pipeline = load_components(str(location.root), location.pipeline.class_name)
        for name in options.loras:
            with _fused(location, options, name) as checkpoint:
                checkpoint.copy_into(getattr(pipeline, name))
        pipeline.to(device)
    events("step", f"sampling {len(prompts)} prompts")
    mine = [min(batch, len(prompts) - start) for start in ranks.share(range(0, len(prompts), batch))]
    events("total", settings.steps * sum(mine))
    calls = calls_from_trajectory(
        pipeline,
        prompts,
        settings,
        folder,
        seed=options.seed,
        limit=options.calls,
        batch=batch,
        image=image,
        ranks=ranks,
        on_step=partial(events, "bytes"),
    )
    return calls, {"source": "trajectory", "prompts": list(prompts), "timesteps": _schedule(pipeline)}


def _calls_from_clips(
    location: ModelLocation,
    settings: SamplingSettings,
    options: CalibrationOptions,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    events: Events,
) -> Made:
    assert options.clips is not None
    with ranks.together():
        if location.pipeline.class_name == "WanImageToVideoPipeline":
            raise Hif4Error(
                "clips do not calibrate an image-to-video model; let it sample prompts with --image instead."
            )
        if options.image is not None or options.prompts:
            raise Hif4Error(
                "clips bring their own captions and frames; leave out --image and --prompt-file, or --clips."
            )
        clips = find_clips(options.clips)
        source = str(location.root)
        pipeline = load_components(source, location.pipeline.class_name, without_experts=True).to(device)
    events("step", f"noising {len(clips)} clips")
    events("total", len(ranks.share(range(options.calls))) * len(location.experts))
    calls = calls_from_clips(
        pipeline,
        clips,
        settings,
        next(iter(location.configs.values())),
        folder,
        seed=options.seed,
        limit=options.calls,
        ranks=ranks,
        on_call=partial(events, "bytes"),
    )
    names = [clip.path.name for clip in clips]
    return calls, {"source": "clips", "clips": names, "timesteps": _schedule(pipeline)}
