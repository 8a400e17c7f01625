"""What `hif4c evaluate --ladder` does: run the ladder, print its tables, write figures, Markdown and picture."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from hif4c.tools.console import Reporter, console, make_table

if TYPE_CHECKING:
    from hif4c.compiler.ladder import Yardstick
    from hif4c.compiler.ladder_rows import LadderResult
    from hif4c.compiler.recipe import Recipe

__all__ = ["LadderOptions", "climb_ladder", "write_figures"]


@dataclass(frozen=True)
class LadderOptions:
    """The options of `hif4c evaluate` that are a ladder's own, as typed; `output` is shared with a plain evaluation."""

    recipe: Sequence[str] | None
    sweep: str | None
    calibration: Sequence[Path] | None
    work: Path | None
    keep: bool
    output: Path | None
    plot: Path | None
    markdown: Path | None

    def given(self) -> list[str]:
        """The options that were given and mean nothing without a ladder."""
        names = ("recipe", "sweep", "calibration", "work", "keep", "plot", "markdown")
        return [f"--{name}" for name in names if getattr(self, name)]


def climb_ladder(model: str, yardstick: Yardstick, options: LadderOptions, device: str, kernels: str) -> None:
    """Measure every recipe, then print and write what was asked for."""
    from hif4c.compiler.ladder import ladder_recipes, run_ladder
    from hif4c.compiler.ladder_table import render_markdown
    from hif4c.compiler.recipe import load_recipe

    recipes = [load_recipe(name) for name in options.recipe] if options.recipe else ladder_recipes()
    key = None
    if options.sweep is not None:
        key, recipes = _swept(recipes, options.sweep)
    for path in (options.output, options.markdown, options.plot):
        _make_parent(path)
    with Reporter.open() as report:

        def show(event: str, value: Any) -> None:
            if event == "total":
                report.begin("ladder", value, "share")
            elif event == "advance":
                report.advance(value)
            elif event == "step":
                report("step", value)

        result = run_ladder(
            model, recipes, options.calibration or [], yardstick, options.work or Path("ladder"),
            device=device, kernels=kernels, keep=options.keep, events=show,
        )  # fmt: skip
    _print(result)
    if options.output is not None:
        write_figures(result.to_dict(), options.output)
    if options.markdown is not None:
        _write(options.markdown, render_markdown(result))
    if options.plot is not None:
        _plot(result, key, options.plot)


def write_figures(values: dict[str, Any], path: Path) -> None:
    """Write figures as JSON, null for what is not finite; Hif4Error where it cannot be written."""
    _make_parent(path)
    _write(path, json.dumps(_finite(values), indent=2, sort_keys=True, allow_nan=False) + "\n")


def _swept(recipes: Sequence[Recipe], sweep: str) -> tuple[str, list[Recipe]]:
    """The key of "KEY=VALUE,VALUE", and each recipe with each value."""
    from hif4c.compiler.ladder import vary_recipe
    from hif4c.runtime.errors import Hif4Error

    key, _, text = sweep.partition("=")
    key, values = key.strip(), [item.strip() for item in text.split(",") if item.strip()]
    if not key or not values:
        raise Hif4Error(f"--sweep {sweep}: give KEY=VALUE,VALUE,... such as mask_percentile=99,99.9,100.")
    return key, [vary_recipe(recipe, key, _parse_value(value)) for recipe in recipes for value in values]


def _parse_value(text: str) -> Any:
    """A number as in a recipe's file; anything else is text, so that it needs no quotes in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _print(result: LadderResult) -> None:
    from hif4c.compiler.ladder_table import ladder_tables

    for table in ladder_tables(result):
        shown = make_table(table.title, table.columns)
        for row in table.rows:
            shown.add_row(*(escape("\n".join(cell)) for cell in row))
        console.print(shown)


def _plot(result: LadderResult, key: str | None, path: Path) -> None:
    from hif4c.compiler.plots import CALIBRATION_PROMPTS, plot_ladder, plot_sweep, save_figure

    sizes = {row.calibration_prompts for row in result.rows if row.calibration is not None}
    key = CALIBRATION_PROMPTS if key is None and len(sizes) > 1 else key
    save_figure(plot_ladder(result) if key is None else plot_sweep(result, key), path)


def _finite(value: Any) -> Any:
    """JSON has no infinity (the distance of equal clips): null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_parent(path: Path | None) -> None:
    """So that a path that cannot be written is said before the long part."""
    from hif4c.runtime.errors import Hif4Error

    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Hif4Error(f"{path}: cannot be written ({error.strerror}).") from None


def _write(path: Path, text: str) -> None:
    from hif4c.runtime.errors import Hif4Error

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be written ({error.strerror}).") from None
