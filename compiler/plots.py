"""A ladder and a sweep as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hif4c.compiler.ladder_rows import LadderResult, LadderRow
from hif4c.compiler.ladder_table import Spread, group_rows, score_of, spread_of
from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CALIBRATION_PROMPTS", "plot_ladder", "plot_sweep", "save_figure"]

CALIBRATION_PROMPTS = "calibration prompts"
"""The sweep over the size of the calibration set; any other sweep is over a key of the recipe."""

_DOTS_PER_INCH = 150
_BF16 = "#888888"
_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#7b3294", "#8c564b", "#e7298a", "#17becf", "#636363")
_Value = Callable[[LadderRow], float | None]


def plot_ladder(result: LadderResult) -> Figure:
    """Recipes from top to bottom; a panel each for mean score, subject consistency and latent SNR.

    A dot is the mean over the calibration files, its whisker goes from the least to the most, the dashed line is bf16.
    """
    groups = group_rows(result.rows)
    panels = _panels(result)
    figure = Figure(figsize=(3.4 * len(panels) + 1.6, 1.5 + 0.36 * len(groups)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, value, reference) in zip(axes, panels, strict=True):
        for index, (label, rows) in enumerate(groups.items()):
            spread = spread_of(rows, value)
            if spread is not None:
                colour = _COLOURS[index % len(_COLOURS)]
                axis.errorbar(spread.mean, label, xerr=_whisker(spread), fmt="o", color=colour, capsize=4, markersize=6)
        if reference is not None:
            axis.axvline(reference, color=_BF16, linestyle="--", linewidth=1)
            title = f"{title} (bf16: {reference:.3f})"
        _dress(axis, title)
        axis.margins(x=0.15, y=0.12)
    axes[0].invert_yaxis()
    figure.suptitle(f"{result.model}: {result.prompts} prompts, equal seeds")
    return figure


def plot_sweep(result: LadderResult, key: str) -> Figure:
    """One key of the recipe, or `CALIBRATION_PROMPTS`, from left to right in even steps; a line for each recipe.

    Raises:
        Hif4Error: no two rows differ in it.
    """
    lines: dict[str, dict[Any, list[LadderRow]]] = {}
    for row in result.rows:
        position = row.calibration_prompts if key == CALIBRATION_PROMPTS else row.values[key]
        if position is not None:
            lines.setdefault(row.recipe.partition(f" {key}=")[0], {}).setdefault(position, []).append(row)
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        raise Hif4Error(f"no two rows of this ladder differ in {key}: there is no sweep to plot.")
    positions = sorted(
        {point for points in lines.values() for point in points}, key=lambda item: (str(type(item)), item)
    )
    panels = _panels(result)
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, value, reference) in zip(axes, panels, strict=True):
        for index, (label, points) in enumerate(lines.items()):
            spreads = {positions.index(point): spread_of(rows, value) for point, rows in points.items()}
            known = sorted((place, spread) for place, spread in spreads.items() if spread is not None)
            axis.errorbar(
                [place for place, _ in known],
                [spread.mean for _, spread in known],
                yerr=[[whisker[side][0] for _, spread in known for whisker in [_whisker(spread)]] for side in (0, 1)],
                fmt="o-", capsize=4, color=_COLOURS[index % len(_COLOURS)], label=label,
            )  # fmt: skip
        if reference is not None:
            axis.axhline(reference, color=_BF16, linestyle="--", linewidth=1, label="bf16")
        axis.set_xticks(range(len(positions)), [_tick(item) for item in positions])
        axis.set_xlabel(key.replace("_", " "))
        _dress(axis, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{result.model}: {result.prompts} prompts, equal seeds")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; Hif4Error where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            FigureCanvasAgg(figure).print_figure(file, format="png", dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be written ({error.strerror}).") from None


def _panels(result: LadderResult) -> Sequence[tuple[str, _Value, float | None]]:
    """Title, figure and bf16 line of every panel."""
    scores = result.reference.scores
    panels: list[tuple[str, _Value, float | None]] = []
    if scores is not None:
        for axis, title in (("mean", "mean score"), ("subject_consistency", "subject consistency")):
            panels.append((title, score_of(axis), scores[axis]))
    panels.append(("latent SNR, dB", lambda row: row.distance["latent_snr"], None))
    return panels


def _whisker(spread: Spread) -> list[list[float]]:
    return [[spread.mean - spread.low], [spread.high - spread.mean]]


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
