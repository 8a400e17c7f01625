"""What a long run has finished, kept on the disk: a later one goes on from there, and ranks share what is left."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["Entry", "Journal", "is_disk_full", "run_on_first", "sync_path", "sync_tree", "write_durably"]

T = TypeVar("T")
log = logging.getLogger(__name__)
KEY = "hif4c_journal"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Entry:
    """One finished piece of work.

    Attributes:
        values: anything that JSON holds; floats come back bit for bit.
        tensors: name -> tensor.
    """

    values: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Journal:
    """Finished pieces of work by key, each in a file of its own that is there whole or not at all.

    Args:
        folder: existing; None for a journal in memory, for work that nobody goes on with.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[str, Entry] = {}

    def done(self, key: str) -> Entry | None:
        """What was recorded of a piece, None where it has not been finished."""
        if self._folder is None:
            return self._memory.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with TensorFile(path) as file:
                return Entry(json.loads(file.metadata[KEY]), {name: file.read(name).clone() for name in file.names})
        except (Hif4Error, KeyError, ValueError):
            # Entries are whole when they get their name; a disk may still lose one, and the piece is done again.
            log.warning("%s: cannot be read; this piece of work is done again", path)
            return None

    def record(self, key: str, values: Any = None, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Record a finished piece; it stays so whatever happens to this process or machine.

        Args:
            key: a relative path of plain names.
            values: anything that JSON holds.
            tensors: on the CPU.
        """
        kept = {name: value.contiguous() for name, value in (tensors or {}).items()}
        if self._folder is None:
            self._memory[key] = Entry(values, kept)
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save(kept, metadata={KEY: json.dumps(values)}))

    def complete(
        self, keys: Sequence[str], work: Callable[[list[str]], None], ranks: Ranks = ALONE
    ) -> dict[str, Entry]:
        """Have every piece of work done, those that are left shared out over the ranks; every rank calls this.

        Args:
            keys: of all pieces, the same on every rank.
            work: does the pieces of the given keys, which may be none, and records each.
            ranks: who shares the work.

        Returns:
            Every key's entry, in the order of the keys, on every rank.

        Raises:
            Hif4Error: a rank failed.
        """
        ranks.all_agree(None)
        found: dict[str, Entry] = {}
        if ranks.first:
            found = {key: entry for key in keys if (entry := self.done(key)) is not None}
        # What the first rank sees holds for all: a network file system may show files to others later.
        found = ranks.all_gather(found)[0]
        mine = ranks.share([key for key in keys if key not in found])
        with ranks.together():
            work(mine)
        for part in ranks.all_gather({key: self.done(key) for key in mine}):
            found |= part
        return {key: found[key] for key in keys}

    def keys(self, prefix: str) -> list[str]:
        """The keys of all finished pieces below `prefix`/."""
        if self._folder is None:
            return sorted(key for key in self._memory if key.startswith(f"{prefix}/"))
        paths = (self._folder / prefix).rglob(f"*{SUFFIX}")
        return sorted(path.relative_to(self._folder).as_posix().removesuffix(SUFFIX) for path in paths)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}{SUFFIX}"


def run_on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Let rank 0 do something while the others wait; what it returns is returned on all.

    Raises:
        Hif4Error: it failed.
    """
    result: T | None = None
    with ranks.together():
        if ranks.first:
            result = work()
    found: T = ranks.all_gather(result)[0]
    return found


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a disk has no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even when the machine stops."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync_tree(root: Path) -> None:
    """Wait until every file below a folder is on the disk, names and all."""
    for folder, _, files in os.walk(root):
        for name in files:
            sync_path(Path(folder, name))
        sync_path(Path(folder))


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
