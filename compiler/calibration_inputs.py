"""Where the inputs for a calibration come from: the pipeline's own sampling, or clips that are noised.

A call is what an expert is called with once: latents, timestep, text embeddings. Both experts are calibrated on calls
at the timesteps that they really serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hif4c.compiler.calibration_calls import Call, LowestCalls, StoredCalls, derive_seed
from hif4c.compiler.models import EXPERT_NAMES, WanConfig
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.sampling import SamplingSettings, sample_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Call", "ClipFile", "calls_from_clips", "calls_from_trajectory", "find_clips"]

VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv")


def calls_from_trajectory(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    folder: Path,
    *,
    seed: int = 0,
    limit: int = 32,
    batch: int = 16,
    image: Any = None,
    ranks: Ranks = ALONE,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, StoredCalls]:
    """Sample the prompts and keep some of the calls that the experts get, conditional and unconditional alike.

    Args:
        pipeline: the original pipeline.
        prompts: at least one.
        settings: as the model will be used: size, frames, steps, guidance.
        folder: where the calls' files are put; every rank must see it.
        seed: of the noise (clip i from seed + i) and of the choice of calls.
        limit: calls to keep an expert, chosen evenly at random over its steps, prompts and guidance passes.
        batch: prompts sampled together; a call then holds that many clips.
        image: first frame, for an image-to-video pipeline.
        ranks: sample a share of the batches each; the calls that are kept do not depend on how many there are.
        on_step: called with the number of clips after every denoising step of this rank.

    Returns:
        Expert -> its calls in the order of sampling; none for an expert whose timesteps no step came to.

    Raises:
        Hif4Error: no prompt, or settings that do not fit the model.
    """
    with ranks.together():
        if not prompts:
            raise Hif4Error("a calibration needs at least one prompt.")
        experts = {name: module for name in EXPERT_NAMES if (module := getattr(pipeline, name, None)) is not None}
        kept = {name: LowestCalls(folder, name, limit, seed) for name in experts}
        handles = [
            module.register_forward_pre_hook(kept[name].hook, with_kwargs=True) for name, module in experts.items()
        ]
        try:
            for start in ranks.share(range(0, len(prompts), batch)):
                part = prompts[start : start + batch]
                for calls in kept.values():
                    calls.begin(start // batch)
                step = None if on_step is None else partial(on_step, len(part))
                seeds = range(seed + start, seed + start + len(part))
                sample_latents(pipeline, part, seeds, settings, image=image, on_step=step)
        finally:
            for handle in handles:
                handle.remove()
    return {name: calls.chosen(ranks) for name, calls in kept.items()}


@dataclass(frozen=True)
class ClipFile:
    """A clip on the disk and its caption."""

    path: Path
    caption: str


def find_clips(folder: Path) -> list[ClipFile]:
    """The videos of a folder, each with its caption in a text file of the same name.

    Raises:
        Hif4Error: no such folder, no clip in it, or a clip without a caption.
    """
    if not folder.is_dir():
        raise Hif4Error(f"{folder}: no such folder; it should hold clips and their captions (NAME.mp4, NAME.txt).")
    clips = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            try:
                clips.append(ClipFile(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()))
            except (OSError, UnicodeDecodeError):
                raise Hif4Error(
                    f"{path}: has no caption; write it to {path.stem}.txt beside it, as UTF-8 text."
                ) from None
    if not clips:
        raise Hif4Error(f"{folder}: holds no clip; put videos there ({', '.join(VIDEO_SUFFIXES)}) and their captions.")
    return clips


@torch.no_grad()
def calls_from_clips(
    pipeline: DiffusionPipeline,
    clips: Sequence[ClipFile],
    settings: SamplingSettings,
    config: WanConfig,
    folder: Path,
    *,
    seed: int = 0,
    limit: int = 32,
    ranks: Ranks = ALONE,
    on_call: Callable[[int], None] | None = None,
) -> dict[str, StoredCalls]:
    """Noise the clips' latents to timesteps of each expert, x_t = (1 - s) x_0 + s e; no sampling run is needed.

    Args:
        pipeline: the original text-to-video pipeline; its experts need not be loaded.
        clips: at least one; calls go round over them.
        settings: size and frames that clips are brought to; steps, from which the timesteps are taken; with guidance
            every second call has the empty prompt instead of the caption.
        config: an expert's.
        folder: where the calls' files are put; every rank must see it.
        seed: of noise and timesteps; each call has its own from it.
        limit: calls an expert, spread evenly over its steps.
        ranks: make a share of the calls each; the calls do not depend on how many there are.
        on_call: called with 1 after every call that this rank made.

    Returns:
        Expert -> its calls of one clip, from the first step to the last; none for an expert without a step.

    Raises:
        Hif4Error: a file cannot be read or is too short, or the settings do not fit the model.
    """
    with ranks.together():
        settings.check(pipeline, config)
        pipeline.scheduler.set_timesteps(settings.steps)
        served = _timesteps_by_expert(pipeline, [float(value) for value in pipeline.scheduler.timesteps])
        made = {
            name: StoredCalls(folder, name, [(number,) for number in range(limit if values else 0)])
            for name, values in served.items()
        }
        latents: dict[Path, torch.Tensor] = {}
        texts: dict[str, torch.Tensor] = {}
        for name, calls in made.items():
            for (number,) in ranks.share(calls.places):
                turn, place = divmod(number, len(clips))
                clip = clips[place]
                if clip.path not in latents:
                    latents[clip.path] = _encode(pipeline, _read_clip(clip.path, settings))
                # A clip that comes again comes with the other prompt, whether the number of clips is even or odd.
                caption = "" if settings.guidance > 1 and (turn + place) % 2 else clip.caption
                if caption not in texts:
                    texts[caption] = _embed(pipeline, caption, settings)
                generator = torch.Generator().manual_seed(derive_seed(seed, name, number))
                timestep = _nth_timestep(served[name], number, limit, generator)
                sigma = timestep / pipeline.scheduler.config.num_train_timesteps
                clean = latents[clip.path]
                noise = torch.randn(clean.shape, generator=generator)
                video = ((1 - sigma) * clean + sigma * noise).to(torch.bfloat16)
                timesteps = _timestep_tensor(pipeline, config, timestep, video)
                calls.write((number,), Call(video, timesteps, texts[caption]))
                if on_call is not None:
                    on_call(1)
    return made


def _nth_timestep(values: Sequence[float], number: int, count: int, generator: torch.Generator) -> float:
    """The timestep of call `number` of `count`: any of its share of the expert's steps."""
    first = number * len(values) // count
    last = max((number + 1) * len(values) // count, first + 1)
    return values[int(torch.randint(first, last, (), generator=generator))]


def _timesteps_by_expert(pipeline: DiffusionPipeline, timesteps: Sequence[float]) -> dict[str, list[float]]:
    ratio = pipeline.config.boundary_ratio
    if ratio is None:
        return {"transformer": list(timesteps)}
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    return {
        "transformer": [value for value in timesteps if value >= boundary],
        "transformer_2": [value for value in timesteps if value < boundary],
    }


def _timestep_tensor(
    pipeline: DiffusionPipeline, config: WanConfig, timestep: float, video: torch.Tensor
) -> torch.Tensor:
    if not pipeline.config.get("expand_timesteps"):
        return torch.full((1,), timestep)
    tokens = math.prod(size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True))
    return torch.full((1, tokens), timestep)


def _embed(pipeline: DiffusionPipeline, text: str, settings: SamplingSettings) -> torch.Tensor:
    found, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=settings.text_tokens, device=pipeline.device
    )
    return found.to(torch.bfloat16).cpu()


def _read_clip(path: Path, settings: SamplingSettings) -> torch.Tensor:
    """Frames [1, 3, F, H, W] in -1..1: the first `settings.frames`, resized."""
    import imageio.v3 as iio
    from PIL import Image

    try:
        frames = list(islice(iio.imiter(path, plugin="pyav"), settings.frames))
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise Hif4Error(f"{path}: cannot be read as a video ({error}).") from None
    if len(frames) < settings.frames:
        raise Hif4Error(f"{path}: has {len(frames)} frames; {settings.frames} are needed.")
    resized = [
        np.asarray(Image.fromarray(frame).convert("RGB").resize((settings.width, settings.height))) for frame in frames
    ]
    return torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def _encode(pipeline: DiffusionPipeline, video: torch.Tensor) -> torch.Tensor:
    """Normalized latents [1, C, F, H, W] float32, as the experts see them."""
    vae = pipeline.vae
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    return (latents - mean) / std
