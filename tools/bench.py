"""hif4c bench: what a part costs by itself on this machine, and what every recipe leaves of synthetic layers."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hif4c.tools.bench_output import (
    Markdown,
    Output,
    check_outputs,
    machine_sentence,
    show_tables,
    write_values,
)
from hif4c.tools.bench_scale import scale
from hif4c.tools.console import MAX_SEED, console, make_table, progress_bar, run

if TYPE_CHECKING:
    from hif4c.compiler.recipe import Recipe
    from hif4c.compiler.synthetic_ladder import LayerFigures

__all__ = ["app", "layers", "linear", "model", "static", "step"]

SHAPES = "1536x1536,1536x8960,5120x5120,5120x13824,13824x5120"
ROWS = "1,4,8,256,2048"
LATENT = "5x24x52"
MODEL = "Wan2.2-T2V-A14B"
WIDTH = 5120
HELD_OUT = 1024
"""Two of the 32-call rounds in which attn2.out has a rare call."""
KERNELS_HELP = "jit (built here), auto or portable."

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure a part by itself: what it costs on this machine, or what it leaves of the numbers.",
)
app.command("scale")(scale)
Plot = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw them into this PNG.")]
Threads = Annotated[str | None, typer.Option(help="Threads; several with commas. Default: torch's.")]


@app.command("linear")
def linear(
    shapes: Annotated[str, typer.Option(help="KxN, separated by commas.")] = SHAPES,
    rows: Annotated[str, typer.Option(help="Rows M, separated by commas.")] = ROWS,
    formats: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, int8, torchao-int8, torchao-int4, hif4, hif4-w4a16; by commas. Default: all."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="About how long to measure each shape.")] = 1.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds of each shape, at least.")] = 5,
    threads: Threads = None,
    kernels: Annotated[str, typer.Option(help=KERNELS_HELP)] = "jit",
    output: Output = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time y = x W^T + b for bf16 x: torch in fp32, bf16 and dynamic int8, torchao, and HiF4 with 4- and 16-bit inputs.

    The quantization of x is part of every figure. All take turns, so that a busy machine slows each alike. Weights stay
    in the caches between rounds as far as they fit.
    """
    import torch

    from hif4c.compiler.bench_linear import FORMATS, check_formats, measure_linear
    from hif4c.tools.bench_tables import linear_tables

    sizes = [_shape(item) for item in shapes.split(",")]
    counts = [_number(item) for item in rows.split(",")]
    teams = _threads(threads)
    names = [item.strip() for item in formats.split(",")] if formats else list(FORMATS)
    check_formats(names)
    check_outputs(output, markdown, plot)
    machine = _select(kernels)
    figures = []
    with progress_bar("measuring", len(sizes) * len(counts) * len(teams)) as advance:
        for team in teams:
            torch.set_num_threads(team)
            for k, n in sizes:
                for m in counts:
                    figures.append(measure_linear(m, k, n, names, seconds=seconds, repetitions=repetitions))
                    advance(1)
    show_tables(linear_tables(figures), machine_sentence(machine), markdown)
    for name, reason in {name: reason for item in figures for name, reason in item.missing.items()}.items():
        console.print(f"{name} was not measured: {reason}", highlight=False, markup=False)
    write_values(output, {"machine": machine, "linear": [item.to_dict() for item in figures]})
    if plot is not None:
        from hif4c.compiler.bench_plots import plot_linear
        from hif4c.compiler.plots import save_figure

        save_figure(plot_linear(figures, machine_sentence(machine)), plot)


@app.command("step")
def step(
    width: Annotated[int, typer.Option(min=64, help="Of the residual stream, a multiple of 64 and of --heads.")] = 1536,
    heads: Annotated[int, typer.Option(min=1, help="Of the attention.")] = 12,
    ffn: Annotated[int, typer.Option(min=64, help="Inner width of the feed-forward layers.")] = 8960,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    text: Annotated[int, typer.Option(min=1, max=4096, help="Text tokens.")] = 512,
    text_dim: Annotated[int, typer.Option(min=1, help="Width of the text embeddings.")] = 4096,
    latent: Annotated[
        str, typer.Option(help="Latent FRAMESxHEIGHTxWIDTH, several with commas; 5x24x52 is 1,560 tokens.")
    ] = LATENT,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    torch_compile: Annotated[bool, typer.Option(help="Measure torch.compile too; compiling takes minutes.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory too, in fresh processes.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: torch's.")] = None,
    kernels: Annotated[str, typer.Option(help=KERNELS_HELP)] = "jit",
    output: Output = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time one denoising step of a random Wan: diffusers in bf16, torch.compile of it, and compiled by hif4c.

    The model is made and compiled in a temporary directory (recipe rotate). Steps take turns; memory is that of fresh
    processes; the breakdown is of one profiled step each.
    """
    import torch

    from hif4c.compiler.bench_inputs import Latent
    from hif4c.compiler.bench_step import StepOptions, measure_steps
    from hif4c.runtime.errors import Hif4Error
    from hif4c.tools.bench_tables import step_tables

    if width % heads or width % 64 or ffn % 64:
        raise Hif4Error(f"width {width}, heads {heads}, ffn {ffn}: width is a multiple of heads and of 64, ffn of 64.")
    latents = tuple(Latent.parse(item) for item in latent.split(","))
    options = StepOptions(
        width, heads, ffn, layers, text_dim, text, latents, repetitions, torch_compile, memory, kernels
    )
    check_outputs(output, markdown, plot)
    if threads is not None:
        torch.set_num_threads(threads)
    machine = _select(kernels)
    with (
        tempfile.TemporaryDirectory(prefix="hif4c-bench-") as directory,
        progress_bar("measuring", repetitions * len(latents)) as advance,
    ):

        def show(event: str, value: Any) -> None:
            if event == "advance":
                advance(value)
            else:
                console.print(f"  {value}", highlight=False, markup=False)

        result = measure_steps(options, Path(directory), show)
    show_tables(step_tables(result), machine_sentence(machine), markdown)
    write_values(output, {"machine": machine, **result.to_dict()})
    if plot is not None:
        from hif4c.compiler.bench_plots import plot_step
        from hif4c.compiler.plots import save_figure

        save_figure(plot_step(result, machine_sentence(machine)), plot)


@app.command("static")
def static(
    artifact: Annotated[
        Path | None, typer.Argument(help="An artifact with GPU kernels. Without one they are built for this.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only this target (cuda-sm80, ...). Repeatable. Default: all.")
    ] = None,
    output: Output = None,
    markdown: Markdown = None,
) -> None:
    """Registers, spills, shared memory and the main loop of every GPU kernel, read from the binaries. Needs no GPU."""
    from hif4c.compiler.bench_static import analyse_kernels, check_targets, find_kernels
    from hif4c.tools.bench_tables import static_table

    check_targets(target or [])
    check_outputs(output, markdown)
    figures = []
    tables = []
    with tempfile.TemporaryDirectory(prefix="hif4c-bench-") as directory:
        with progress_bar("building", None) as advance:
            folders = find_kernels(artifact, target or [], Path(directory), lambda text: advance(1))
        for name, folder in folders.items():
            with progress_bar(f"reading {name}", None) as advance:
                found = analyse_kernels(name, folder, lambda text, advance=advance: advance(1))  # type: ignore[misc]
            tables.append(static_table(name, found))
            figures += found
    show_tables(tables, "", markdown)
    write_values(output, {"static": [item.to_dict() for item in figures]})


@app.command("model")
def model(
    name: Annotated[str, typer.Option("--model", help="Wan2.2-T2V-A14B, Wan2.2-I2V-A14B or Wan2.2-TI2V-5B.")] = MODEL,
    tokens: Annotated[
        str, typer.Option(help="Tokens of a video, separated by commas; 32760 is 832x480, 75600 1280x720, 81 frames.")
    ] = "32760,75600",
    output: Output = None,
    markdown: Markdown = None,
) -> None:
    """A roofline on paper, not a measurement: a block on GPUs by what their multiprocessors could do at best."""
    from hif4c.compiler.models import load_builtin
    from hif4c.compiler.roofline import GPUS, model_block
    from hif4c.tools.bench_tables import model_table

    config = next(iter(load_builtin(name).experts.values()))
    counts = [_number(item) for item in tokens.split(",")]
    check_outputs(output, markdown)
    blocks = [model_block(gpu, config, count) for count in counts for gpu in GPUS]
    tables = [model_table(name, count, [item for item in blocks if item.tokens == count]) for count in counts]
    show_tables(
        tables, "A model from data sheets and instruction counts: nothing here was measured on a GPU.", markdown
    )
    write_values(output, {"model": name, "measured": False, "blocks": [item.to_dict() for item in blocks]})


@app.command("layers")
def layers(
    outputs: Annotated[int, typer.Option(min=1, max=WIDTH, help="Outputs of each layer that are measured.")] = 512,
    tokens: Annotated[
        int, typer.Option(min=512, help=f"Calibration tokens of an input of {WIDTH} channels; wider ones have more.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED // 2**20, help="Of weights and inputs.")] = 0,
    output: Output = None,
) -> None:
    """Output SQNR of every built-in recipe on layers as wide as Wan2.2-A14B's, on tokens that were held out.

    The layers are synthetic: the largest activations are those published of Wan2.2, everything else is made up. It
    takes some minutes and 4 GB: GPTQ factorizes a matrix of 13824 x 13824.
    """
    import dataclasses

    from hif4c.compiler.ladder import ladder_recipes
    from hif4c.compiler.models import load_builtin
    from hif4c.compiler.synthetic_ladder import layers_of, measure_layer
    from hif4c.runtime.native import registry
    from hif4c.tools.ladder import write_figures

    registry.select("auto")
    recipes = ladder_recipes()
    shapes = layers_of(next(iter(load_builtin(MODEL).experts.values())))
    # Recipes with a Hessian take time as its size, others as that of the input.
    with progress_bar("measuring", sum(layer.in_features**2 for layer in shapes) * len(recipes)) as advance:
        figures = [
            measure_layer(
                layer, recipes, outputs=outputs, tokens=tokens * layer.in_features // WIDTH, held_out=HELD_OUT,
                seed=seed, progress=lambda count, size=layer.in_features: advance(count * size**2),  # type: ignore[misc]
            )
            for layer in shapes
        ]  # fmt: skip
    _show_sqnr(figures, recipes)
    _show_rounding(figures)
    if output is not None:
        write_figures({"model": MODEL, "layers": [dataclasses.asdict(item) for item in figures]}, output)


def _show_sqnr(figures: Sequence[LayerFigures], recipes: Sequence[Recipe]) -> None:
    first = figures[0]
    title = (
        f"synthetic layers of {MODEL}'s widths: output SQNR in dB, {first.held_out} held-out tokens, "
        f"{first.outputs} outputs, seed {first.seed}"
    )
    stepped = [recipe.name for recipe in recipes if recipe.bf16_steps]
    if stepped:
        title += f"; {', '.join(stepped)}: its W4A4 steps"
    table = make_table(title, ("recipe", *(item.layer.kind for item in figures), "bits a weight"))
    weights = [item.layer.in_features * item.layer.out_features for item in figures]
    for index, recipe in enumerate(recipes):
        found = [item.recipes[index] for item in figures]
        bits = sum(item.bits * count for item, count in zip(found, weights, strict=True)) / sum(weights)
        table.add_row(recipe.name, *(f"{item.sqnr:.1f}" for item in found), f"{bits:.2f}")
    console.print(table)


def _show_rounding(figures: Sequence[LayerFigures]) -> None:
    """What scale search and GPTQ gain over plain rounding on the objective of the calibration."""
    columns = ("recipe", "rounding", *(item.layer.kind for item in figures), "outputs made worse")
    table = make_table("noise that a rounding saves on its calibration objective, in dB", columns, left=2)
    for index, recipe in enumerate(figures[0].recipes):
        for rounding in recipe.rounding:
            found = [item.recipes[index].rounding[rounding] for item in figures]
            worse = sum(item.worse for item in found)
            total = sum(item.outputs for item in figures)
            table.add_row(recipe.recipe, rounding, *(f"{item.gain:.2f}" for item in found), f"{worse} of {total}")
    if table.row_count:
        console.print(table)


def _select(kernels: str) -> dict[str, Any]:
    """Choose the kernels of this process; the machine and what runs on it."""
    from hif4c.compiler.bench_timing import describe_machine
    from hif4c.runtime.native import registry
    from hif4c.runtime.native.bindings import INSTRUCTION_SETS

    registry.select(kernels)
    native = registry.is_enabled()
    return describe_machine(INSTRUCTION_SETS[registry.enable().instruction_set] if native else "plain torch")


def _threads(text: str | None) -> list[int]:
    import torch

    return [torch.get_num_threads()] if text is None else [_number(item) for item in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return _number(k), _number(n)


def _number(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit()) or not 1 <= int(text) <= 1 << 24:
        raise typer.BadParameter(f"{text!r} is not a positive number; shapes look like 1536x1536, lists like 1,8,256")
    return int(text)


if __name__ == "__main__":
    run(app)
