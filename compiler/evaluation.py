"""Compare an artifact with the model it was made from: equal prompts, equal seeds, latents and frames and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.tiny.scorer import ClipScore, score_clip, summarize
from hif4c.compiler.tiny.world import Attributes
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.sampling import SamplingSettings, decode_latents, sample_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Clip", "Distance", "check_same_model", "evaluate_pair", "frame_psnr", "latent_snr", "sample_clips"]


@dataclass(frozen=True)
class Clip:
    """One sampled clip: latents [C, F, H, W], frames [F', H', W', 3] in 0..1."""

    latents: torch.Tensor
    frames: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """How far one clip is from another in decibels; higher is closer, infinite when equal."""

    latent_snr: float
    latent_psnr: float
    frame_psnr: float


def sample_clips(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    batch: int = 8,
    image: Any = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Clip]:
    """Sample one clip a prompt, clip i from seed + i, `batch` at a time.

    Args:
        pipeline: original or compiled.
        prompts: the prompts.
        settings: size, frames, steps, guidance.
        seed: seed of the first clip.
        batch: clips sampled together.
        image: first frame of every clip (PIL image), for an image-to-video pipeline.
        on_step: called with the number of clips after every denoising step.
    """
    clips: list[Clip] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(part))
        step = None if on_step is None else _counted(on_step, len(part))
        latents = sample_latents(pipeline, part, seeds, settings, image=image, on_step=step).float()
        frames = decode_latents(pipeline, latents)
        clips += [Clip(latent, frame) for latent, frame in zip(latents, frames, strict=True)]
    return clips


def check_same_model(artifact: Artifact, location: ModelLocation) -> None:
    """Refuse to compare an artifact with a model that it was not compiled from; reads all of the model's weights.

    Raises:
        Hif4Error: an expert is missing, or its config or weights are others.
    """
    for name, info in artifact.experts.items():
        config = location.configs.get(name)
        if config is None or config.to_dict() != info.config:
            raise Hif4Error(f"{artifact.root}: its {name} was compiled from another model than {location.source}.")
        with Checkpoint(location.experts[name], config, location.layout) as checkpoint:
            if checkpoint.fingerprint() != info.fingerprint:
                raise Hif4Error(
                    f"{artifact.root}: its {name} was compiled from other weights than {location.source}'s."
                )


def evaluate_pair(
    reference: Sequence[Clip], clips: Sequence[Clip], expected: Sequence[Attributes] | None
) -> dict[str, Any]:
    """Distances of `clips` from `reference`, and the scores of both when the prompts' attributes are known.

    Returns:
        {"distance": {"latent_snr", "latent_psnr", "frame_psnr": median over clips},
         "scores": {"reference": {...}, "artifact": {...}} or None}
    """
    distances = [_distance(a, b) for a, b in zip(reference, clips, strict=True)]
    names = ("latent_snr", "latent_psnr", "frame_psnr")
    result: dict[str, Any] = {
        "distance": {name: float(np.median([getattr(item, name) for item in distances])) for name in names},
        "scores": None,
    }
    if expected is not None:
        result["scores"] = {
            "reference": summarize(_scores(reference, expected)),
            "artifact": summarize(_scores(clips, expected)),
        }
    return result


def latent_snr(reference: torch.Tensor, found: torch.Tensor) -> float:
    """10 log10(sum ref^2 / sum (found - ref)^2) in decibels."""
    error = (found.double() - reference.double()).square().sum()
    return _decibels(float(reference.double().square().sum()), float(error))


def frame_psnr(reference: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio of frames in 0..1, in decibels."""
    return _decibels(1.0, float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2)))


def _distance(reference: Clip, clip: Clip) -> Distance:
    peak = float(reference.latents.abs().max())
    error = float((clip.latents.double() - reference.latents.double()).square().mean())
    return Distance(
        latent_snr(reference.latents, clip.latents),
        _decibels(peak * peak, error),
        frame_psnr(reference.frames, clip.frames),
    )


def _decibels(signal: float, error: float) -> float:
    if not np.isfinite(error):
        return float("-inf")
    return float("inf") if error == 0 else 10 * float(np.log10(signal / error))


def _scores(clips: Sequence[Clip], expected: Sequence[Attributes]) -> list[ClipScore]:
    return [score_clip(clip.frames, attributes) for clip, attributes in zip(clips, expected, strict=True)]


def _counted(on_step: Callable[[int], None], count: int) -> Callable[[], None]:
    return lambda: on_step(count)
