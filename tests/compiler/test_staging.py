import errno
import multiprocessing
import os
import shutil
import signal

import pytest

from hif4c.compiler.ranks import PeerError
from hif4c.compiler.staging import UnpublishedError, partial_directory, staged_directory
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks

INPUTS = {"weights": [1, 2], "recipe": "rtn"}


def run(target, *, resume=False, inputs=INPUTS, **options):
    """One piece of work a call, until there are three and the directory is published."""
    with partial_directory(target, inputs, resume=resume, **options) as unfinished:
        if unfinished.complete:
            return "complete"
        count = len(list(unfinished.artifact.iterdir()))
        (unfinished.artifact / f"piece{count}").write_text("made")
        unfinished.journal.record(f"piece{count}")
        if count < 2:
            raise KeyboardInterrupt
        unfinished.publish()
    return "made"


def interrupted(target, **options):
    with pytest.raises(KeyboardInterrupt):
        run(target, **options)


def refusal(target, **options):
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(Hif4Error) as caught:
        run(target, **options)
    assert sorted(target.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_interrupted_is_continued(tmp_path):
    target, said = tmp_path / "new" / "out", []
    interrupted(target, say=said.append)
    partial = target.parent / ".out.partial"
    assert said == [f"what is finished is kept in {partial}; the same command with --resume continues it"]
    assert os.listdir(target.parent) == [".out.partial"]
    assert f"{partial}: an unfinished compile of out is there; continue it with --resume" in refusal(target)
    interrupted(target, resume=True)
    assert run(target, resume=True) == "made"
    assert os.listdir(target.parent) == ["out"]
    assert sorted(os.listdir(target)) == ["piece0", "piece1", "piece2"]
    for resume in (False, True):
        assert f"{target}: already exists" in refusal(target, resume=resume)


def test_inputs_are_compared_before_anything_is_touched(tmp_path):
    target, seen = tmp_path / "out", []
    interrupted(target)

    def accept(before, journal):
        seen.append((before, journal.keys(".")))
        if before["recipe"] != "rtn":
            raise Hif4Error("the recipe changed.")

    other = {**INPUTS, "weights": [3]}
    interrupted(target, resume=True, inputs=other, accept=accept)
    assert seen.pop() == (INPUTS, ["piece0"])
    # What was accepted is what the next one is compared with.
    assert run(target, resume=True, inputs=other, accept=lambda before, journal: seen.append(before)) == "made"
    assert seen == [other]
    interrupted(tmp_path / "second", inputs={"recipe": "best"})
    assert refusal(tmp_path / "second", resume=True, accept=accept) == "the recipe changed."


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt(), True),
        (SystemExit(143), True),
        (OSError(errno.ENOSPC, "No space left on device", "file"), True),
        (PeerError("rank 1 failed: something."), True),
        (UnpublishedError("it was killed."), True),
        (OSError(errno.EIO, "I/O error", "file"), False),
        (Hif4Error("the weight is bad."), False),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_kept_after_an_error(tmp_path, error, kept):
    target = tmp_path / "new" / "out"
    expected = Hif4Error if isinstance(error, OSError) else type(error)

    def fail():
        with partial_directory(target, INPUTS) as unfinished:
            (unfinished.artifact / "file").write_text("made")
            raise error

    with pytest.raises(expected) as caught:
        fail()
    assert target.parent.exists() == kept
    assert kept == (target.parent / ".out.partial" / "artifact" / "file").exists()
    if isinstance(error, OSError):
        assert str(caught.value) == f"file: reading or writing failed while compiling ({error.strerror})."


def killed(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("function", ["mkdir", "fsync", "replace", "rename", "unlink", "rmdir"])
def test_killed_at_every_change_of_the_directory(tmp_path, function, monkeypatch):
    """Before the first call of a function, then before the second, ...: the next run always ends well."""
    real, ended = getattr(os, function), False
    for number in range(100):
        target = tmp_path / str(number) / "out"
        target.parent.mkdir()
        left = [number]

        def stop(*arguments, left=left, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*arguments, **options)

        def work(target=target):
            setattr(os, function, stop)
            with partial_directory(target, INPUTS) as unfinished:
                (unfinished.artifact / "piece").write_text("made")
                unfinished.publish()
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(60)
        if process.exitcode == 0:
            ended = True
            break
        assert process.exitcode == -signal.SIGKILL
        with partial_directory(target, INPUTS, resume=True) as unfinished:
            if not unfinished.complete:
                (unfinished.artifact / "piece").write_text("made")
                unfinished.publish()
        assert os.listdir(target.parent) == ["out"]
        assert os.listdir(target) == ["piece"]
    assert ended
    assert number > 0


def test_a_second_process_is_refused(tmp_path):
    target = tmp_path / "out"
    with partial_directory(target, INPUTS):
        for resume in (False, True):
            assert f"{target}: another process is making it" in refusal(target, resume=resume)
    assert os.listdir(tmp_path) == []


def test_the_lock_goes_with_the_process(tmp_path):
    def work():
        with partial_directory(tmp_path / "out", INPUTS) as unfinished:
            (unfinished.artifact / "piece0").write_text("made")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    interrupted(tmp_path / "out", resume=True)
    assert sorted(os.listdir(tmp_path / ".out.partial" / "artifact")) == ["piece0", "piece1"]


def test_what_was_moved_away_is_begun_anew(tmp_path):
    """Killed after the artifact got its name, and the user has moved it before the next run."""
    target = tmp_path / "out"
    interrupted(target)
    (tmp_path / ".out.partial" / "artifact").rename(tmp_path / "elsewhere")
    interrupted(target, resume=True)
    assert os.listdir(tmp_path / ".out.partial" / "artifact") == ["piece0"]
    shutil.rmtree(tmp_path / "elsewhere")


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"

    def publish():
        with partial_directory(target, INPUTS) as unfinished:
            (unfinished.artifact / "file").write_text("made")
            target.mkdir()
            unfinished.publish()

    with pytest.raises(UnpublishedError, match="has appeared meanwhile; remove it and continue with --resume"):
        publish()
    assert os.listdir(target) == []
    target.rmdir()
    with partial_directory(target, INPUTS, resume=True) as unfinished:
        assert os.listdir(unfinished.artifact) == ["file"]  # hours may have gone into it
        unfinished.publish()
    assert os.listdir(tmp_path) == ["out"]


def test_ranks_use_one_directory(tmp_path):
    def work(ranks):
        with partial_directory(tmp_path / "out", INPUTS, ranks=ranks) as unfinished:
            (unfinished.artifact / f"rank{ranks.rank}").write_text("made")
            ranks.barrier()
            if ranks.first:
                unfinished.publish()
            ranks.barrier()
        return True

    assert in_ranks(2, work) == [True, True]
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["rank0", "rank1"]
    first, second = in_ranks(2, work)
    assert "already exists" in str(first)
    assert str(second) == f"rank 0 failed: {first}"


def test_ranks_that_do_not_see_it_are_told(tmp_path):
    def work(ranks):
        folder = tmp_path / str(ranks.rank)
        with partial_directory(folder / "out", INPUTS, ranks=ranks):
            return True

    first, second = in_ranks(2, work)
    assert "all ranks need one file system" in str(second)
    assert str(first) == f"rank 1 failed: {second}"


def test_a_directory_that_is_only_staged_leaves_nothing(tmp_path):
    with staged_directory(tmp_path / "a" / "out", "hardening") as staging:
        (staging / "file").write_text("x")
        os.rename(staging, tmp_path / "a" / "out")
    assert os.listdir(tmp_path / "a") == ["out"]
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "b" / "out", "hardening"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]
