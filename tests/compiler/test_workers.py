import threading
import time

import pytest
import torch

from hif4c.compiler.workers import in_order


def test_results_are_in_the_order_of_the_items():
    def slow_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    assert list(in_order(slow_first, range(20), threads=4)) == [item * item for item in range(20)]


def test_several_work_at_once_with_one_thread_of_torch_each():
    meeting = threading.Barrier(3, timeout=60)  # breaks where fewer than three are at work at the same time

    def work(item: int) -> int:
        meeting.wait()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert list(in_order(work, range(3), threads=3)) == [1, 1, 1]
    assert torch.get_num_threads() == before
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]  # threads that begin afterwards


def test_what_is_begun_stays_within_the_budget():
    begun: list[int] = []
    results = in_order(lambda item: item, (begun.append(item) or item for item in range(6)), lambda item: 3, budget=7)
    assert next(results) == 0
    assert begun == [0, 1, 2]  # the third waits for the first's memory
    assert next(results) == 1
    assert begun == [0, 1, 2, 3]
    assert list(results) == [2, 3, 4, 5]


def test_an_item_beyond_the_budget_is_worked_on_alone():
    assert list(in_order(lambda item: item, [1, 2, 3], lambda item: 100, budget=7)) == [1, 2, 3]


def test_a_failure_comes_at_its_turn_and_ends_the_work():
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("no")
        return item

    results = in_order(work, range(1000), lambda item: 1, budget=4, threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no"):
        next(results)


def test_leaving_early_ends_the_work():
    before, threads, seen = torch.get_num_threads(), threading.active_count(), []
    results = in_order(lambda item: seen.append(item), range(1000), lambda item: 1, budget=4, threads=2)
    next(results)
    results.close()
    assert len(seen) <= 5
    assert (torch.get_num_threads(), threading.active_count()) == (before, threads)
