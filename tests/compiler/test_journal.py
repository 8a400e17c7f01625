import json

import pytest
import torch

from hif4c.compiler.journal import Journal, is_disk_full, run_on_first, write_durably
from hif4c.compiler.ranks import ALONE, PeerError
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks

FLOATS = [0.1, 1e-300, -0.0, float("inf"), 2.0**-1074]


@pytest.mark.parametrize("on_disk", [True, False])
def test_entries_come_back_bit_for_bit(tmp_path, on_disk):
    journal = Journal(tmp_path if on_disk else None)
    assert journal.done("choose/a/b.c") is None
    tensors = {"m": torch.randn(5, 3).T, "n": torch.arange(3, dtype=torch.uint8), "z": torch.zeros(0)}
    journal.record("choose/a/b.c", {"floats": FLOATS, "none": None}, tensors)
    journal.record("choose/a/empty")
    again = Journal(tmp_path) if on_disk else journal
    entry = again.done("choose/a/b.c")
    assert entry.values["none"] is None
    assert [value.hex() for value in entry.values["floats"]] == [value.hex() for value in FLOATS]
    assert entry.tensors.keys() == tensors.keys()
    assert all(torch.equal(entry.tensors[name], value) for name, value in tensors.items())
    assert again.done("choose/a/empty").values is None
    assert again.keys("choose") == ["choose/a/b.c", "choose/a/empty"]
    assert again.keys("pack") == []


def test_an_entry_is_there_whole_or_not_at_all(tmp_path, monkeypatch, caplog):
    """Under its name nothing appears before it is on the disk; what a disk has lost is not taken for an entry."""
    journal, seen = Journal(tmp_path), []
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append([path.name for path in tmp_path.iterdir()]))
    journal.record("a", [1])
    assert "a.safetensors" not in seen[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    data = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (b"", data[:-1], data[:20]):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        assert journal.done("a") is None
        assert "is done again" in caplog.text
        caplog.clear()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_is_left_is_done(tmp_path):
    journal, done = Journal(tmp_path), []

    def work(keys):
        for key in keys:
            done.append(key)
            journal.record(key, key.upper())
            if key == "c":
                raise Hif4Error("c is bad.")

    keys = ["a", "b", "c", "d"]
    journal.record("b", "kept")
    with pytest.raises(Hif4Error, match="c is bad"):
        journal.complete(keys, work)
    assert done == ["a", "c"]
    entries = journal.complete(keys, work)
    assert done == ["a", "c", "d"]
    assert [(key, entry.values) for key, entry in entries.items()] == [
        ("a", "A"), ("b", "kept"), ("c", "C"), ("d", "D"),
    ]  # fmt: skip


@pytest.mark.parametrize("on_disk", [True, False])
def test_ranks_share_what_is_left(tmp_path, on_disk):
    """And all get all of it; a journal in memory knows only its own rank's entries."""
    keys = [f"key{number}" for number in range(5)]
    if on_disk:
        Journal(tmp_path).record("key1", ["before"], {"t": torch.ones(1)})

    def work(ranks):
        journal, mine = Journal(tmp_path if on_disk else None), []

        def make(shared):
            for key in shared:
                mine.append(key)
                journal.record(key, [ranks.rank], {"t": torch.full((2,), float(ranks.rank))})

        entries = journal.complete(keys, make, ranks)
        return mine, {key: (entry.values, entry.tensors["t"].tolist()) for key, entry in entries.items()}

    (first, entries), (second, same) = in_ranks(2, work)
    assert entries == same
    assert list(entries) == keys
    left = [key for key in keys if not (on_disk and key == "key1")]
    assert (first, second) == (left[::2], left[1::2])
    for key in left:
        assert entries[key] == ([int(key in second)], [float(key in second)] * 2)
    if on_disk:
        assert entries["key1"] == (["before"], [1.0])


def test_a_failing_rank_ends_all(tmp_path):
    def work(ranks):
        def make(keys):
            if ranks.rank == 1:
                raise Hif4Error("the weight is bad.")

        return Journal(tmp_path).complete(["a", "b"], make, ranks)

    first, second = in_ranks(2, work)
    assert isinstance(first, PeerError)
    assert str(first) == "rank 1 failed: the weight is bad."
    assert str(second) == "the weight is bad."


def test_one_rank_does_it_for_all():
    assert run_on_first(ALONE, lambda: 3) == 3
    assert in_ranks(2, lambda ranks: run_on_first(ranks, lambda: 10 + ranks.rank)) == [10, 10]

    def fail(ranks):
        return run_on_first(ranks, lambda: json.loads("{"))

    first, second = in_ranks(2, fail)
    assert isinstance(first, json.JSONDecodeError)
    assert isinstance(second, PeerError)


def test_full_disks_are_known_behind_what_they_caused():
    full = Hif4Error("writing failed")
    full.__cause__ = OSError(28, "No space left on device")
    assert is_disk_full(full)
    assert is_disk_full(OSError(122, "Disk quota exceeded"))
    assert not is_disk_full(OSError(5, "I/O error"))
    assert not is_disk_full(Hif4Error("No space left on device"))
