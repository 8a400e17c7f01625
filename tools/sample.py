"""hif4c sample OUT --prompt ... -o video.mp4: a clip from the artifact."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import KERNELS_HELP, MAX_SEED, Reporter, console, find_base, parse_size, run_command
from hif4c.tools.ranks import speaking_ranks

__all__ = ["sample"]


def sample(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
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
    base: Annotated[
        str | None, typer.Option(help="The original model, for an artifact without text encoder and VAE.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    kernels: Annotated[str, typer.Option(help=KERNELS_HELP)] = "auto",
    keep: Annotated[
        str, typer.Option(help="both experts in memory, or active: only the one that serves the current step.")
    ] = "both",
    offload: Annotated[
        str, typer.Option(help="none, or blocks: of an expert, two transformer blocks at a time are on the device.")
    ] = "none",
) -> None:
    """Sample one clip: mp4, gif and a contact sheet.

    With `torchrun --nproc-per-node 2 --no-python hif4c sample ...` two processes, on two GPUs or on the CPU, share the
    work of every step: one predicts with the prompt and the other with the negative prompt. The clip is the same.
    """
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.media import check_clip_path, save_clip
    from hif4c.runtime.parallel_guidance import check_guidance_ranks, split_guidance
    from hif4c.runtime.pipeline import load_pipeline
    from hif4c.runtime.sampling import SamplingSettings, decode_latents, open_image, sample_latents

    check_clip_path(output)
    model = open_artifact(artifact).manifest["model"]
    width, height = parse_size(size)
    settings = SamplingSettings.from_defaults(
        model["sampling"], height=height, width=width, frames=frames, steps=steps, guidance=guidance
    )
    first_frame = open_image(image, model["pipeline_class"], settings)
    with speaking_ranks(device) as ranks:
        with ranks.together():
            check_guidance_ranks(ranks.count, settings.guidance)
            place = ranks.device if ranks.device.type == "cuda" else device
            pipeline = load_pipeline(
                artifact, base=find_base(base), device=place, kernels=kernels, keep=keep, offload=offload
            )
            settings.check(pipeline)
        shared = split_guidance(pipeline) if ranks.count > 1 else contextlib.nullcontext()
        with shared, Reporter.open(silent=not ranks.first) as report:
            report.begin("sampling", settings.steps)
            latents = sample_latents(
                pipeline, [prompt], [seed], settings,
                negative_prompt=negative_prompt, image=first_frame, on_step=lambda: report.advance(1),
            )  # fmt: skip
    if ranks.first:
        (clip,) = decode_latents(pipeline, latents)
        for path in save_clip(clip, output, settings.fps):
            console.print(f"wrote {path}", highlight=False, markup=False)


if __name__ == "__main__":
    run_command(sample)
