"""Ranks: what they add and gather, and that none waits for one that has failed."""

import os
import time

import pytest
import torch

from hif4c.compiler.ranks import ALONE, PeerError, start_ranks
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks


@pytest.fixture
def environment(monkeypatch):
    """Set torchrun's variables; what is not given is not there."""

    def put(**values):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_alone():
    tensor = torch.tensor([1, 2])
    assert ALONE.first
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.all_sum(tensor) is tensor
    assert ALONE.all_max(tensor) is tensor
    assert ALONE.all_gather("a") == ["a"]
    ALONE.barrier()
    ALONE.all_agree(None)
    with pytest.raises(ValueError, match="mine"), ALONE.together():
        raise ValueError("mine")


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_one_rank_of_torchrun_is_alone(environment, values):
    environment(**values)
    with start_ranks("cuda") as ranks:  # and asks for nothing of the device
        assert ranks is ALONE
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("values", "device", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "cpu", "RANK=x in the environment is no number; start the ranks with"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "cpu", "WORLD_SIZE=-2 in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", r"the ranks do not find each other \(.*MASTER_ADDR.*\); start them"),
    ],
)
def test_ranks_that_torchrun_did_not_start(environment, values, device, words):
    environment(**values)
    with pytest.raises(Hif4Error, match=words), start_ranks(device):
        pass


def test_more_ranks_than_gpus(environment, monkeypatch):
    environment(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    monkeypatch.setattr("hif4c.compiler.ranks.check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = "local rank 1: this machine has 1 GPUs; start at most one rank a GPU"
    with pytest.raises(Hif4Error, match=words), start_ranks("cuda:0"):
        pass


def test_three_ranks_add_gather_and_share():
    def work(ranks):
        tensor = torch.tensor([ranks.rank, 2**40 * ranks.rank])
        ranks.barrier()
        return {
            "rank": (ranks.rank, ranks.count, ranks.first, str(ranks.device)),
            "share": ranks.share(range(7)),
            "sum": ranks.all_sum(tensor).tolist(),
            "max": ranks.all_max(torch.tensor([1.5, -1.0]) * (1 - ranks.rank)).tolist(),
            "strided": ranks.all_sum(torch.arange(6, dtype=torch.int32).view(2, 3).T).tolist(),
            "gathered": [(name, value.tolist()) for name, value in ranks.all_gather((f"r{ranks.rank}", tensor))],
            "unchanged": tensor.tolist(),
        }

    found = in_ranks(3, work)
    for rank, values in enumerate(found):
        assert values == {
            "rank": (rank, 3, rank == 0, "cpu"),
            "share": [[0, 3, 6], [1, 4], [2, 5]][rank],
            "sum": [3, 3 * 2**40],
            "max": [1.5, 1.0],
            "strided": [[0, 9], [3, 12], [6, 15]],
            "gathered": [(f"r{other}", [other, 2**40 * other]) for other in range(3)],
            "unchanged": [rank, 2**40 * rank],
        }


def test_no_rank_waits_for_one_that_failed():
    """Rank 1 fails while the others are on their way to a collective call of the same block."""

    def work(ranks):
        said = []
        for own in (None, Hif4Error("the disk is full."), ValueError("of the second row")):
            try:
                with ranks.together():
                    if ranks.rank == 1 and isinstance(own, Hif4Error):
                        raise own
                    ranks.all_agree(own if ranks.rank == 1 else None)
                    ranks.barrier()
                said.append("done")
            except (Hif4Error, ValueError) as error:
                said.append((type(error).__name__, str(error)))
        return said

    first, second = in_ranks(2, work)
    assert second == ["done", ("Hif4Error", "the disk is full."), ("ValueError", "of the second row")]
    assert first == [
        "done",
        ("PeerError", "rank 1 failed: the disk is full."),
        ("PeerError", "rank 1 failed: of the second row"),
    ]


def test_a_rank_that_is_killed_ends_the_others():
    def work(ranks):
        ranks.barrier()
        if ranks.rank == 1:
            os._exit(9)
        time.sleep(0.2)
        try:
            ranks.all_sum(torch.ones(1))
        except PeerError as error:
            return str(error)

    first, second = in_ranks(2, work)
    assert first.startswith("rank 0 lost the others (")
    assert first.endswith("); see why the first of them ended.")
    assert isinstance(second, EOFError)
