"""hif4c plan MODEL: what would be quantized, and why not the rest."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hif4c.tools.console import console, make_table, parse_size, run_command
from hif4c.tools.plan_estimate import show_estimate

if TYPE_CHECKING:
    from hif4c.compiler.plan import ExpertPlan
    from hif4c.compiler.recipe import Recipe

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="Directory, built-in name (Wan2.2-T2V-A14B, wan-tiny, ...) or hub id.")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe name or .toml file; EXPERT=RECIPE for one expert. Repeatable.")
    ] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert. Repeatable.")] = None,
    summary: Annotated[bool, typer.Option(help="Only the totals.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time, disk and memory of calibrate and compile on this machine.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the artifact would go, for --estimate. Default: here.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="As for calibrate: WIDTHxHEIGHT, for --estimate.")] = None,
    frames: Annotated[int | None, typer.Option(help="As for calibrate: frames of a clip, for --estimate.")] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="As for calibrate: recorded calls, for --estimate.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Show every linear with its shape, precision, reason and bytes.

    Reads only the config: nothing expensive is run. With --estimate this machine is measured for some seconds, and the
    linears are left out.
    """
    from hif4c.compiler.locate import describe_model
    from hif4c.compiler.plan import make_plan
    from hif4c.compiler.recipe import resolve_recipes

    description = describe_model(model, revision=revision)
    recipes = resolve_recipes(list(description.configs), recipe or [], expert or [])
    plans = {
        key: make_plan(*key) for key in {(description.configs[name], chosen): 0 for name, chosen in recipes.items()}
    }
    columns = ("expert", "recipe", "4-bit", "high", "bf16", "compiled", "ratio")
    totals = make_table(f"{description.source}: plan", columns, left=2)
    sums = [0, 0, 0, 0]
    for name, chosen in recipes.items():
        expert_plan = plans[description.configs[name], chosen]
        if not summary and not estimate:
            console.print(_linears(f"{name}, recipe {chosen.name}", expert_plan))
        quantized = sum(decision.quantized for decision in expert_plan.decisions)
        row = [quantized, len(expert_plan.linears) - quantized, expert_plan.bytes_before, expert_plan.bytes_after]
        sums = [total + value for total, value in zip(sums, row, strict=True)]
        totals.add_row(name, escape(chosen.name), *_cells(row))
    if len(recipes) > 1:
        totals.add_section()
        totals.add_row("both", "", *_cells(sums))
    console.print(totals)
    for chosen in dict.fromkeys(recipes.values()):
        console.print(_explain(chosen), highlight=False, markup=False, soft_wrap=True)
    if estimate:
        named = {name: plans[description.configs[name], chosen] for name, chosen in recipes.items()}
        place = output or Path(f"{description.source.rpartition('/')[2]}.hif4")
        width, height = parse_size(size)
        asked = {"width": width, "height": height, "frames": frames, "calls": calls}
        given = {key: value for key, value in asked.items() if value is not None}
        show_estimate(model, description, recipes, named, place, given)


def _explain(recipe: Recipe) -> str:
    """What a recipe does, and what the config alone cannot tell of it."""
    text = f"{recipe.name}: {recipe.description or 'no description'}"
    decided = {
        "channel means": recipe.shift,
        "masks": recipe.mask_percentile is not None,
        "outlier columns": recipe.outlier_columns,
        "rounding": recipe.rounding != "nearest",
        "linears that stay in bf16": recipe.average_bits is not None,
        "linears with bf16 activations": recipe.bf16_layers,
        "steps with bf16 activations": recipe.bf16_steps,
    }
    found = ", ".join(name for name, wanted in decided.items() if wanted)
    return f"{text}\n  from a calibration: {found}" if recipe.needs_calibration else text


def _linears(title: str, plan: ExpertPlan) -> Table:
    table = make_table(title, ("linear", "out x in", "is", "bf16", "compiled", "reason"), left=3)
    table.columns[-1].justify = "left"
    for item in plan.linears:
        shape = f"{item.out_features}x{item.in_features}"
        sizes = (_size(item.bytes_before), _size(item.bytes_after))
        table.add_row(item.decision.path, shape, item.decision.precision, *sizes, escape(item.decision.reason))
    others = _size(plan.other_bytes)
    table.add_row("everything else", "", "high", others, others, "convolution, norms, modulation: copied")
    return table


def _cells(row: list[int]) -> list[str]:
    quantized, high, before, after = row
    return [str(quantized), str(high), _size(before), _size(after), f"{after / before:.1%}"]


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e3:,.1f} kB"


if __name__ == "__main__":
    run_command(plan)
