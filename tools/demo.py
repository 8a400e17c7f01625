"""make demo: compile wan-tiny, verify it, sample from the original and from the artifact, and compare."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.compile import compile_command
from hif4c.tools.console import MAX_SEED, console, make_table, progress_bar, run_command
from hif4c.tools.verify import verify

__all__ = ["demo"]

MODEL = "wan-tiny"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "demo"
    ),
    prompts: Annotated[int, typer.Option(min=1, max=135, help="How many prompts to sample.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first clip.")] = 0,
) -> None:
    """Compile wan-tiny, verify the artifact, sample prompts it never saw from both, and write clips and a picture."""
    from hif4c.compiler.evaluation import evaluate_pair, sample_clips
    from hif4c.compiler.models import tiny_directory
    from hif4c.compiler.report import summarize
    from hif4c.compiler.tiny.world import held_out_prompts
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.media import save_clip, save_comparison
    from hif4c.runtime.pipeline import load_components, load_pipeline
    from hif4c.runtime.sampling import SamplingSettings

    artifact = output / "wan-tiny.hif4"
    shutil.rmtree(artifact, ignore_errors=True)
    console.rule("compile")
    started = time.perf_counter()
    compile_command(MODEL, artifact)
    compile_seconds = time.perf_counter() - started
    console.rule("verify")
    verify(artifact)

    console.rule("sample")
    manifest = open_artifact(artifact).manifest
    settings = SamplingSettings.from_defaults(manifest["model"]["sampling"])
    chosen = held_out_prompts(prompts)
    started = time.perf_counter()
    compiled = load_pipeline(artifact)
    load_seconds = time.perf_counter() - started
    pipelines = {
        "original": load_components(str(tiny_directory()), manifest["model"]["pipeline_class"]),
        "artifact": compiled,
    }
    clips, seconds = {}, {}
    for name, pipeline in pipelines.items():
        started = time.perf_counter()
        with progress_bar(f"sampling, {name}", len(chosen) * settings.steps) as advance:
            clips[name] = sample_clips(pipeline, [text for text, _ in chosen], settings, seed=seed, on_step=advance)
        seconds[name] = time.perf_counter() - started
    rows = []
    for index, (text, _) in enumerate(chosen):
        for name in pipelines:
            frames = clips[name][index].frames
            save_clip(frames, output / f"{index + 1}-{name}.mp4", settings.fps)
            rows.append((f"{text}  -  {'bf16' if name == 'original' else 'compiled, 4 bits'}", frames))
    picture = output / "comparison.png"
    save_comparison(rows, picture)

    result = evaluate_pair(clips["original"], clips["artifact"], [attributes for _, attributes in chosen])
    experts = summarize(open_artifact(artifact))
    before, after = (sum(getattr(item, name) for item in experts) for name in ("bf16_bytes", "file_bytes"))
    table = make_table(
        f"{MODEL}: original and artifact, {len(chosen)} prompts it never saw", ("", "original", "artifact")
    )
    table.add_row("both experts", f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB ({after / before:.1%})")
    table.add_row("compile and verify", "", f"{compile_seconds:.1f} s")
    table.add_row("load the pipeline", "", f"{load_seconds:.1f} s")
    table.add_row("sampling", f"{seconds['original']:.1f} s", f"{seconds['artifact']:.1f} s")
    for axis in ("fully_right", "subject_consistency", "motion_smoothness", "mean"):
        values = (f"{result['scores'][side][axis]:.3f}" for side in ("reference", "artifact"))
        table.add_row(f"score: {axis.replace('_', ' ')}", *values)
    table.add_row("latent SNR, median", "", f"{result['distance']['latent_snr']:.1f} dB")
    table.add_row("frame PSNR, median", "", f"{result['distance']['frame_psnr']:.1f} dB")
    console.rule("summary")
    console.print(table)
    console.print(f"clips and {picture.name} are in {output}/", highlight=False, markup=False)


if __name__ == "__main__":
    run_command(demo)
