"""Directories that appear under their name only when they are complete; some can be continued after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.disk_space import partial_directory_of
from hif4c.compiler.journal import Journal, is_disk_full, run_on_first, sync_path, sync_tree, write_durably
from hif4c.compiler.ranks import ALONE, PeerError, Ranks
from hif4c.runtime.artifact import canonical_json
from hif4c.runtime.errors import Hif4Error

__all__ = ["Unfinished", "UnpublishedError", "partial_directory", "staged_directory"]

INPUTS = "inputs.json"
"""What a partial directory is made from. Written last when it is made and removed first when it goes: without this file
there is nothing in it to continue."""


@contextlib.contextmanager
def staged_directory(target: Path, doing: str) -> Iterator[Path]:
    """A directory beside the target, to be filled and renamed away; what is left of it is removed at the end.

    Parents of the target that had to be made are removed as well when nothing was put there.

    Args:
        target: the final name; must not exist.
        doing: what the caller does, for errors ("compiling").

    Raises:
        Hif4Error: the target exists, or reading or writing failed.
    """
    _refuse_existing(target)
    made = _missing_parents(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
    except OSError as error:
        raise Hif4Error(f"{target.parent}: cannot be written ({error.strerror}).") from None
    try:
        yield staging
    except OSError as error:
        raise _failed(error, target, doing) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


class UnpublishedError(Hif4Error):
    """What is finished cannot get its name now; nothing is wrong with it."""


@dataclass(frozen=True)
class Unfinished:
    """A directory in the making that a later process can continue.

    Attributes:
        target: its final name.
        root: `.NAME.partial` beside the target; holds the rest.
        complete: it has its final name already: an earlier process was killed before it could remove the rest.
    """

    target: Path
    root: Path
    complete: bool = False

    @property
    def artifact(self) -> Path:
        """What will get the final name."""
        return self.root / "artifact"

    @property
    def scratch(self) -> Path:
        """For files that are not part of the result."""
        return self.root / "scratch"

    @property
    def journal(self) -> Journal:
        """What is finished."""
        return Journal(self.root / "journal")

    def publish(self) -> None:
        """Give the artifact its final name, all of it on the disk.

        Raises:
            UnpublishedError: that is impossible.
        """
        sync_tree(self.artifact)
        if os.path.lexists(self.target):
            raise UnpublishedError(f"{self.target}: has appeared meanwhile; remove it and continue with --resume.")
        try:
            os.rename(self.artifact, self.target)
        except OSError as error:
            raise UnpublishedError(
                f"{self.target}: what is finished cannot be moved there ({error.strerror}); continue with --resume."
            ) from error
        sync_path(self.target.parent)


@contextlib.contextmanager
def partial_directory(
    target: Path,
    inputs: dict[str, Any],
    *,
    resume: bool = False,
    accept: Callable[[dict[str, Any], Journal], None] = lambda before, journal: None,
    say: Callable[[str], None] = lambda sentence: None,
    ranks: Ranks = ALONE,
) -> Iterator[Unfinished]:
    """`.NAME.partial` beside the target NAME, locked, to be filled and published; every rank calls this.

    It stays when the process is killed or interrupted, a disk is full or the name is taken meanwhile, and goes on every
    other error and at the end.
    The lock goes with the process, however that ends.

    Args:
        target: the final name; must not exist.
        inputs: what the result depends on, as JSON.
        resume: continue what an earlier process has left.
        accept: called with the inputs and the journal of what is continued; raises Hif4Error where they do not fit.
        say: told in a sentence what is kept and how to continue it.
        ranks: who share the work; all must see the directory.

    Raises:
        Hif4Error: the target exists, another process works on it, something is left of an earlier one and `resume` was
            not asked for, the inputs are others, or reading or writing failed.
    """
    root = partial_directory_of(target)
    made = _missing_parents(target) if ranks.first else []
    lock: list[int] = []

    def claim() -> bool:
        lock.append(_lock(root, target))
        return _claim(Unfinished(target, root), inputs, resume, accept)

    try:
        unfinished = Unfinished(target, root, run_on_first(ranks, claim))
        with ranks.together():
            if not root.is_dir():
                raise Hif4Error(f"{root}: rank {ranks.rank} does not see it; all ranks need one file system.")
    except BaseException:
        _remove_empty(made)
        for descriptor in lock:
            os.close(descriptor)
        raise
    try:
        yield unfinished
        if ranks.first:
            _remove(root)
    except BaseException as error:
        if _can_continue(error):
            if not isinstance(error, PeerError) and ranks.first:
                say(f"what is finished is kept in {root}; the same command with --resume continues it")
        else:
            _remove(root)
        if isinstance(error, OSError):
            raise _failed(error, target, "compiling") from error
        raise
    finally:
        for descriptor in lock:
            os.close(descriptor)
        _remove_empty(made)


def _lock(root: Path, target: Path) -> int:
    """Make the directory if need be and lock it; returns the descriptor that holds the lock."""
    if not root.is_dir():
        _refuse_existing(target)
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Hif4Error(f"{target.parent}: cannot be written ({error.strerror}).") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed it meanwhile.
        if not root.exists() or not os.path.samestat(os.fstat(descriptor), root.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise Hif4Error(f"{target}: another process is making it; wait for that one, or choose another name.") from None
    except OSError as error:
        os.close(descriptor)
        raise Hif4Error(
            f"{root}: cannot be locked ({error.strerror}); choose a folder on a file system that has locks."
        ) from None
    return descriptor


def _claim(
    unfinished: Unfinished,
    inputs: dict[str, Any],
    resume: bool,
    accept: Callable[[dict[str, Any], Journal], None],
) -> bool:
    """Prepare the locked directory; returns whether what it was for is complete."""
    target, root = unfinished.target, unfinished.root
    before = _read_inputs(root / INPUTS)
    renamed = not unfinished.artifact.exists()
    if os.path.lexists(target):
        if not renamed:
            _refuse_existing(target)
        if not resume:
            raise Hif4Error(f"{target}: is complete; the same command with --resume removes what is left in {root}.")
        if before is not None:
            accept(before, unfinished.journal)
        return True
    if before is not None and not renamed:
        if not resume:
            raise Hif4Error(
                f"{root}: an unfinished compile of {target.name} is there; continue it with --resume, or remove it."
            )
        accept(before, unfinished.journal)
    else:
        _empty(root)  # nothing was begun, or all of it was moved away
    try:
        for folder in (unfinished.artifact, unfinished.scratch, root / "journal"):
            folder.mkdir(exist_ok=True)
        if before != inputs:
            write_durably(root / INPUTS, canonical_json(inputs))
    except OSError as error:
        if before is None:
            _remove(root)
        raise _failed(error, target, "compiling") from error
    return False


def _read_inputs(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Hif4Error(f"{path}: cannot be read ({error}); remove the folder and begin again.") from None
    return found if isinstance(found, dict) else None


def _can_continue(error: BaseException) -> bool:
    """Whether the same work may succeed later: it was interrupted, or something filled up."""
    # What ended another rank is for that rank to judge.
    kept = PeerError | MemoryError | UnpublishedError
    return not isinstance(error, Exception) or isinstance(error, kept) or is_disk_full(error)


def _failed(error: OSError, target: Path, doing: str) -> Hif4Error:
    return Hif4Error(f"{error.filename or target}: reading or writing failed while {doing} ({error.strerror}).")


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise Hif4Error(f"{target}: already exists; choose another name, or remove it first.")


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing was put there


def _remove(root: Path) -> None:
    _empty(root)
    with contextlib.suppress(OSError):
        root.rmdir()


def _empty(root: Path) -> None:
    """Remove what is in the directory, first what makes it one that can be continued."""
    with contextlib.suppress(OSError):
        (root / INPUTS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for path in list(root.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
