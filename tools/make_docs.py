"""Write the pages of docs/ that are made from the code and from real runs of it."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import console, run

__all__ = ["DOCS", "api", "app", "passes"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write. Default: the page in docs/.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def make_docs() -> None:
    """Write the pages of docs/ that are made from the code and from real runs of it."""


@app.command()
def passes(output: Output = None) -> None:
    """docs/passes.md: what each pass does and why, with a block of wan-tiny before and after it."""
    from hif4c.compiler.pass_docs import passes_page

    _write(output or DOCS / "passes.md", passes_page())


@app.command()
def api(output: Output = None) -> None:
    """docs/python-api.md: what a program may rely on, from signatures and docstrings."""
    from hif4c.compiler.api_docs import api_page

    _write(output or DOCS / "python-api.md", api_page())


def _write(path: Path, text: str) -> None:
    """Replace a page in one step, so that a failure leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    console.print(f"{path}: {len(text.encode()):,} bytes", highlight=False, markup=False)


if __name__ == "__main__":
    run(app)
