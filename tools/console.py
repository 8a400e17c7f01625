"""What the commands share: output, progress, and errors as one sentence."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from hif4c.tools.progress import UNITS, LogLines, Pace, make_progress, run_summary

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
    "silence",
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


def silence() -> None:
    """Print nothing but errors from now on: for the ranks beside the one that speaks to people."""
    console.quiet = True


@contextmanager
def progress_bar(description: str, total: float | None, unit: str = "share") -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, or lines in a log; yields a function that advances it.

    Args:
        description: a few words.
        total: amount of the whole; None where nobody knows.
        unit: "bytes", "pieces", or "share" for amounts that tell people nothing.
    """
    with Reporter.open() as report:
        report.begin(description, total, unit)
        yield report.advance


@dataclass
class Reporter:
    """Shows the events of a long command on stderr: a line a step, and a bar for each step that is long.

    A bar shows what is done, bytes a second where it counts bytes, and how long the rest takes as soon as the first
    block of a model is done. Without a terminal there are lines instead: every tenth of a step, or every 30 seconds.

    Events are (name, value):
        "step": a sentence; what follows belongs to it.
        "total": the amount of a long step, which begins now.
        "unit": "bytes" or "pieces", right after "total". Pieces without it.
        "skipped": an amount that an earlier run finished: done, and no part of the speed.
        "bytes": an amount that is done, in the unit of the step.
        "note": a sentence of lesser weight.
        "pass": a `PassRecord`.

    Use it as `with Reporter.open(silent=rank > 0) as report: ...`; then `report.summary(seconds, written)` is the line
    for the end of a run.

    Attributes:
        progress: the bars.
        silent: shows nothing, for the ranks beside the first; amounts are counted all the same.
    """

    progress: Progress
    silent: bool = False
    step: str = "reading"
    _task: TaskID | None = None
    _paces: list[Pace] = field(default_factory=list)
    _lines: LogLines | None = None

    @staticmethod
    def make_progress() -> Progress:
        """The look of every progress bar."""
        return make_progress(errors)

    @classmethod
    @contextmanager
    def open(cls, *, silent: bool = False) -> Iterator[Reporter]:
        """A reporter whose bars are on the screen until the end of the context."""
        progress = cls.make_progress()
        progress.disable |= silent
        with progress:
            yield cls(progress, silent)

    def __call__(self, event: str, value: Any) -> None:
        """Take one event."""
        if event == "total":
            self.begin(self.step, value)
        elif event == "unit":
            if value not in UNITS:
                raise ValueError(f"{value!r} is no unit; these are: {', '.join(UNITS)}")
            self._paces[-1].unit = value
        elif event == "bytes":
            self.advance(value)
        elif event == "skipped":
            self.advance(value, skipped=True)
        elif event == "step":
            self.step = value.partition(" on ")[0].partition(" (")[0]  # a bar has little room
            if self._paces:
                self._paces[-1].pause()
            self._print(f"  {escape(value)}")
        elif event == "note":
            self._print(f"    [dim]{escape(value)}[/]")
        elif event == "pass":
            for note in value.notes:
                self._print(f"    [dim]{value.name}: {escape(note)}[/]")

    def begin(self, description: str, total: float | None, unit: str = "pieces") -> None:
        """Begin a bar."""
        self._end()
        pace = Pace(total, unit)
        self._paces.append(pace)
        self._lines = LogLines(pace)
        self._task = self.progress.add_task(escape(description), total=total, pace=pace)
        self.step = description

    def advance(self, amount: float, *, skipped: bool = False) -> None:
        """Count an amount of the bar that was begun last; without one, nothing."""
        if self._task is None or self._lines is None:
            return
        pace = self._paces[-1]
        (pace.skip if skipped else pace.advance)(amount)
        self.progress.advance(self._task, amount)
        if self.progress.disable and self._lines.due():
            self._print(f"    {escape(self.step)}: {pace.line()}")

    def summary(self, seconds: float, written: float = 0) -> str:
        """One line on the whole run; see `run_summary`.

        Args:
            seconds: it took.
            written: bytes of what was made.
        """
        counted = [pace for pace in self._paces if pace.unit == "bytes"]
        read = sum(pace.counted for pace in counted)
        return run_summary(seconds, read=read, read_seconds=sum(pace.seconds for pace in counted), written=written)

    def _end(self) -> None:
        if self._task is not None:
            self.progress.stop_task(self._task)

    def _print(self, text: str) -> None:
        if not self.silent:
            self.progress.console.print(text, highlight=False, soft_wrap=not self.progress.console.is_terminal)


def make_table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """An empty table whose first `left` columns are text and never shortened, the others right-aligned figures."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    return table
