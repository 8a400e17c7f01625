"""How far a long step is: its pace, what is left of it, and how that is shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from hif4c.compiler.amounts import format_bytes, format_seconds
from hif4c.compiler.memory_use import peak_rss

__all__ = ["UNITS", "LogLines", "Pace", "make_progress", "run_summary"]

UNITS = ("bytes", "pieces", "share")
"""What a step counts: bytes and pieces are shown as such, of a share only its percentage."""
FIRST_SHARE = 0.02
"""An estimate is shown when this much is done: of forty blocks of a model the first is 2.5 %."""
MEMORY = 0.1
"""Share of the work over which an older speed loses half of its weight."""
LOG_LEAST, LOG_SECONDS = 2.0, 30.0
"""Without a terminal: a line every tenth, but not within LOG_LEAST seconds of the last, and one after LOG_SECONDS."""
WIDE, MEDIUM = 100, 60
"""Columns of a terminal that have room for everything, and for all but the spinner, the speed and the time elapsed."""


@dataclass
class Pace:
    """What is done of a step, how fast it goes, and how long the rest takes.

    The speed is smoothed over the work, not over time: a tenth of the work ago counts half. A pause before the first
    piece or between two steps is no part of it.

    Attributes:
        total: amount of the whole step; None where nobody knows.
        unit: of `UNITS`.
        clock: seconds.
        done: amount so far.
        seconds: from the beginning to the last amount.
    """

    total: float | None
    unit: str = "pieces"
    clock: Callable[[], float] = time.perf_counter
    done: float = 0.0
    seconds: float = 0.0
    _begun: float = field(init=False)
    _last: float = field(init=False)
    _known: float = 0.0
    _paused: bool = False
    _amount: float = 0.0
    _time: float = 0.0

    def __post_init__(self) -> None:
        self._begun = self._last = self.clock()

    def skip(self, amount: float) -> None:
        """Count what was there before this run: it is done, and says nothing of the speed."""
        self.done += amount
        self._known += amount

    def pause(self) -> None:
        """Something else happens: how long the next amount takes says nothing of the speed."""
        self._paused = True

    def advance(self, amount: float) -> None:
        """Count an amount that was finished just now."""
        now = self.clock()
        if not self._paused:
            weight = 0.5 ** (amount / (MEMORY * self.total)) if self.total else 1.0
            self._amount = self._amount * weight + amount
            self._time = self._time * weight + now - self._last
        self.done += amount
        self.seconds, self._last, self._paused = now - self._begun, now, False

    @property
    def counted(self) -> float:
        """Amount of this run alone, without what was there before."""
        return self.done - self._known

    @property
    def share(self) -> float | None:
        """0 to 1; None where the total is not known."""
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def speed(self) -> float | None:
        """Amount a second, smoothed; None before anything is done."""
        return self._amount / self._time if self._time > 0 and self._amount > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Until the step is done, from now on; None before there is enough to go by."""
        speed = self.speed
        if not self.total or speed is None or self.counted < FIRST_SHARE * self.total:
            return None
        return max((self.total - self.done) / speed - (self.clock() - self._last), 0.0)

    def amount_text(self) -> str:
        """ "2.9 of 28.6 GB", "3 of 80", or "" for a share."""
        if self.unit == "share":
            return ""
        if self.total is None:
            return format_bytes(self.done) if self.unit == "bytes" else f"{self.done:,.0f}"
        if self.unit == "pieces":
            return f"{self.done:,.0f} of {self.total:,.0f}"
        done, total = format_bytes(self.done), format_bytes(self.total)
        # The unit once, where both have the same.
        return f"{done.removesuffix(total.partition(' ')[2]).rstrip()} of {total}"

    def speed_text(self) -> str:
        """ "0.9 GB/s" of bytes, else ""; of a finished step its mean."""
        speed = self.counted / self.seconds if self.share == 1 and self.seconds else self.speed
        return "" if self.unit != "bytes" or speed is None else f"{format_bytes(speed)}/s"

    def line(self) -> str:
        """All of it for a log: "10 %, 2.9 of 28.6 GB, 0.9 GB/s, about 29 s left"."""
        left, share = self.seconds_left, self.share
        parts = ["" if share is None else f"{share:.0%}".replace("%", " %"), self.amount_text(), self.speed_text()]
        if share is not None and share >= 1:
            parts.append(f"in {format_seconds(self.seconds)}")
        elif left is not None:
            parts.append(f"about {format_seconds(left)} left")
        return ", ".join(part for part in parts if part)


@dataclass
class LogLines:
    """When a step's progress is worth a line in a log."""

    pace: Pace
    _tenth: int = 0
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = self.pace.clock()

    def due(self) -> bool:
        """Whether a line should be written now; it is taken as written."""
        tenth, now = int(10 * (self.pace.share or 0.0) + 1e-6), self.pace.clock()
        further, quiet = tenth > self._tenth, now - self._at
        if tenth == 10:  # wanted however soon after another line, unless the whole step was over in no time
            due = further and self.pace.seconds >= LOG_LEAST
        else:
            due = (further and quiet >= LOG_LEAST) or quiet >= LOG_SECONDS
        if due:
            self._tenth, self._at = tenth, now
        return due


class _PaceColumn(ProgressColumn):
    """One figure of a task's pace."""

    def __init__(self, show: Callable[[Pace], str]) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self._show = show

    def render(self, task: Task) -> Text:
        return Text(self._show(task.fields["pace"]))


def _left(pace: Pace) -> str:
    left = pace.seconds_left
    return "" if left is None or pace.share == 1 else f"{format_seconds(left)} left"


def make_progress(console: Console) -> Progress:
    """The look of every progress bar; without a terminal there is none, see `LogLines`.

    A task is given its `Pace` as the field `pace`.
    """
    width = console.width
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis"))
    percentage = TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True))
    amount, speed, left = _PaceColumn(Pace.amount_text), _PaceColumn(Pace.speed_text), _PaceColumn(_left)
    columns: list[ProgressColumn]
    if width >= WIDE:
        bar = BarColumn(bar_width=24)
        columns = [SpinnerColumn(), name, bar, percentage, amount, speed, TimeElapsedColumn(), left]
    elif width >= MEDIUM:
        columns = [name, BarColumn(bar_width=10), percentage, amount, left]
    else:
        columns = [name, percentage, left]
    return Progress(*columns, console=console, disable=not console.is_terminal, expand=False)


def run_summary(
    seconds: float,
    *,
    read: float = 0,
    read_seconds: float | None = None,
    written: float = 0,
) -> str:
    """One line on a finished run: "in 4 min 12 s, peak memory 1.4 GB, read 28.6 GB at 0.9 GB/s, wrote 8.4 GB".

    Args:
        seconds: of the whole run.
        read: bytes of weights that went through it; 0 is not mentioned.
        read_seconds: of the steps that went through them, for their speed; None for the whole run.
        written: bytes of what was made; 0 is not mentioned. Has a speed where nothing was read.
    """
    peak = peak_rss()
    parts = [f"in {format_seconds(seconds)}"]
    if peak is not None:
        parts.append(f"peak memory {format_bytes(peak)}")
    if read:
        parts.append(f"read {_with_speed(read, seconds if read_seconds is None else read_seconds)}")
    if written:
        parts.append(f"wrote {format_bytes(written) if read else _with_speed(written, seconds)}")
    return ", ".join(parts)


def _with_speed(count: float, seconds: float) -> str:
    return f"{format_bytes(count)} at {format_bytes(count / seconds)}/s" if seconds > 0 else format_bytes(count)
