"""Sample from a pipeline: latents by prompt and seed, then frames; the same way for original and compiled experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch

from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SamplingSettings", "decode_latents", "open_image", "sample_latents"]


@dataclass(frozen=True)
class SamplingSettings:
    """How a clip is sampled.

    Attributes:
        height, width: pixels; multiples of the VAE's spatial factor times the patch size.
        frames: a multiple of the VAE's temporal factor, plus one.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 turns guidance off.
        fps: frames a second of the written video.
        guidance_2: scale for the low-noise expert, None for the same.
        text_tokens: length that prompts are padded to.
    """

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    fps: int = 16
    guidance_2: float | None = None
    text_tokens: int = 512

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any] | None, **asked: float | None) -> Self:
        """The settings that an artifact's manifest records, overridden by what was asked for (None: not asked).

        Raises:
            Hif4Error: a setting is neither recorded nor asked for, or is not a number that makes sense.
        """
        values = dict(defaults or {})
        if asked.get("guidance") is not None:
            values.pop("guidance_2", None)
        values |= {name: value for name, value in asked.items() if value is not None}
        options = {"height": "size", "width": "size"}
        known = {item.name: item for item in fields(cls)}
        required = [name for name, item in known.items() if item.default is MISSING]
        if missing := sorted({options.get(name, name) for name in required if name not in values}):
            raise Hif4Error(f"this model has no usual settings; give --{', --'.join(missing)}.")
        for name, value in values.items():
            whole = name not in ("guidance", "guidance_2")
            allowed = (int,) if whole else (int, float)
            if name not in known or type(value) not in allowed or not 0 < value < float("inf"):
                raise Hif4Error(f"{name} {value}: must be a positive {'whole ' if whole else ''}number.")
        return cls(**values)

    def check(self, pipeline: DiffusionPipeline, config: Any = None) -> None:
        """Raise Hif4Error when size or frames do not fit the pipeline's VAE and patches.

        `config` is an expert's, for a pipeline that is loaded without its experts.
        """
        if config is None:
            config = (pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2).config
        patch = config.patch_size
        for name, size, factor in (
            ("height", self.height, pipeline.vae_scale_factor_spatial * patch[1]),
            ("width", self.width, pipeline.vae_scale_factor_spatial * patch[2]),
        ):
            if size <= 0 or size % factor:
                raise Hif4Error(f"{name} {size}: must be a positive multiple of {factor} for this model.")
            if size // factor > config.rope_max_seq_len:
                raise Hif4Error(f"{name} {size}: the model has positions for {factor * config.rope_max_seq_len}.")
        temporal = pipeline.vae_scale_factor_temporal
        if self.frames <= 0 or (self.frames - 1) % temporal:
            raise Hif4Error(f"frames {self.frames}: must be a multiple of {temporal}, plus one, for this model.")
        positions = config.rope_max_seq_len
        if (self.frames - 1) // temporal + 1 > positions:
            raise Hif4Error(f"frames {self.frames}: the model has positions for {(positions - 1) * temporal + 1}.")


def sample_latents(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    negative_prompt: str = "",
    image: Any = None,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Run the denoising loop.

    Args:
        pipeline: `WanPipeline` or `WanImageToVideoPipeline`.
        prompts: one a clip; all clips of a call are one batch.
        seeds: one a clip; the initial noise depends on nothing else, so equal seeds start from equal noise.
        settings: size, frames, steps, guidance.
        negative_prompt: for the unconditional pass.
        image: first frame (PIL image) for an image-to-video pipeline, else None.
        on_step: called after every denoising step.

    Returns:
        Latents [B, C, F, H, W] as the pipeline leaves them.
    """
    settings.check(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": list(prompts),
        "negative_prompt": [negative_prompt] * len(prompts),
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "max_sequence_length": settings.text_tokens,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "latent",
        "return_dict": False,
    }
    if settings.guidance_2 is not None and pipeline.config.boundary_ratio is not None:
        arguments["guidance_scale_2"] = settings.guidance_2
    if image is not None:
        arguments["image"] = image
    if on_step is not None:

        def after_step(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return values

        arguments["callback_on_step_end"] = after_step
    return pipeline(**arguments)[0]


@torch.no_grad()
def decode_latents(pipeline: DiffusionPipeline, latents: torch.Tensor) -> npt.NDArray[np.float32]:
    """Decode latents to frames [B, F, H, W, 3] in 0..1, one clip at a time (as the pipeline does for a batch)."""
    vae = pipeline.vae
    shape = (1, vae.config.z_dim, 1, 1, 1)
    latents = latents.to(vae.device, vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    std = torch.tensor(vae.config.latents_std).view(shape).to(latents)
    clips = [vae.decode(clip[None] * std + mean, return_dict=False)[0] for clip in latents]
    return pipeline.video_processor.postprocess_video(torch.cat(clips), output_type="np")


def open_image(path: Path | None, pipeline_class: str, settings: SamplingSettings) -> Any:
    """Read the first frame for an image-to-video pipeline, in the size of the clip; None for a text-to-video one.

    Raises:
        Hif4Error: the pipeline needs an image and there is none, takes none, or the file is no image.
    """
    needed = pipeline_class == "WanImageToVideoPipeline"
    if needed != (path is not None):
        raise Hif4Error("this is an image-to-video model; give --image." if needed else "this model takes no --image.")
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB").resize((settings.width, settings.height))
    except (OSError, UnidentifiedImageError) as error:
        raise Hif4Error(f"{path}: cannot be read as an image ({error}).") from None
