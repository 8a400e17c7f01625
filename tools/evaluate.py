"""hif4c evaluate OUT --against MODEL: the artifact beside the model it was made from."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hif4c.tools.console import console, make_table, progress_bar, run_command

__all__ = ["evaluate"]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    against: Annotated[str, typer.Option(help="The original model: directory, built-in name or hub id.")],
    prompts: Annotated[int, typer.Option(help="How many held-out prompts of the synthetic world (wan-tiny).")] = 48,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, for any other model (no scorer, only distances).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first clip; clip i uses seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")] = None,
    batch: Annotated[int, typer.Option(help="Clips sampled together.")] = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    kernels: Annotated[str, typer.Option(help="On the CPU: auto, native (compiled here) or portable.")] = "auto",
) -> None:
    """Sample both on equal seeds: PSNR of latents and frames, and the objective scorer on both."""
    from hif4c.compiler.evaluation import evaluate_pair, sample_clips
    from hif4c.compiler.locate import locate_model
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.errors import Hif4Error
    from hif4c.runtime.pipeline import load_components, load_pipeline
    from hif4c.tools.sample import settings_from

    opened = open_artifact(artifact)
    settings = settings_from(opened.manifest, steps, size, frames, guidance)
    texts, expected = _prompts(prompts, prompt_file, tiny=opened.manifest["experts"])
    if batch < 1 or not texts:
        raise Hif4Error("give at least one prompt and a batch of at least one.")
    location = locate_model(against, expert_files_only=False)
    pipelines = {
        "reference": load_components(str(location.root), location.pipeline.class_name).to(device),
        "artifact": load_pipeline(artifact, base=str(location.root), device=device, kernels=kernels),
    }
    clips, seconds = {}, {}
    for name, pipeline in pipelines.items():
        started = time.perf_counter()
        with progress_bar(f"sampling, {name}", len(texts) * settings.steps) as advance:
            clips[name] = sample_clips(pipeline, texts, settings, seed=seed, batch=batch, on_step=advance)
        seconds[name] = time.perf_counter() - started
    result = evaluate_pair(clips["reference"], clips["artifact"], expected)
    result |= {"prompts": len(texts), "seed": seed, "seconds": seconds}
    _print(result, opened.manifest["model"]["source"])
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


def _prompts(count: int, file: Path | None, tiny: dict[str, Any]) -> tuple[list[str], Any]:
    from hif4c.runtime.errors import Hif4Error

    if file is not None:
        try:
            return [line.strip() for line in file.read_text().splitlines() if line.strip()], None
        except (OSError, UnicodeDecodeError) as error:
            raise Hif4Error(f"{file}: cannot be read ({error}).") from None
    if any(entry["config"]["in_channels"] != 8 for entry in tiny.values()):
        raise Hif4Error("the built-in prompts and their scorer are for wan-tiny; give --prompt-file for this model.")
    from hif4c.compiler.tiny.world import held_out_prompts

    pairs = held_out_prompts(count)
    return [text for text, _ in pairs], [attributes for _, attributes in pairs]


def _print(result: dict[str, Any], source: str) -> None:
    table = make_table(
        f"{source}: {result['prompts']} prompts, equal seeds", ("", "original bf16", "artifact", "change")
    )
    if result["scores"] is not None:
        reference, found = result["scores"]["reference"], result["scores"]["artifact"]
        for axis, value in reference.items():
            table.add_row(axis.replace("_", " "), f"{value:.3f}", f"{found[axis]:.3f}", f"{found[axis] - value:+.3f}")
        table.add_section()
    for name, value in result["distance"].items():
        table.add_row(f"{name.replace('_', ' ')}, median", "", f"{value:.1f} dB", "")
    seconds = result["seconds"]
    table.add_row("sampling", f"{seconds['reference']:.1f} s", f"{seconds['artifact']:.1f} s", "")
    console.print(table)


if __name__ == "__main__":
    run_command(evaluate)
