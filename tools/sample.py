"""hif4c sample OUT --prompt ... -o video.mp4: a clip from the artifact."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from hif4c.tools.console import console, parse_size, progress_bar, run_command

__all__ = ["sample"]


def sample(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .mp4; a .gif and a contact sheet .png go beside it.")
    ],
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: what the model is usually run with.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for an image-to-video model.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The original model, for an artifact without text encoder and VAE.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    kernels: Annotated[str, typer.Option(help="On the CPU: auto, native (compiled here) or portable.")] = "auto",
) -> None:
    """Sample one clip: mp4, gif and a contact sheet."""
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.errors import Hif4Error
    from hif4c.runtime.media import save_clip
    from hif4c.runtime.pipeline import load_pipeline
    from hif4c.runtime.sampling import decode_latents, sample_latents

    if output.suffix != ".mp4":
        raise Hif4Error(f"{output}: the output must end in .mp4.")
    settings = settings_from(open_artifact(artifact).manifest, steps, size, frames, guidance)
    pipeline = load_pipeline(artifact, base=base, device=device, kernels=kernels)
    settings.check(pipeline)
    with progress_bar("sampling", settings.steps) as advance:
        latents = sample_latents(
            pipeline, [prompt], [seed], settings, negative_prompt=negative_prompt,
            image=_open_image(image, settings.width, settings.height), on_step=lambda: advance(1),
        )  # fmt: skip
    (clip,) = decode_latents(pipeline, latents)
    for path in save_clip(clip, output, settings.fps):
        console.print(f"wrote {path}", highlight=False)


def settings_from(
    manifest: dict[str, Any],
    steps: int | None = None,
    size: str | None = None,
    frames: int | None = None,
    guidance: float | None = None,
) -> Any:
    """Sampling settings: the artifact's defaults, overridden by what was asked for."""
    from hif4c.runtime.errors import Hif4Error
    from hif4c.runtime.sampling import SamplingSettings

    width, height = parse_size(size) if size else (None, None)
    asked = {"steps": steps, "width": width, "height": height, "frames": frames, "guidance": guidance}
    values = {
        **(manifest["model"].get("sampling") or {}),
        **{key: value for key, value in asked.items() if value is not None},
    }
    if guidance is not None:
        values.pop("guidance_2", None)
    values.setdefault("fps", 16)
    names = {field.name for field in dataclasses.fields(SamplingSettings)} - {"guidance_2", "text_tokens"}
    if missing := sorted(names - values.keys()):
        raise Hif4Error(f"this model has no usual settings; give --{', --'.join(missing)}.")
    return SamplingSettings(**values)


def _open_image(path: Path | None, width: int, height: int) -> Any:
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    from hif4c.runtime.errors import Hif4Error

    try:
        return Image.open(path).convert("RGB").resize((width, height))
    except (OSError, UnidentifiedImageError) as error:
        raise Hif4Error(f"{path}: cannot be read as an image ({error}).") from None


if __name__ == "__main__":
    run_command(sample)
