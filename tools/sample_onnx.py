"""sample_onnx.py OUT model.*.onnx --prompt ... -o video.mp4: a clip sampled through onnxruntime.

An example of how exported experts go into diffusers' pipeline: scheduler, text encoder and VAE are diffusers' own.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import MAX_SEED, Reporter, console, parse_size, run_command

__all__ = ["sample_onnx"]


def sample_onnx(
    components: Annotated[
        Path, typer.Argument(help="An artifact, or a diffusers pipeline: text encoder, VAE and scheduler.")
    ],
    models: Annotated[list[Path], typer.Argument(help="The .onnx files of `hif4c export-onnx`, in any order.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .mp4; a .gif and a contact sheet .png go beside it.")
    ],
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the initial noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: what the model is usually run with.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for an image-to-video model.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="onnxruntime's execution provider; repeatable, the first that can runs.")
    ] = None,
) -> None:
    """Sample one clip from exported experts: mp4, gif and a contact sheet."""
    from hif4c.runtime.media import check_clip_path, save_clip
    from hif4c.runtime.onnx_pipeline import load_onnx_pipeline
    from hif4c.runtime.onnx_session import CPU
    from hif4c.runtime.sampling import SamplingSettings, decode_latents, open_image, sample_latents

    check_clip_path(output)
    pipeline = load_onnx_pipeline(components, models, providers=provider or CPU)
    model = pipeline.transformer.model
    width, height = parse_size(size)
    settings = SamplingSettings.from_defaults(
        model["sampling"], height=height, width=width, frames=frames, steps=steps, guidance=guidance
    )
    first_frame = open_image(image, model["pipeline_class"], settings)
    with Reporter.open() as report:
        report.begin("sampling", settings.steps)
        latents = sample_latents(
            pipeline, [prompt], [seed], settings,
            negative_prompt=negative_prompt, image=first_frame, on_step=lambda: report.advance(1),
        )  # fmt: skip
    (clip,) = decode_latents(pipeline, latents)
    for path in save_clip(clip, output, settings.fps):
        console.print(f"wrote {path}", highlight=False, markup=False)


if __name__ == "__main__":
    run_command(sample_onnx)
