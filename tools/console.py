"""What the commands share: output, progress, and errors as one sentence."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "console", "make_table", "parse_size", "progress_bar", "run", "run_command"]

# Into a pipe or file, tables take the width they need instead of 80 columns.
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)


def run(app: Callable[[], Any]) -> None:
    """Run a command line: an `Hif4Error` is one sentence on stderr and exit status 1, without a traceback."""
    from hif4c.runtime.errors import Hif4Error

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors)])
    _quiet_libraries()
    # A polite kill unwinds like any other failure, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except Hif4Error as error:
        errors.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


def run_command(command: Callable[..., Any]) -> None:
    """Run one command as its own program: `python tools/NAME.py` is `hif4c NAME`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(command)
    run(app)


def _quiet_libraries() -> None:
    for name in ("diffusers", "transformers", "torch.fx", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parse_size(text: str) -> tuple[int, int]:
    """ "832x480" -> (width, height)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, for example 832x480")
    return int(parts[0]), int(parts[1])


@contextmanager
def progress_bar(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A progress bar with elapsed time and estimate on stderr; yields a function that advances it."""
    with Reporter.make_progress() as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


@dataclass
class Reporter:
    """Shows the events of a compile: a line a step, and one bar over the bytes of the checkpoint."""

    progress: Progress
    task: TaskID | None = None

    @staticmethod
    def make_progress() -> Progress:
        """The look of every progress bar."""
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=errors,
        )

    def __call__(self, event: str, value: Any) -> None:
        """Take one event of `hif4c.compiler.compile.Events`."""
        if event == "total":
            self.task = self.progress.add_task("weights", total=value)
        elif event == "bytes" and self.task is not None:
            self.progress.advance(self.task, value)
        elif event == "step":
            self.progress.console.print(f"  {value}", highlight=False)
        elif event == "pass":
            for note in value.notes:
                self.progress.console.print(f"    [dim]{value.name}: {note}[/]", highlight=False)


def make_table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """An empty table whose first `left` columns are text and never shortened, the others right-aligned figures."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    return table
