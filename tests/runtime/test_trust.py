"""The user's trust file: who may have written it, what it may hold, and writers at once."""

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from hif4c.runtime import trust
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.trust import TrustEntry, read_trust, record_trust, revoke_trust, trust_path, trusted_hashes

ONE, TWO = "1" * 64, "2" * 64
ENTRY = TrustEntry("cuda-sm80", "linear.cubin", "/models/tiny.hif4", "2026-01-02T03:04:05+00:00")


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a trust file that is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "hif4c" / "trust.json"


def test_nothing_is_trusted_at_first(path: Path):
    assert trust_path() == path
    assert trusted_hashes() == frozenset()
    assert revoke_trust([ONE]) == 0
    assert not path.exists()


def test_where_it_is_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert trust_path() == tmp_path / ".config" / "hif4c" / "trust.json"


def test_what_is_recorded_is_private_canonical_and_kept(path: Path):
    previous = os.umask(0)  # the modes must not depend on it
    try:
        record_trust({TWO: ENTRY, ONE: TrustEntry("cpu-x86-64-linux", "hif4_cpu.so", "/a")})
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    value = json.loads(path.read_bytes())
    assert path.read_text() == json.dumps(value, indent=2, sort_keys=True) + "\n"
    assert value[TWO] == {
        "target": "cuda-sm80", "file": "linear.cubin", "from": "/models/tiny.hif4", "when": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    assert value[ONE]["when"].endswith("+00:00")
    record_trust({TWO: TrustEntry("cuda-sm80", "linear.cubin", "/elsewhere")})
    assert read_trust()[TWO] == ENTRY  # where it was first seen
    assert revoke_trust([TWO, "3" * 64]) == 1
    assert trusted_hashes() == {ONE}
    assert sorted(item.name for item in path.parent.iterdir()) == ["trust.json", "trust.lock"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(path: Path, mode: int):
    record_trust({ONE: ENTRY})
    path.chmod(mode)
    for use in (trusted_hashes, lambda: record_trust({TWO: ENTRY}), lambda: revoke_trust([ONE])):
        with pytest.raises(Hif4Error, match=r"trust\.json: other users may write to it.*chmod go-w"):
            use()
    path.chmod(0o644)  # to read it is no harm
    assert trusted_hashes() == {ONE}


def test_a_directory_that_others_may_write_to_is_refused(path: Path):
    record_trust({ONE: ENTRY})
    path.parent.chmod(0o770)
    with pytest.raises(Hif4Error, match="hif4c: other users may write to it"):
        trusted_hashes()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_links_are_refused(path: Path, tmp_path: Path, what: str):
    record_trust({ONE: ENTRY})
    place = path if what == "file" else path.parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Hif4Error, match="delete it" if what == "file" else "is a link or belongs to another user"):
        trusted_hashes()


def test_what_belongs_to_someone_else_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    record_trust({ONE: ENTRY})
    other = os.geteuid() + 1
    monkeypatch.setattr(trust.os, "geteuid", lambda: other)
    with pytest.raises(Hif4Error, match="belongs to another user, so nothing is trusted"):
        trusted_hashes()


def test_a_pipe_or_a_directory_in_its_place_is_refused(path: Path):
    record_trust({ONE: ENTRY})
    path.unlink()
    os.mkfifo(path, 0o600)  # must not wait for a writer
    with pytest.raises(Hif4Error, match=r"trust\.json"):
        trusted_hashes()
    path.unlink()
    path.mkdir()
    with pytest.raises(Hif4Error, match=r"trust\.json"):
        trusted_hashes()


GOOD = {"target": "a", "file": "b", "from": "c", "when": "d"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000,
        json.dumps({"short": GOOD}).encode(),
        json.dumps({ONE.replace("1", "A"): GOOD}).encode(),
        json.dumps({ONE: []}).encode(),
        json.dumps({ONE: {**GOOD, "more": "e"}}).encode(),
        json.dumps({ONE: {**GOOD, "when": 1}}).encode(),
    ],
)  # fmt: skip
def test_garbage_trusts_nothing_and_is_not_overwritten(path: Path, content: bytes):
    record_trust({ONE: ENTRY})
    path.write_bytes(content)
    for use in (trusted_hashes, lambda: record_trust({TWO: ENTRY})):
        with pytest.raises(Hif4Error, match=r"is not a list of trusted files .*; delete it and trust again"):
            use()
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(Hif4Error, match=r"cannot be written .*set XDG_CONFIG_HOME"):
        record_trust({ONE: ENTRY})


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch):
    record_trust({ONE: ENTRY})
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trust.os, "replace", fail)
    with pytest.raises(Hif4Error, match="No space left"):
        record_trust({TWO: ENTRY})
    assert path.read_bytes() == before
    assert sorted(item.name for item in path.parent.iterdir()) == ["trust.json", "trust.lock"]


def _record_many(first: int) -> None:
    for number in range(first, first + 20):
        record_trust({f"{number:064x}": ENTRY})


def test_writers_at_once_lose_nothing():
    """Four processes; without the lock each would write back what it read before the others wrote."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_record_many, args=(first,)) for first in range(0, 80, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert trusted_hashes() == {f"{number:064x}" for number in range(80)}
