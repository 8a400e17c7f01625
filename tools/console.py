"""What the commands share: output, progress, and errors as one sentence."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "KERNELS_HELP",
    "MAX_SEED",
    "Reporter",
    "console",
    "find_base",
    "make_table",
    "parse_size",
    "progress_bar",
    "run",
    "run_command",
]

# What the runtime alone does without (see the extras in pyproject.toml).
OPTIONAL_PACKAGES = (
    "PIL",
    "accelerate",
    "diffusers",
    "ftfy",
    "huggingface_hub",
    "imageio",
    "matplotlib",
    "scipy",
    "transformers",
)
MAX_SEED = 2**63 - 2**32  # torch's generators take 64-bit seeds; this leaves room for one seed a clip
KERNELS_HELP = "auto, bundled (the artifact's, if trusted), jit (built here) or portable."
# Into a pipe or file, tables take the width they need instead of 80 columns.
# A path may hold ":smile:"; what was typed is what is printed.
console = Console(width=None if sys.stdout.isatty() else 140, emoji=False)
errors = Console(stderr=True, emoji=False)


def run(app: Callable[[], Any]) -> None:
    """Run a command line: what is wrong with the input or the machine is one sentence on stderr and exit status 1."""
    from hif4c.runtime.errors import Hif4Error

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors)])
    _quiet_libraries()
    # A polite kill unwinds like any other failure, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except Hif4Error as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'this command'}: {error.strerror or error}.")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL_PACKAGES:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'hif4c[compile]'")


def _fail(sentence: str) -> NoReturn:
    errors.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def run_command(command: Callable[..., Any]) -> None:
    """Run one command as its own program: `python tools/NAME.py` is `hif4c NAME`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(command)
    run(app)


def _quiet_libraries() -> None:
    for name in ("diffusers", "transformers", "torch.fx", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Turn "832x480" into (width, height), and None into (None, None)."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, for example 832x480")
    return int(parts[0]), int(parts[1])


def find_base(model: str | None) -> str | None:
    """The directory of the original pipeline that `--base` names: a directory, a built-in name or a hub id."""
    if model is None:
        return None
    from hif4c.compiler.locate import locate_model

    return str(locate_model(model, expert_files_only=False).root)


@contextmanager
def progress_bar(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A progress bar with elapsed time and estimate on stderr; yields a function that advances it."""
    with Reporter.make_progress() as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


@dataclass
class Reporter:
    """Shows the events of a compile or a calibration: a line a step, and a bar for each step that is long."""

    progress: Progress
    task: TaskID | None = None
    step: str = "reading"

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
            self.task = self.progress.add_task(self.step, total=value)
        elif event == "bytes" and self.task is not None:
            self.progress.advance(self.task, value)
        elif event == "step":
            self.step = value.partition(" on ")[0].partition(" (")[0]  # a bar has little room
            self.progress.console.print(f"  {value}", highlight=False, markup=False)
        elif event == "note":
            self.progress.console.print(f"    [dim]{escape(value)}[/]", highlight=False)
        elif event == "pass":
            for note in value.notes:
                self.progress.console.print(f"    [dim]{value.name}: {escape(note)}[/]", highlight=False)


def make_table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """An empty table whose first `left` columns are text and never shortened, the others right-aligned figures."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    return table
