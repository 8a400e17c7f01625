"""hif4c evaluate OUT --against MODEL: the artifact beside the model it was made from."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hif4c.tools.console import MAX_SEED, console, make_table, parse_size, progress_bar, run_command

__all__ = ["evaluate"]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    against: Annotated[str, typer.Option(help="The original model: directory, built-in name or hub id.")],
    prompts: Annotated[int, typer.Option(help="How many held-out prompts of the synthetic world (wan-tiny).")] = 48,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, for any other model (no scorer, only distances).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first clip; clip i uses seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for an image-to-video model.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips sampled together.")] = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    kernels: Annotated[str, typer.Option(help="On the CPU: auto, native (compiled here) or portable.")] = "auto",
) -> None:
    """Sample both on equal seeds: PSNR of latents and frames, and the objective scorer on both."""
    from hif4c.compiler.evaluation import check_same_model, evaluate_pair, sample_clips
    from hif4c.compiler.locate import locate_model
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.pipeline import check_device, load_components, load_pipeline
    from hif4c.runtime.sampling import SamplingSettings, open_image

    check_device(device)
    opened = open_artifact(artifact)
    model = opened.manifest["model"]
    width, height = parse_size(size)
    settings = SamplingSettings.from_defaults(
        model["sampling"], height=height, width=width, frames=frames, steps=steps, guidance=guidance
    )
    first_frame = open_image(image, model["pipeline_class"], settings)
    texts, expected = _prompts(prompts, prompt_file, opened.manifest["experts"])
    location = locate_model(against, expert_files_only=False)
    check_same_model(opened, location)
    root = str(location.root)
    # One after the other: only one of them is in memory.
    makers = {
        "reference": lambda: load_components(root, location.pipeline.class_name).to(device),
        "artifact": lambda: load_pipeline(artifact, base=root, device=device, kernels=kernels),
    }
    clips, seconds = {}, {}
    for name, make in makers.items():
        pipeline = make()
        started = time.perf_counter()
        with progress_bar(f"sampling, {name}", len(texts) * settings.steps) as advance:
            clips[name] = sample_clips(
                pipeline, texts, settings, seed=seed, batch=batch, image=first_frame, on_step=advance
            )
        seconds[name] = time.perf_counter() - started
        del pipeline
    result = evaluate_pair(clips["reference"], clips["artifact"], expected)
    result |= {"prompts": len(texts), "seed": seed, "seconds": seconds}
    _print(result, model["source"])
    if output is not None:
        from hif4c.runtime.errors import Hif4Error

        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(_finite(result), indent=2, sort_keys=True, allow_nan=False) + "\n")
        except OSError as error:
            raise Hif4Error(f"{output}: cannot be written ({error.strerror}).") from None


def _prompts(count: int, file: Path | None, experts: dict[str, Any]) -> tuple[list[str], Any]:
    """The prompts, and what the scorer expects of them (None for prompts from a file)."""
    from hif4c.runtime.errors import Hif4Error

    if file is not None:
        try:
            texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise Hif4Error(f"{file}: cannot be read ({error}).") from None
        if not texts:
            raise Hif4Error(f"{file}: holds no prompt.")
        return texts, None
    if any(entry["config"]["in_channels"] != 8 for entry in experts.values()):
        raise Hif4Error("the built-in prompts and their scorer are for wan-tiny; give --prompt-file for this model.")
    from hif4c.compiler.tiny.world import NUM_TEMPLATES, held_out_attributes, held_out_prompts

    most = NUM_TEMPLATES * len(held_out_attributes())
    if not 1 <= count <= most:
        raise Hif4Error(f"--prompts {count}: the synthetic world has 1 to {most} prompts that were not trained on.")
    pairs = held_out_prompts(count)
    return [text for text, _ in pairs], [attributes for _, attributes in pairs]


def _finite(value: Any) -> Any:
    """JSON has no infinity (the distance of equal clips): null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
