"""What a disk gives and takes by itself: the yardstick for everything that reads or writes a whole model."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hif4c.runtime.errors import Hif4Error

__all__ = ["DiskRates", "cached_bytes", "drop_cached", "measure_disk"]

BLOCK = 16 << 20
READ_LIMIT, WRITE_LIMIT = 4 << 30, 2 << 30


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second in blocks of 16 MiB, one after the other, by one thread. None where the system has no such way.

    Attributes:
        read_direct: without the page cache (O_DIRECT).
        read: through the page cache, after the files' pages were dropped from it, as `dd` reads.
        write_direct: without the page cache, forced to the disk at the end.
        read_bytes: how much was read for a figure.
        written_bytes: how much was written.
    """

    read_direct: float | None
    read: float
    write_direct: float | None
    read_bytes: int
    written_bytes: int


def measure_disk(files: Sequence[Path], folder: Path) -> DiskRates:
    """Read these files from their beginnings, 4 GiB at the most, and write 2 GiB into a file that is removed again.

    Raises:
        Hif4Error: the folder cannot be written.
    """
    drop_cached(files)
    direct, count = _read(files, getattr(os, "O_DIRECT", None))
    drop_cached(files)
    buffered, count = _read(files, 0)
    drop_cached(files)
    written, size = _write(folder)
    assert buffered is not None
    return DiskRates(direct, buffered, written, count, size)


def drop_cached(files: Sequence[Path]) -> None:
    """Have the system forget the cached pages of these files; those that are not on the disk yet are written first."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(files: Sequence[Path]) -> int | None:
    """Bytes of these files in the page cache; None where the system does not say."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    total = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as view:
            pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            if mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) != 0:
                return None
            total += min(size, mmap.PAGESIZE * sum(page & 1 for page in bytes(pages)))
    return total


def _read(files: Sequence[Path], flag: int | None) -> tuple[float | None, int]:
    """(bytes a second, bytes)."""
    if flag is None:
        return None, 0
    total = 0
    started = time.perf_counter()
    # A map is aligned to pages, as reading without the page cache demands.
    with mmap.mmap(-1, BLOCK) as buffer:
        for path in files:
            try:
                descriptor = os.open(path, os.O_RDONLY | flag)
            except OSError as error:
                if flag and error.errno == errno.EINVAL:  # a file system without it
                    return None, 0
                raise
            try:
                while total < READ_LIMIT and (count := os.readv(descriptor, [buffer])):
                    total += count
            finally:
                os.close(descriptor)
    return total / (time.perf_counter() - started), total


def _write(folder: Path) -> tuple[float | None, int]:
    if not hasattr(os, "O_DIRECT"):
        return None, 0
    size = min(WRITE_LIMIT, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize // 4) // BLOCK * BLOCK
    try:
        descriptor, name = tempfile.mkstemp(dir=folder)
    except OSError as error:
        raise Hif4Error(f"{folder}: cannot be written ({error.strerror}).") from None
    os.close(descriptor)
    try:
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None, 0
            raise
        try:
            with mmap.mmap(-1, BLOCK) as buffer:
                buffer.write(os.urandom(BLOCK))
                started = time.perf_counter()
                for _ in range(size // BLOCK):
                    os.writev(descriptor, [buffer])
                os.fsync(descriptor)
                return size / (time.perf_counter() - started), size
        finally:
            os.close(descriptor)
    finally:
        os.unlink(name)
