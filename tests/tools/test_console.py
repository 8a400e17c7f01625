"""What long commands show while they run."""

import io
import re

import pytest
from rich.console import Console

from hif4c.tools import console as module
from hif4c.tools.console import Reporter, progress_bar
from hif4c.tools.progress import LogLines, Pace, make_progress, run_summary


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(module, "Pace", lambda total, unit: Pace(total, unit, found))
    return found


@pytest.fixture
def screen(monkeypatch):
    """What is printed on stderr; call it with a width for a terminal."""

    def make(width=None):
        stream = io.StringIO()
        terminal = width is not None
        monkeypatch.setattr(
            module, "errors", Console(file=stream, width=width or 80, force_terminal=terminal, color_system=None)
        )
        return stream

    return make


def work(pace, clock, amounts, seconds):
    for amount in amounts:
        clock.now += seconds
        pace.advance(amount)


def test_an_estimate_after_the_first_block():
    clock = Clock()
    pace = Pace(40e9, "bytes", clock)
    assert pace.seconds_left is None
    work(pace, clock, [0.5e9], 1.0)
    assert pace.seconds_left is None
    work(pace, clock, [0.5e9], 1.0)
    assert pace.seconds_left == pytest.approx(39e9 / 0.5e9)
    clock.now += 3  # it goes down while nothing is reported
    assert pace.seconds_left == pytest.approx(75)
    clock.now += 1000
    assert pace.seconds_left == 0


def test_the_estimate_follows_a_changed_speed():
    """Half of the weight is lost over a tenth of the work: after three tenths an eighth of it is the old speed's."""
    clock = Clock()
    pace = Pace(100, "pieces", clock)
    work(pace, clock, [1] * 50, 1.0)
    work(pace, clock, [1] * 30, 2.0)
    assert 1.8 < 1 / pace.speed < 2.0
    # One slow piece among many is smoothed: it is a fourteenth of the weight (1 - 0.5 ** 0.1).
    work(pace, clock, [1], 8.0)
    assert 1 / pace.speed < 2.5


def test_a_pause_between_steps_is_no_work(clock, screen):
    screen()
    with Reporter.open() as report:
        report("step", "hardening transformer")
        report("total", 100e9)
        report("unit", "bytes")
        for _ in range(10):
            clock.now += 1
            report("bytes", 1e9)
        before = report._paces[-1].seconds_left
        assert before == pytest.approx(90)
        report("step", "hardening transformer_2")
        clock.now += 500
        report("bytes", 1e9)
        assert report._paces[-1].seconds_left == pytest.approx(before - 1)
        # Nor is what happens before the next bar begins.
        report("step", "capturing")
        clock.now += 500
        report("step", "packing")
        report("total", 10)
        clock.now += 1
        report("bytes", 1)
        assert report._paces[-1].seconds_left == pytest.approx(9)


def test_what_an_earlier_run_did_is_no_speed():
    clock = Clock()
    pace = Pace(40e9, "bytes", clock)
    pace.skip(30e9)
    assert pace.seconds_left is None
    work(pace, clock, [1e9], 2.0)
    assert pace.seconds_left == pytest.approx(9 * 2.0)
    assert pace.counted == 1e9
    assert pace.line() == "78 %, 31.0 of 40.0 GB, 500 MB/s, about 18 s left"


def test_a_line_of_each_unit():
    clock = Clock()
    pieces = Pace(80, "pieces", clock)
    work(pieces, clock, [1] * 8, 1.0)
    assert pieces.line() == "10 %, 8 of 80, about 1 min 12 s left"
    share = Pace(3e7, "share", clock)
    work(share, clock, [3e7], 12.0)
    assert share.line() == "100 %, in 12 s"
    unknown = Pace(None, "bytes", clock)
    work(unknown, clock, [2e6], 2.0)
    assert unknown.line() == "2.0 MB, 1.0 MB/s"
    small = Pace(2e9, "bytes", clock)
    work(small, clock, [150e6], 1.0)
    assert small.amount_text() == "150 MB of 2.0 GB"


def test_a_log_gets_a_line_for_every_tenth(clock, screen):
    stream = screen()
    with Reporter.open() as report:
        report("step", "packing transformer")
        report("total", 28.6e9)
        report("unit", "bytes")
        for _ in range(400):
            clock.now += 0.25
            report("bytes", 28.6e9 / 400)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  packing transformer"
    assert lines[1] == "    packing transformer: 10 %, 2.9 of 28.6 GB, 286 MB/s, about 1 min 30 s left"
    assert [re.search(r"(\d+) %", line).group(1) for line in lines[1:]] == [str(10 * n) for n in range(1, 11)]
    assert lines[-1].endswith("100 %, 28.6 of 28.6 GB, 286 MB/s, in 1 min 40 s")


def test_a_log_of_a_slow_step_and_of_a_quick_one(clock, screen):
    stream = screen()
    with Reporter.open() as report:
        report("step", "quick")
        report("total", 10)
        for _ in range(10):
            clock.now += 0.1
            report("bytes", 1)
        report("step", "slow")
        report("total", 1000)
        for _ in range(10):
            clock.now += 10
            report("bytes", 1)
    assert [line.strip().split(",")[0] for line in stream.getvalue().splitlines()] == [
        "quick", "slow", "slow: 0 %", "slow: 1 %", "slow: 1 %",
    ]  # fmt: skip


def test_a_late_line_does_not_make_the_others_late():
    clock = Clock()
    pace = Pace(100, "pieces", clock)
    lines = LogLines(pace)
    due = []
    for amount, seconds in ((17, 3), (5, 3), (8, 3), (9, 3), (1, 1), (1, 1), (59, 0.1)):
        work(pace, clock, [amount], seconds)
        due.append(lines.due())
    # At 17, 22, 30, 39, 40, 41 and, however soon, 100 %.
    assert due == [True, True, True, False, True, False, True]


@pytest.mark.parametrize(("width", "shown"), [(40, "50 %"), (70, "5.0 of 10.0 GB"), (120, "1.0 GB/s")])
def test_bars_fit_their_terminal(clock, screen, width, shown):
    stream = screen(width)
    with Reporter.open() as report:
        report("step", "rounding transformer_2 on its calibration calls (GPTQ)")
        report("total", 10e9)
        report("unit", "bytes")
        for _ in range(5):
            clock.now += 1
            report("bytes", 1e9)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()[-1]
    assert shown in last
    assert "5.0 s left" in last
    assert last.strip(" ⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏").startswith("rounding")
    assert len(last) <= width


def test_a_silent_reporter(clock, screen):
    for width in (None, 80):
        stream = screen(width)
        with Reporter.open(silent=True) as report:
            report("step", "packing")
            report("total", 10e9)
            report("unit", "bytes")
            report("note", "words")
            clock.now += 100
            report("bytes", 10e9)
        assert stream.getvalue() == ""
        assert "read 10.0 GB at 100 MB/s" in report.summary(100)


def test_names_are_not_markup(clock, screen):
    stream = screen()
    with Reporter.open() as report:
        report("step", "packing a[bold]b")
        report("total", 1)
        clock.now += 10
        report("bytes", 1)
    assert stream.getvalue() == "  packing a[bold]b\n    packing a[bold]b: 100 %, 1 of 1, in 10 s\n"


def test_an_unknown_unit():
    with Reporter.open(silent=True) as report:
        report("total", 1)
        with pytest.raises(ValueError, match="'tokens' is no unit"):
            report("unit", "tokens")


def test_bytes_without_a_bar_are_nothing():
    with Reporter.open(silent=True) as report:
        report("bytes", 1)
        report("step", "sampling")
    assert "read" not in report.summary(1)


def test_a_bar_of_ones_own(clock, screen):
    stream = screen()
    with progress_bar("hashing", 2e9, "bytes") as advance:
        clock.now += 4
        advance(2e9)
    assert stream.getvalue() == "    hashing: 100 %, 2.0 of 2.0 GB, 500 MB/s, in 4.0 s\n"


def test_the_summary(clock, screen):
    """Two steps of bytes and one of pieces; what was skipped was not read."""
    screen()
    with Reporter.open() as report:
        for total, unit, seconds, skipped in ((10e9, "bytes", 10, 0), (80, "pieces", 7, 0), (20e9, "bytes", 20, 5e9)):
            clock.now += 3
            report("total", total)
            report("unit", unit)
            report("skipped", skipped)
            clock.now += seconds
            report("bytes", total - skipped)
    found = report.summary(252, 8.44e9)
    assert re.fullmatch(r"in 4 min 12 s, peak memory [\d.]+ [MG]B, read 25\.0 GB at 833 MB/s, wrote 8\.4 GB", found), (
        found
    )
    assert run_summary(10, written=5e9).endswith("wrote 5.0 GB at 500 MB/s")


def test_no_bar_without_a_terminal():
    assert make_progress(Console(file=io.StringIO(), force_terminal=False)).disable
    assert not make_progress(Console(file=io.StringIO(), force_terminal=True)).disable
