"""sha256 of files of many gigabytes: several at once, with bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["hash_file", "hash_files"]

_BUFFER_BYTES = 4 << 20


def hash_file(path: Path, digest: _Hash | None = None, start: int = 0) -> tuple[int, str]:
    """Size in bytes and sha256 of a file, which the system then need not keep in memory.

    Args:
        path: the file.
        digest: of its first bytes, not changed; None for none.
        start: how many these are.

    Raises:
        Hif4Error: it cannot be read.
    """
    digest, size = hashlib.sha256() if digest is None else digest.copy(), start
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > start:
                buffer = memoryview(bytearray(_BUFFER_BYTES))
                file.seek(start)
                _advise(file.fileno(), "POSIX_FADV_SEQUENTIAL")
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    size += count
            _advise(file.fileno(), "POSIX_FADV_DONTNEED")
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from error
    return size, digest.hexdigest()


def hash_files(paths: Iterable[Path] | Mapping[Path, tuple[_Hash, int]]) -> dict[Path, tuple[int, str]]:
    """`hash_file` of every path, in their order, several at once on the cores that there are.

    A mapping gives for every path the digest of its first bytes, and how many these are.
    """
    known = paths if isinstance(paths, Mapping) else dict.fromkeys(paths, (None, 0))
    with ThreadPoolExecutor(max(1, min(len(known), os.cpu_count() or 1))) as pool:
        return dict(zip(known, pool.map(lambda path: hash_file(path, *known[path]), known), strict=True))


def _advise(descriptor: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, getattr(os, advice))
