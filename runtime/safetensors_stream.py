"""Safetensors files written as a stream and read through a memory map.

The writer knows every tensor's name, dtype and shape before the first byte, so it writes headers first and then appends
data: memory stays constant whatever the file's size, and equal inputs give equal bytes. The reader believes nothing in
a header until it has been checked against the file.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data without holes).
"""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_layout import (
    DTYPE_NAMES,
    DTYPES,
    TensorSpec,
    index_name,
    index_text,
    is_tensor_name,
    plan_files,
    shortened,
    tensor_bytes,
)

__all__ = [
    "DTYPE_NAMES",
    "StreamingWriter",
    "TensorFile",
    "TensorSpec",
    "check_free_space",
    "tensor_bytes",
    "write_error",
]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_DIMS = 16
_CHUNK_BYTES = 16 << 20
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.13 on


class StreamingWriter:
    """Writes the given tensors, in the given order, as one safetensors file or as shards with an index.

    Used as a context manager it closes at the end, and on an exception it removes every file that it made. A wrong call
    (order, name, dtype, shape, or closing early) raises ValueError; a full disk and the like raise Hif4Error. `files`
    maps the name of each complete file to its size in bytes and its sha256.

    Args:
        directory: an existing directory. Existing files are never overwritten.
        tensors: every tensor that will be written, in order.
        base_name: `BASE.safetensors`, or `BASE-00001-of-0000N.safetensors` and `BASE.safetensors.index.json`.
        shard_bytes: the most bytes of data in one file, except that a larger tensor gets a file of its own.
        metadata: at most one key, because several would not keep their order in other writers and readers.
        fsync: force each file to the disk when it is complete.
    """

    def __init__(
        self,
        directory: Path | str,
        tensors: Iterable[TensorSpec],
        *,
        base_name: str = "weights",
        shard_bytes: int = 4_000_000_000,
        metadata: Mapping[str, str] | None = None,
        fsync: bool = False,
    ) -> None:
        self._directory = Path(directory)
        self._base_name = base_name
        self._fsync = fsync
        self._plan = plan_files(tensors, base_name, shard_bytes, metadata)
        self._left = sum(spec.nbytes for file in self._plan for spec in file.specs)
        self._queue = iter([(index, spec) for index, file in enumerate(self._plan) for spec in file.specs])
        self._next: tuple[int, TensorSpec] | None = next(self._queue)
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._made: list[Path] = []
        self._closed = False
        self.files: dict[str, tuple[int, str]] = {}
        check_free_space(self._directory, self._left)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the list."""
        if self._closed or self._next is None:
            raise ValueError(f"tensor {name} after the last one of the list")
        shard, spec = self._next
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        if found != spec:
            raise ValueError(f"expected {spec}, got {found}")
        if self._file is None:
            self._begin_file(self._plan[shard].name, self._plan[shard].header)
        self._append(tensor_bytes(tensor))
        self._left -= spec.nbytes
        self._next = next(self._queue, None)
        if self._next is None or self._next[0] != shard:
            self._end_file()

    def close(self) -> None:
        """Finish; raises ValueError when tensors of the list are missing, and then removes what was written."""
        if self._next is not None:
            self.abort()
            raise ValueError(f"closed before tensor {self._next[1].name} was written")
        if len(self._plan) > 1 and not self._closed:
            self._begin_file(index_name(self._base_name), index_text(self._plan).encode())
            self._end_file()
        self._closed = True

    def abort(self) -> None:
        """Remove every file made so far."""
        self._closed = True
        if self._file is not None:
            self._file.close()
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made.clear()
        self.files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin_file(self, name: str, header: bytes) -> None:
        path = self._directory / name
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - stays open across calls
        except FileExistsError as error:
            raise Hif4Error(f"{path}: already exists; choose another output directory or remove it.") from error
        except OSError as error:
            raise write_error(path, self._left, error) from error
        self._made.append(path)
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._append(memoryview(header))

    def _append(self, data: memoryview) -> None:
        assert self._file is not None
        self._size += len(data)
        while data:
            try:
                written = self._file.write(data[:_CHUNK_BYTES])
            except OSError as error:
                raise write_error(self._made[-1], self._left, error) from error
            self._sha256.update(data[:written])
            data = data[written:]

    def _end_file(self) -> None:
        assert self._file is not None
        path = self._made[-1]
        try:
            if self._fsync:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise write_error(path, self._left, error) from error
        self._file = None
        self.files[path.name] = (self._size, self._sha256.hexdigest())


def check_free_space(directory: Path, needed: int) -> None:
    """Raise Hif4Error unless so many bytes can be written into a directory."""
    try:
        usage = shutil.disk_usage(directory)
    except OSError as error:
        raise Hif4Error(f"{directory}: cannot write there ({error.strerror}).") from error
    # Some network file systems report no size at all; writing then finds out.
    if usage.total and usage.free < needed:
        raise Hif4Error(
            f"{directory}: {needed} bytes are needed and {usage.free} are free; "
            "free some space or choose another output directory."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_error(path: Path, left: int, error: OSError) -> Hif4Error:
    """What to raise when a weight file cannot be written, with so many bytes of weights to go."""
    return Hif4Error(
        f"{path}: writing failed ({error.strerror}) with {left} bytes of weights still to be written; "
        "free some space or choose another output directory."
    )


class TensorFile:
    """One safetensors file, memory-mapped after its header has been checked against the file.

    `read` gives views of the map, not copies: treat them as read-only. (Writing to one changes private pages of this
    process, never the file.) Views stay valid after `close`; the map goes when the last of them does. `metadata` is the
    header's own, unchecked but for its being text.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self._entries, self._data_start = self._parse(file)
                # Private and writable: torch takes it without a copy and without its warning on read-only buffers.
                # NORESERVE: else a file larger than the memory could be refused, as if it were all to be written.
                flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                self._map = mmap.mmap(file.fileno(), self._size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise Hif4Error(f"{self.path}: cannot be read ({error.strerror}).") from error

    @property
    def names(self) -> list[str]:
        """Tensor names in the order of the data."""
        return list(self._entries)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The tensor's dtype and shape."""
        spec, _ = self._entry(name)
        return spec.dtype, spec.shape

    def read(self, name: str) -> torch.Tensor:
        """The tensor, as a view of the map; copied only when its offset in the file is not aligned to its dtype."""
        spec, offset = self._entry(name)
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if (start := self._data_start + offset) % spec.dtype.itemsize:
            copy = bytearray(self._map[start : start + spec.nbytes])
            return torch.frombuffer(copy, dtype=spec.dtype).view(spec.shape)
        flat = torch.frombuffer(self._map, dtype=spec.dtype, count=math.prod(spec.shape), offset=start)
        return flat.view(spec.shape)

    def release(self, name: str) -> None:
        """Let the system take back the pages of this tensor; a view of it stays valid and reads them again if used."""
        spec, offset = self._entry(name)
        if spec.nbytes:
            start = (self._data_start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, self._data_start + offset + spec.nbytes - start)

    def prefetch(self, name: str) -> None:
        """Let the system begin to read a tensor from the disk."""
        self._advise(name, "POSIX_FADV_WILLNEED")

    def forget(self, name: str) -> None:
        """Let the system drop a tensor that was released from its cache, where no other process has it mapped."""
        self._advise(name, "POSIX_FADV_DONTNEED")

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data."""
        return self._entry(name)[0].nbytes

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's data begin in the file, and their bytes."""
        spec, offset = self._entry(name)
        return self._data_start + offset, spec.nbytes

    def close(self) -> None:
        """Give up the map; tensors read from it keep it alive."""
        self._entries = {}
        # Dropped, not closed: torch keeps the map alive but would not stop it from being closed under a tensor.
        vars(self).pop("_map", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _advise(self, name: str, advice: str) -> None:
        spec, offset = self._entry(name)
        if not spec.nbytes or not hasattr(os, "posix_fadvise"):
            return
        # Advice only: a file that is gone by now is still mapped.
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, self._data_start + offset, spec.nbytes, getattr(os, advice))
            finally:
                os.close(descriptor)

    def _entry(self, name: str) -> tuple[TensorSpec, int]:
        try:
            return self._entries[name]
        except KeyError:
            raise Hif4Error(f"{self.path}: holds no tensor named {name!r}.") from None

    def _parse(self, file: BinaryIO) -> tuple[dict[str, tuple[TensorSpec, int]], int]:
        if self._size < 8:
            raise self._bad(f"is truncated: {self._size} bytes, where a safetensors file has at least 8")
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise self._bad(f"is not a safetensors file: its header length reads {length}")
        if 8 + length > self._size:
            raise self._bad(f"is truncated: {8 + length - self._size} bytes of its header are missing")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"has a header that is not valid JSON ({str(error)[:100]})") from error
        if not isinstance(header, dict):
            raise self._bad("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad("has a __metadata__ that does not map strings to strings")
        self.metadata = metadata
        entries = sorted((self._parse_entry(name, entry) for name, entry in header.items()), key=lambda e: e[1:])
        position = 0
        for spec, begin, end in entries:
            if begin != position:
                what = "overlap with" if begin < position else "leave a hole before"
                raise self._bad(f"has tensors that {what} {shortened(spec.name)}")
            position = end
        data_start = 8 + length
        if data_start + position > self._size:
            raise self._bad(f"is truncated: {data_start + position - self._size} bytes are missing")
        if data_start + position < self._size:
            raise self._bad(f"has {self._size - data_start - position} bytes after its last tensor")
        return {spec.name: (spec, begin) for spec, begin, _ in entries}, data_start

    def _parse_entry(self, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
        where = f"tensor {shortened(name)}"
        if not is_tensor_name(name):
            raise self._bad(f"has a tensor name of {len(name)} characters or with unprintable ones: {shortened(name)}")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"has a header entry for {where} without exactly dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise self._bad(f"stores {where} as {shortened(entry['dtype'])}, which is none of {', '.join(DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_sizes(shape) or len(shape) > _MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise self._bad(f"has an invalid shape for {where}: {shortened(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"has invalid data_offsets for {where}: {shortened(offsets)}")
        spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(shape))
        if spec.nbytes != offsets[1] - offsets[0]:
            raise self._bad(f"gives {where} data_offsets {offsets} where its shape and dtype need {spec.nbytes} bytes")
        return spec, offsets[0], offsets[1]

    def _bad(self, what: str) -> Hif4Error:
        return Hif4Error(f"{self.path}: {what}; the file is damaged or incomplete, fetch it again.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shortened(twice)} twice")
    return result


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
