"""Compare an artifact with the model it was made from: equal prompts, equal seeds, latents and frames and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.tiny.scorer import score_clip, summarize
from hif4c.compiler.tiny.world import Attributes
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.sampling import SamplingSettings, decode_latents, sample_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Clip",
    "Distance",
    "check_same_model",
    "evaluate_pair",
    "frame_psnr",
    "frame_ssim",
    "latent_snr",
    "measure_distance",
    "sample_clips",
    "score_clips",
]

# Of the window of structural similarity: 11 x 11 weights of a Gaussian.
_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5


@dataclass(frozen=True)
class Clip:
    """One sampled clip: latents [C, F, H, W], frames [F', H', W', 3] in 0..1."""

    latents: torch.Tensor
    frames: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """How near one clip is to another: decibels, infinite when equal, and structural similarity, 1 when equal."""

    latent_snr: float
    latent_psnr: float
    frame_psnr: float
    frame_ssim: float


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
        The two entries of `measure_distance`, and
        "scores": {"reference": {...}, "artifact": {...}} or None
    """
    scores = None
    if expected is not None:
        scores = {"reference": score_clips(reference, expected), "artifact": score_clips(clips, expected)}
    return {**measure_distance(reference, clips), "scores": scores}


def measure_distance(reference: Sequence[Clip], clips: Sequence[Clip]) -> dict[str, Any]:
    """How near `clips` are to `reference`, clip by clip.

    Returns:
        {"distance": name of a field of `Distance` -> median over the clips,
         "spread": the same names -> [25th, 75th percentile over the clips]}
    """
    distances = [_distance(a, b) for a, b in zip(reference, clips, strict=True)]
    values = {item.name: [getattr(distance, item.name) for distance in distances] for item in fields(Distance)}
    return {
        "distance": {name: float(np.median(found)) for name, found in values.items()},
        # A percentile between two clips would be NaN where one of them is infinite.
        "spread": {name: np.percentile(found, [25, 75], method="nearest").tolist() for name, found in values.items()},
    }


def score_clips(clips: Sequence[Clip], expected: Sequence[Attributes]) -> dict[str, float]:
    """The objective scores of clips of wan-tiny's world, each axis a mean over the clips in 0..1."""
    return summarize([score_clip(clip.frames, attributes) for clip, attributes in zip(clips, expected, strict=True)])


def latent_snr(reference: torch.Tensor, found: torch.Tensor) -> float:
    """10 log10(sum ref^2 / sum (found - ref)^2) in decibels."""
    error = (found.double() - reference.double()).square().sum()
    return _decibels(float(reference.double().square().sum()), float(error))


def frame_psnr(reference: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio of frames in 0..1, in decibels."""
    return _decibels(1.0, float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2)))


def frame_ssim(reference: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> float:
    """Mean structural similarity of frames [F, H, W, C] in 0..1; -1, the least there is, where `found` is not finite.

    Of every frame and channel on its own, with a Gaussian window of 11 x 11 and sigma 1.5, K1 = .01 and K2 = .03, over
    the windows that lie inside the frame (frames smaller than a window are mirrored at their edges).
    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004.
    """
    if not np.isfinite(found).all():
        return -1.0
    x, y = reference.astype(np.float64), found.astype(np.float64)
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x, variance_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)))


def _window_mean(frames: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    height, width = (min(_SSIM_RADIUS, (size - 1) // 2) for size in frames.shape[1:3])
    blurred = ndimage.gaussian_filter(frames, _SSIM_SIGMA, radius=_SSIM_RADIUS, axes=(1, 2))
    return blurred[:, height : frames.shape[1] - height, width : frames.shape[2] - width]


def _distance(reference: Clip, clip: Clip) -> Distance:
    peak = float(reference.latents.abs().max())
    error = float((clip.latents.double() - reference.latents.double()).square().mean())
    return Distance(
        latent_snr(reference.latents, clip.latents),
        _decibels(peak * peak, error),
        frame_psnr(reference.frames, clip.frames),
        frame_ssim(reference.frames, clip.frames),
    )


def _decibels(signal: float, error: float) -> float:
    if not np.isfinite(error):
        return float("-inf")
    return float("inf") if error == 0 else 10 * float(np.log10(signal / error))


def _counted(on_step: Callable[[int], None], count: int) -> Callable[[], None]:
    return lambda: on_step(count)
