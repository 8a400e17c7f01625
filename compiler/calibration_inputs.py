"""Where the inputs for a calibration come from: the pipeline's own sampling, or clips that are noised.

A call is what an expert is called with once: latents, timestep, text embeddings. Both experts are calibrated on calls
at the timesteps that they really serve.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.sampling import SamplingSettings, sample_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Call", "ClipFile", "calls_from_clips", "calls_from_trajectory", "find_clips"]

VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv")


@dataclass(frozen=True)
class Call:
    """One call of an expert.

    Attributes:
        hidden_states: latents [B, C, F, H, W].
        timestep: [B], or [B, tokens] for a model with expanded timesteps; one noise level for the whole batch.
        encoder_hidden_states: text embeddings [B, text, D].
    """

    hidden_states: torch.Tensor
    timestep: torch.Tensor
    encoder_hidden_states: torch.Tensor

    @property
    def noise_level(self) -> float:
        """The timestep, 0 to 1000; of expanded timesteps the largest, as first-frame tokens have 0."""
        return float(self.timestep.max())

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order of the captured program."""
        return self.hidden_states, self.timestep.float(), self.encoder_hidden_states


def calls_from_trajectory(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    limit: int = 32,
    batch: int = 16,
    image: Any = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, list[Call]]:
    """Sample the prompts and keep some of the calls that the experts get, conditional and unconditional alike.

    Args:
        pipeline: the original pipeline.
        prompts: at least one.
        settings: as the model will be used: size, frames, steps, guidance.
        seed: of the noise (clip i from seed + i) and of the choice of calls.
        limit: calls to keep an expert, chosen evenly at random over its steps, prompts and guidance passes.
        batch: prompts sampled together; a call then holds that many clips.
        image: first frame, for an image-to-video pipeline.
        on_step: called with the number of clips after every denoising step.

    Returns:
        Expert -> its calls in the order of sampling.
    """
    if not prompts:
        raise Hif4Error("a calibration needs at least one prompt.")
    generator = random.Random(seed)
    kept: dict[str, list[Call]] = {}
    seen: dict[str, int] = {}
    places: dict[str, list[int]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
            found = Call(
                *(
                    given[key].detach().to("cpu", copy=True)
                    for key in ("hidden_states", "timestep", "encoder_hidden_states")
                )
            )
            # Reservoir sampling: every call has the same chance, however many there are.
            calls, where = kept.setdefault(name, []), places.setdefault(name, [])
            number = seen[name] = seen.get(name, 0) + 1
            if len(calls) < limit:
                calls.append(found)
                where.append(number)
            elif (slot := generator.randrange(number)) < limit:
                calls[slot], where[slot] = found, number

        return hook

    experts = {name: module for name in ("transformer", "transformer_2") if (module := getattr(pipeline, name, None))}
    handles = [module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in experts.items()]
    try:
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            step = None if on_step is None else _counted(on_step, len(part))
            seeds = range(seed + start, seed + start + len(part))
            sample_latents(pipeline, part, seeds, settings, image=image, on_step=step)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [call for _, call in sorted(zip(places[name], calls, strict=True), key=lambda item: item[0])]
        for name, calls in kept.items()
    }


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
                clips.append(ClipFile(path, path.with_suffix(".txt").read_text().strip()))
            except (OSError, UnicodeDecodeError):
                raise Hif4Error(f"{path}: has no caption; write it to {path.stem}.txt beside it.") from None
    if not clips:
        raise Hif4Error(f"{folder}: holds no clip ({', '.join(VIDEO_SUFFIXES)}).")
    return clips


@torch.no_grad()
def calls_from_clips(
    pipeline: DiffusionPipeline,
    clips: Sequence[ClipFile],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    limit: int = 32,
    on_call: Callable[[int], None] | None = None,
) -> dict[str, list[Call]]:
    """Noise the clips' latents to timesteps of each expert, x_t = (1 - s) x_0 + s e; no sampling run is needed.

    Args:
        pipeline: the original pipeline; its transformers are not run and may be absent (None) but for the ones in use.
        clips: at least one; calls go round over them.
        settings: size and frames that clips are brought to; steps, from which the timesteps are taken.
        seed: of noise and timesteps.
        limit: calls an expert.
        on_call: called with 1 after every call that was made.

    Raises:
        Hif4Error: a file cannot be read or is too short, or the pipeline is image-to-video.
    """
    if pipeline.config.get("_class_name", type(pipeline).__name__) == "WanImageToVideoPipeline":
        raise Hif4Error("clips do not calibrate an image-to-video model; sample its own trajectory instead.")
    pipeline.scheduler.set_timesteps(settings.steps)
    timesteps = [float(value) for value in pipeline.scheduler.timesteps]
    served = _timesteps_by_expert(pipeline, timesteps)
    generator = torch.Generator().manual_seed(seed)
    texts = {"": _embed(pipeline, "", settings)}
    made: dict[str, list[Call]] = {name: [] for name in served}
    latents: dict[Path, torch.Tensor] = {}
    chosen = random.Random(seed)
    for name, values in served.items():
        for number in range(limit):
            clip = clips[number % len(clips)]
            if clip.path not in latents:
                latents[clip.path] = _encode(pipeline, _read_clip(clip.path, settings))
                texts.setdefault(clip.caption, _embed(pipeline, clip.caption, settings))
            clean = latents[clip.path]
            # Stratified over the expert's steps; guidance asks for the empty prompt as often as for the caption.
            part = values[number * len(values) // limit : max((number + 1) * len(values) // limit, 1)] or values
            timestep = chosen.choice(part)
            sigma = timestep / pipeline.scheduler.config.num_train_timesteps
            noise = torch.randn(clean.shape, generator=generator)
            video = ((1 - sigma) * clean + sigma * noise).to(torch.bfloat16)
            unconditional = settings.guidance > 1 and number % 2 == 1
            made[name].append(
                Call(video, _timestep_tensor(pipeline, timestep, video), texts["" if unconditional else clip.caption])
            )
            if on_call is not None:
                on_call(1)
    return made


def _timesteps_by_expert(pipeline: DiffusionPipeline, timesteps: Sequence[float]) -> dict[str, list[float]]:
    ratio = pipeline.config.boundary_ratio
    if ratio is None:
        return {"transformer": list(timesteps)}
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    return {
        "transformer": [value for value in timesteps if value >= boundary],
        "transformer_2": [value for value in timesteps if value < boundary],
    }


def _timestep_tensor(pipeline: DiffusionPipeline, timestep: float, video: torch.Tensor) -> torch.Tensor:
    if not pipeline.config.get("expand_timesteps"):
        return torch.full((1,), timestep)
    expert = pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2
    tokens = math.prod(size // patch for size, patch in zip(video.shape[2:], expert.config.patch_size, strict=True))
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
        frames = [frame for frame, _ in zip(iio.imiter(path), range(settings.frames), strict=False)]
    except (OSError, ValueError, RuntimeError) as error:
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


def _counted(on_step: Callable[[int], None], count: int) -> Callable[[], None]:
    return lambda: on_step(count)
