"""Timings for comparisons: everything takes turns, so that a busy machine slows each alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "describe_machine", "take_turns"]


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took."""

    median: float
    minimum: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of at least one run."""
        return cls(statistics.median(seconds), min(seconds), len(seconds))


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    seconds: float = 0.0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time calls round by round, each once a round.

    Args:
        calls: name -> call; each is run once before it is timed.
        repetitions: rounds, at least.
        seconds: how long to go on with further rounds.
        on_round: called after every round.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < repetitions or time.perf_counter() < until:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - started)
        rounds += 1
        on_round()
    return {name: Timing.of(values) for name, values in took.items()}


def describe_machine(kernels: str) -> dict[str, Any]:
    """What a timing depends on: processor, how many of them this process may use, load, torch, kernels."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "processors": usable,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "kernels": kernels,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
