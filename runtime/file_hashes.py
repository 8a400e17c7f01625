"""sha256 of files of many gigabytes: several at once, with bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hif4c.runtime.errors import Hif4Error

__all__ = ["hash_file", "hash_files"]

_BUFFER_BYTES = 4 << 20


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file, which the system then need not keep in memory.

    Raises:
        Hif4Error: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from error
    return size, digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[Path, tuple[int, str]]:
    """`hash_file` of every path, in their order, several at once on the cores that there are."""
    listed = list(paths)
    with ThreadPoolExecutor(max(1, min(len(listed), os.cpu_count() or 1))) as pool:
        return dict(zip(listed, pool.map(hash_file, listed), strict=True))
