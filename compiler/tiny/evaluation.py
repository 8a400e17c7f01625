"""Sampling held-out prompts with a wan-tiny pipeline and scoring the clips; the scorer's upper bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from hif4c.compiler.tiny.scorer import ClipScore, score_clip
from hif4c.compiler.tiny.world import NUM_FRAMES, SIZE, held_out_prompts, render

__all__ = ["GUIDANCE", "STEPS", "sample_clip", "score_pipeline", "score_rendered"]

STEPS = 20
GUIDANCE = 5.0


def sample_clip(pipeline: WanPipeline, prompt: str, seed: int, **options: Any) -> npt.NDArray[np.float32]:
    """One sampled clip, float32 `[F, H, W, 3]` in 0..1; `options` override the defaults of the pipeline's call."""
    arguments: dict[str, Any] = {
        "height": SIZE,
        "width": SIZE,
        "num_frames": NUM_FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    frames = pipeline(prompt=prompt, **(arguments | options)).frames[0]
    return np.asarray(frames, dtype=np.float32)


def score_pipeline(pipeline: WanPipeline, count: int, **options: Any) -> list[ClipScore]:
    """Scores of one clip (seed i) for each of the first `count` held-out prompts."""
    return [
        score_clip(sample_clip(pipeline, prompt, seed, **options), expected)
        for seed, (prompt, expected) in enumerate(held_out_prompts(count))
    ]


def score_rendered(count: int, vae: AutoencoderKLWan | None = None) -> list[ClipScore]:
    """Scores of true held-out clips, or of their reconstructions by `vae`: what a perfect generator would get."""
    rebuild: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] = lambda frames: frames  # noqa: E731
    if vae is not None:

        @torch.no_grad()
        def rebuild(frames: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(vae.dtype) * 2 - 1
            output = vae.decode(vae.encode(video).latent_dist.mode()).sample
            return (output[0].float().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()

    rng = np.random.default_rng(3)
    return [score_clip(rebuild(render(expected, rng)), expected) for _, expected in held_out_prompts(count)]
