"""hif4c bench: what a 4-bit linear costs on this machine, and what every recipe leaves of synthetic layers."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hif4c.tools.console import MAX_SEED, console, make_table, progress_bar, run

if TYPE_CHECKING:
    from hif4c.compiler.recipe import Recipe
    from hif4c.compiler.synthetic_ladder import LayerFigures

__all__ = ["app", "layers", "linear"]

SHAPES = "1536x1536,1536x8960,5120x5120"
ROWS = "1,8,256,2048"
MODEL = "Wan2.2-T2V-A14B"
WIDTH = 5120
HELD_OUT = 1024
"""Two of the 32-call rounds in which attn2.out has a rare call."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure a part by itself: what it costs on this machine, or what it leaves of the numbers.",
)


@app.command("linear")
def linear(
    shapes: Annotated[str, typer.Option(help="KxN, separated by commas.")] = SHAPES,
    rows: Annotated[str, typer.Option(help="Rows M, separated by commas.")] = ROWS,
    seconds: Annotated[float, typer.Option(help="About how long to measure each shape.")] = 2.0,
    threads: Annotated[int | None, typer.Option(help="Threads. Default: torch's.")] = None,
    kernels: Annotated[str, typer.Option(help="auto, jit (built here) or portable.")] = "jit",
) -> None:
    """Time y = x W^T + b for bf16 x: torch in fp32 and bf16, and HiF4 (the quantization of x included).

    The repetitions of all take turns, so that a busy machine slows each alike; medians and their ratios are shown.
    """
    import torch

    from hif4c.runtime.native import registry

    registry.select(kernels)
    if threads is not None:
        if threads < 1:
            raise typer.BadParameter("threads must be at least 1")
        torch.set_num_threads(threads)
    sizes = [_pair(item) for item in shapes.split(",")]
    counts = [_number(item) for item in rows.split(",")]
    console.print(_machine(registry), highlight=False)
    table = make_table(
        "medians in ms; HiF4 includes the quantization of x",
        ("K x N", "M", "fp32", "bf16", "HiF4", "of it quantize", "HiF4 GOP/s", "fp32 / HiF4", "bf16 / HiF4"),
    )
    with progress_bar("measuring", len(sizes) * len(counts)) as advance:
        for k, n in sizes:
            for m in counts:
                took = measure(m, k, n, seconds)
                table.add_row(
                    f"{k} x {n}", str(m), *(f"{1e3 * took[name]:.3f}" for name in ("fp32", "bf16", "hif4", "quantize")),
                    f"{2e-9 * m * k * n / took['hif4']:.0f}",
                    f"{took['fp32'] / took['hif4']:.2f}", f"{took['bf16'] / took['hif4']:.2f}",
                )  # fmt: skip
                advance(1)
    console.print(table)


@app.command("layers")
def layers(
    outputs: Annotated[int, typer.Option(min=1, max=WIDTH, help="Outputs of each layer that are measured.")] = 512,
    tokens: Annotated[
        int, typer.Option(min=512, help=f"Calibration tokens of an input of {WIDTH} channels; wider ones have more.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED // 2**20, help="Of weights and inputs.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the figures as JSON.")
    ] = None,
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


def measure(m: int, k: int, n: int, seconds: float) -> dict[str, float]:
    """Median seconds of one linear [m, k] x [k, n], by name: fp32, bf16, hif4, and quantize (a part of hif4)."""
    import torch

    from hif4c.runtime.format import quantize

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator)
    planes = quantize(weight)
    x16, weight16, bias16 = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    hif4, functional = torch.ops.hif4, torch.nn.functional
    calls: dict[str, Callable[[], Any]] = {
        "fp32": lambda: functional.linear(x, weight, bias),
        "bf16": lambda: functional.linear(x16, weight16, bias16),
        "hif4": lambda: hif4.linear(*hif4.quantize(x16), *planes, bias16),
        "quantize": lambda: hif4.quantize(x16),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(took["hif4"]) < 3:
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in took.items()}


def _machine(registry: Any) -> str:
    import torch

    from hif4c.runtime.native.bindings import INSTRUCTION_SETS

    kernels = "portable"
    if registry.is_enabled():
        kernels = f"native, {INSTRUCTION_SETS[registry.enable().instruction_set]}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{_processor()}, {os.cpu_count()} processors{load}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; kernels: {kernels}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _pair(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return _number(k), _number(n)


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a positive number; shapes look like 1536x1536, rows like 1,8,256")
    return int(text)


if __name__ == "__main__":
    run(app)
