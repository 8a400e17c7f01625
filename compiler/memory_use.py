"""The memory that a process took at its peak."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_rss"]


def peak_rss() -> int | None:
    """The most resident memory, in bytes, that this process or one of its finished child processes had at a time.

    Pages of mapped files count while they are resident. Processes are not added up: a parent that waits for a child
    counts for itself. None where the system does not say (Windows).
    """
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return max(_own_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, child)


def _own_peak() -> int | None:
    """Linux: the high-water mark of this program's own memory; `ru_maxrss` begins with that of whoever started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
