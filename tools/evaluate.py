"""hif4c evaluate: an artifact, or a ladder of recipes, beside the bf16 model."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hif4c.tools.console import KERNELS_HELP, MAX_SEED, console, make_table, parse_size, progress_bar, run_command
from hif4c.tools.ladder import LadderOptions, climb_ladder, write_figures

if TYPE_CHECKING:
    from hif4c.compiler.ladder import Yardstick
    from hif4c.compiler.tiny.world import Attributes
    from hif4c.runtime.artifact import Artifact

__all__ = ["evaluate"]

LADDER = "With --ladder"


def evaluate(
    against: Annotated[str, typer.Option(help="The original model: directory, built-in name or hub id.")],
    artifact: Annotated[
        Path | None, typer.Argument(help="Directory of the artifact; with --ladder there is none.")
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(help="How many held-out prompts of the synthetic world (wan-tiny). Default: 48; a ladder: 96."),
    ] = None,
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
    kernels: Annotated[str, typer.Option(help=KERNELS_HELP)] = "auto",
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Compile the model with every recipe, and compare them.")
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Recipe name or .toml file; default: all built in. Repeatable.", rich_help_panel=LADDER),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="KEY=VALUE,VALUE,...: every recipe with each value of one key.", rich_help_panel=LADDER),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="File made by `hif4c calibrate`. Repeatable: shows the spread.", rich_help_panel=LADDER),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Keeps clips and rows: a ladder goes on where it stopped. Default: ladder.", rich_help_panel=LADDER
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the artifacts in the work directory.", rich_help_panel=LADDER)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture (PNG): of the sweep, or of all recipes.", rich_help_panel=LADDER),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.", rich_help_panel=LADDER)] = None,
) -> None:
    """Compare with the bf16 model on equal seeds: distances of latents and frames, and the objective scorer.

    Either one ARTIFACT with the model that it was made from or, with --ladder, recipes with each other.
    """
    from hif4c.compiler.ladder import Yardstick
    from hif4c.compiler.locate import describe_model
    from hif4c.compiler.sampling_defaults import sampling_defaults
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.pipeline import check_device
    from hif4c.runtime.sampling import SamplingSettings

    options = LadderOptions(recipe, sweep, calibration, work, keep, output, plot, markdown)
    if not ladder and (unused := options.given()):
        raise typer.BadParameter(f"{', '.join(unused)}: only with --ladder")
    if ladder and artifact is not None:
        raise typer.BadParameter(f"--ladder compiles the model itself; leave {artifact} out")
    if not ladder and artifact is None:
        raise typer.BadParameter("give ARTIFACT, the directory to evaluate, or --ladder to compare recipes")
    check_device(device)
    opened = None if artifact is None else open_artifact(artifact)
    if opened is None:
        configs = describe_model(against).configs
        defaults, channels = sampling_defaults(configs), {config.in_channels for config in configs.values()}
    else:
        defaults = opened.manifest["model"]["sampling"]
        channels = {entry["config"]["in_channels"] for entry in opened.manifest["experts"].values()}
    width, height = parse_size(size)
    settings = SamplingSettings.from_defaults(
        defaults, height=height, width=width, frames=frames, steps=steps, guidance=guidance
    )
    count = (96 if ladder else 48) if prompts is None else prompts
    yardstick = Yardstick(*_prompts(count, prompt_file, channels), settings, seed, batch, image)
    if opened is None:
        climb_ladder(against, yardstick, options, device, kernels)
    else:
        result = _evaluate_artifact(opened, against, yardstick, device, kernels)
        if output is not None:
            write_figures(result, output)


def _evaluate_artifact(
    artifact: Artifact, against: str, yardstick: Yardstick, device: str, kernels: str
) -> dict[str, Any]:
    from hif4c.compiler.evaluation import check_same_model, evaluate_pair, sample_clips
    from hif4c.compiler.locate import locate_model
    from hif4c.runtime.pipeline import load_components, load_pipeline
    from hif4c.runtime.sampling import open_image

    model, settings = artifact.manifest["model"], yardstick.settings
    image = open_image(yardstick.image, model["pipeline_class"], settings)
    location = locate_model(against, expert_files_only=False)
    check_same_model(artifact, location)
    root = str(location.root)
    # One after the other: only one of them is in memory.
    makers = {
        "reference": lambda: load_components(root, location.pipeline.class_name).to(device),
        "artifact": lambda: load_pipeline(artifact.root, base=root, device=device, kernels=kernels),
    }
    clips, seconds = {}, {}
    for name, make in makers.items():
        pipeline = make()
        started = time.perf_counter()
        with progress_bar(f"sampling, {name}", len(yardstick.prompts) * settings.steps) as advance:
            clips[name] = sample_clips(
                pipeline, yardstick.prompts, settings, seed=yardstick.seed, batch=yardstick.batch, image=image,
                on_step=advance,
            )  # fmt: skip
        seconds[name] = time.perf_counter() - started
        del pipeline
    result = evaluate_pair(clips["reference"], clips["artifact"], yardstick.expected)
    result |= {"prompts": len(yardstick.prompts), "seed": yardstick.seed, "seconds": seconds}
    _print(result, model["source"])
    return result


def _prompts(
    count: int, file: Path | None, channels: Iterable[int]
) -> tuple[tuple[str, ...], tuple[Attributes, ...] | None]:
    """The prompts, and what the scorer expects of them (None for prompts from a file)."""
    from hif4c.runtime.errors import Hif4Error

    if file is not None:
        try:
            texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise Hif4Error(f"{file}: cannot be read ({error}).") from None
        if not texts:
            raise Hif4Error(f"{file}: holds no prompt.")
        return tuple(texts), None
    if any(number != 8 for number in channels):
        raise Hif4Error("the built-in prompts and their scorer are for wan-tiny; give --prompt-file for this model.")
    from hif4c.compiler.tiny.world import NUM_TEMPLATES, held_out_attributes, held_out_prompts

    most = NUM_TEMPLATES * len(held_out_attributes())
    if not 1 <= count <= most:
        raise Hif4Error(f"--prompts {count}: the synthetic world has 1 to {most} prompts that were not trained on.")
    pairs = held_out_prompts(count)
    return tuple(text for text, _ in pairs), tuple(attributes for _, attributes in pairs)


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
        shown = f"{value:.3f}" if name == "frame_ssim" else f"{value:.1f} dB"
        table.add_row(f"{name.replace('_', ' ')}, median", "", shown, "")
    seconds = result["seconds"]
    table.add_row("sampling", f"{seconds['reference']:.1f} s", f"{seconds['artifact']:.1f} s", "")
    console.print(table)


if __name__ == "__main__":
    run_command(evaluate)
