"""Independent pieces of work on all cores, their results in order, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["BUDGET", "in_order"]

BUDGET = 1 << 29
"""Bytes that the pieces that are worked on, and results that wait, may take together."""

_READERS = 1
"""Threads beyond the cores: while one waits for the disk, the others compute."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    cost: Callable[[_Item], int] = lambda item: 0,
    *,
    budget: int = BUDGET,
    threads: int | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Generator[_Result, None, None]:
    """function(item) of every item, in the items' order, several at once.

    Within `function` torch works with one thread, whatever the number of cores: sums are then taken in one order, and
    the results have the same bits on every machine of a kind.

    Args:
        function: called in other threads, by several at a time; what it raises is raised here at its turn.
        items: taken as they are begun.
        cost: bytes that an item takes from its beginning until the result after its own is asked for.
        budget: items are begun while their costs are within it, and one in any case.
        threads: how many at once; None: as many as torch would use, and one for the disk.
        stop: called when no more results are wanted, before the pieces that are worked on are waited for.
    """
    before = torch.get_num_threads()
    waiting: deque[tuple[Future[_Result], int]] = deque()
    used = 0
    # In a new thread torch uses the last number that any thread set; the one that set it before keeps its own.
    with ThreadPoolExecutor(threads or before + _READERS, "hif4c", lambda: torch.set_num_threads(1)) as pool:
        try:
            for item in items:
                needed = cost(item)
                while waiting and used + needed > budget:
                    yield waiting[0][0].result()
                    used -= waiting.popleft()[1]
                waiting.append((pool.submit(function, item), needed))
                used += needed
            while waiting:
                yield waiting[0][0].result()
                waiting.popleft()
        finally:
            stop()
            for future, _ in waiting:
                future.cancel()
            torch.set_num_threads(before)
