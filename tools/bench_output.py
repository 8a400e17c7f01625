"""What the commands of `hif4c bench` share: where their figures go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hif4c.tools.console import console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Markdown", "Output", "check_outputs", "machine_sentence", "show_tables", "write_values"]

Output = Annotated[Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the figures as JSON.")]
Markdown = Annotated[Path | None, typer.Option(dir_okay=False, help="Write the tables as Markdown.")]


def machine_sentence(machine: dict[str, Any]) -> str:
    """Where it was measured, of what `describe_machine` says."""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    return (
        f"{machine['processor']}, {machine['processors']} processors{load}; torch {machine['torch']}; "
        f"kernels: {machine['kernels']}"
    )


def check_outputs(*paths: Path | None) -> None:
    """So that a path that cannot be written is said before the long part."""
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() == ".png":
                import matplotlib  # noqa: F401


def show_tables(tables: Sequence[Table], sentence: str, markdown: Path | None) -> None:
    """Print tables below a sentence, and write both as Markdown."""
    from hif4c.tools.bench_tables import to_markdown

    if sentence:
        console.print(sentence, highlight=False, markup=False)
    for table in tables:
        console.print(table)
    if markdown is not None:
        text = "\n".join([*([f"{sentence}\n"] if sentence else []), *map(to_markdown, tables)])
        markdown.write_text(text, encoding="utf-8")


def write_values(output: Path | None, values: dict[str, Any]) -> None:
    """Write the figures as JSON where a file was asked for."""
    from hif4c.tools.ladder import write_figures

    if output is not None:
        write_figures(values, output)
