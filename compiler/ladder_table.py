"""A ladder as tables: a line a recipe, each figure a mean over its calibration files with the least and the most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hif4c.compiler.ladder import KINDS
from hif4c.compiler.ladder_rows import LadderResult, LadderRow
from hif4c.compiler.tiny.scorer import AXES

__all__ = ["LadderTable", "Spread", "change", "group_rows", "ladder_tables", "render_markdown", "score_of", "spread_of"]

REFERENCE = "bf16"
Figure = Callable[[LadderRow], float | None]
"""Reads one figure from a row; None where it has none."""


@dataclass(frozen=True)
class Spread:
    """A figure of one recipe over its calibration files: mean, least and most."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class LadderTable:
    """Cells as texts: (figure,), or (mean, "least..most") over calibration files; the first column names the recipe."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class _Column:
    title: str
    value: Figure
    show: str
    reference: float | None = None


def group_rows(rows: Sequence[LadderRow]) -> dict[str, list[LadderRow]]:
    """Label -> rows of one recipe and one number of calibration prompts: only the draw of the prompts differs."""
    sizes: dict[str, set[int | None]] = {}
    for row in rows:
        sizes.setdefault(row.recipe, set()).add(row.calibration_prompts)
    groups: dict[str, list[LadderRow]] = {}
    for row in rows:
        several = len(sizes[row.recipe]) > 1
        label = f"{row.recipe}, {row.calibration_prompts or '?'} prompts" if several else row.recipe
        groups.setdefault(label, []).append(row)
    return groups


def spread_of(rows: Sequence[LadderRow], value: Figure) -> Spread | None:
    """One figure over some rows; None where a row has none."""
    found = [value(row) for row in rows]
    numbers = [item for item in found if item is not None]
    if not numbers or len(numbers) < len(found):
        return None
    return Spread(math.fsum(numbers) / len(numbers), min(numbers), max(numbers), len(numbers))


def score_of(axis: str) -> Figure:
    """What reads one axis of the scores from a row."""
    return lambda row: None if row.scores is None else row.scores[axis]


def change(row: LadderRow, reference: dict[str, float] | None, axis: str) -> float | None:
    """How much an axis differs from the bf16 model's, in per cent of it; None without scores."""
    if row.scores is None or not reference or not reference[axis]:
        return None
    return 100 * (row.scores[axis] / reference[axis] - 1)


def ladder_tables(result: LadderResult) -> list[LadderTable]:
    """Distances and cost; the scorer's axes, where there is a scorer; output SQNR by kind, where it was recorded."""
    tables = [_table(f"{_subject(result)}: distance from bf16, and cost", _main_columns(result), result)]
    if result.reference.scores is not None:
        tables.append(_table(f"{_subject(result)}: scores", _score_columns(result), result))
    if any(value is not None for row in result.rows for value in row.sqnr.values()):
        columns = [_Column(kind, _sqnr(kind), "{:.1f}") for kind in KINDS]
        tables.append(_table(f"{_subject(result)}: output SQNR of the linears in dB", columns, result))
    return tables


def render_markdown(result: LadderResult) -> str:
    """The tables in Markdown, with a sentence on what they hold."""
    parts = []
    for table in ladder_tables(result):
        lines = [f"**{table.title}**", "", _line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
        lines += [_line([_joined(cell) for cell in row]) for row in table.rows]
        parts.append("\n".join(lines))
    parts.append(_note(result))
    return "\n\n".join(parts) + "\n"


def _subject(result: LadderResult) -> str:
    return f"{result.model}, {result.prompts} prompts"


def _note(result: LadderResult) -> str:
    several = any(len(rows) > 1 for rows in group_rows(result.rows).values())
    spread = " In brackets: the least and the most over the calibration files." if several else ""
    return (
        f"Seeds {result.seed} to {result.seed + result.prompts - 1}, {result.settings.steps} steps, guidance "
        f"{result.settings.guidance:g}. Distances: medians over the clips, SNR and PSNR in dB; change: of the mean "
        f"score, against bf16.{spread}"
    )


def _main_columns(result: LadderResult) -> list[_Column]:
    scores = result.reference.scores
    titles = {
        "latent_snr": ("latent SNR", "{:.1f}"),
        "latent_psnr": ("latent PSNR", "{:.1f}"),
        "frame_psnr": ("frame PSNR", "{:.1f}"),
        "frame_ssim": ("frame SSIM", "{:.3f}"),
    }
    columns = [_Column(title, _distance(name), show) for name, (title, show) in titles.items()]
    if scores is not None:
        columns.append(_Column("mean score", score_of("mean"), "{:.3f}", scores["mean"]))
        columns.append(_Column("change %", lambda row: change(row, scores, "mean"), "{:+.1f}"))
    bf16 = result.rows[0].bf16_bytes / 1e6 if result.rows else None
    return [
        *columns,
        _Column("compile s", lambda row: row.compile_seconds, "{:.0f}"),
        _Column("MB", lambda row: row.artifact_bytes / 1e6, "{:,.2f}", bf16),
        _Column("bits a weight", lambda row: row.bits_per_weight, "{:.2f}", 16.0),
    ]


def _score_columns(result: LadderResult) -> list[_Column]:
    scores = result.reference.scores
    assert scores is not None
    columns = [
        _Column(axis.replace("_", " "), score_of(axis), "{:.3f}", scores[axis])
        for axis in (*AXES, "mean", "fully_right")
    ]
    columns.append(_Column("consistency change %", lambda row: change(row, scores, "subject_consistency"), "{:+.1f}"))
    return columns


def _sqnr(kind: str) -> Figure:
    return lambda row: row.sqnr.get(kind)


def _distance(name: str) -> Figure:
    return lambda row: row.distance[name]


def _table(title: str, columns: Sequence[_Column], result: LadderResult) -> LadderTable:
    rows: list[tuple[tuple[str, ...], ...]] = []
    if any(column.reference is not None for column in columns):
        shown = [("",) if item.reference is None else (item.show.format(item.reference),) for item in columns]
        rows.append(((REFERENCE,), *shown))
    for label, group in group_rows(result.rows).items():
        rows.append(((label,), *(_cell(spread_of(group, column.value), column.show) for column in columns)))
    return LadderTable(title, ("recipe", *(column.title for column in columns)), tuple(rows))


def _cell(spread: Spread | None, show: str) -> tuple[str, ...]:
    if spread is None:
        return ("",)
    mean, low, high = (show.format(value) for value in (spread.mean, spread.low, spread.high))
    return (mean,) if low == high else (mean, f"{low}..{high}")


def _joined(cell: tuple[str, ...]) -> str:
    text = cell[0] if len(cell) == 1 else f"{cell[0]} ({cell[1]})"
    return text.replace("|", "\\|")


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(cells)} |"
