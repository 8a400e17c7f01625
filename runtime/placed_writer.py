"""Safetensors files written in any order, by several processes, and again after a crash.

Every tensor's place is known before the first byte. The files get their headers and their full size at once; what is
written into them later needs no order, and writing it again changes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.file_hashes import hash_files
from hif4c.runtime.safetensors_layout import TensorSpec, index_name, index_text, plan_files, tensor_bytes
from hif4c.runtime.safetensors_stream import check_free_space, write_error

__all__ = ["PlacedWriter"]

_PIECE_BYTES = 4 << 20


class _Place(NamedTuple):
    path: Path
    offset: int
    spec: TensorSpec


class PlacedWriter:
    """The files of a `StreamingWriter`, byte for byte, whose tensors may come in any order and more than once.

    One process calls `create`; the others, and one that goes on after a crash, call `open`. When all tensors are
    written, by whomever, one process calls `finish`. Used as a context manager it closes its files at the end; files
    are removed by nobody but a `create` that fails.

    Args:
        directory: an existing directory.
        tensors: every tensor of the files, in order.
        base_name: as for `StreamingWriter`, likewise the rest.
        shard_bytes: the most bytes of data in one file, except that a larger tensor gets a file of its own.
        metadata: at most one key.
    """

    def __init__(
        self,
        directory: Path | str,
        tensors: Iterable[TensorSpec],
        *,
        base_name: str = "weights",
        shard_bytes: int = 4_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._base_name = base_name
        self._plan = plan_files(tensors, base_name, shard_bytes, metadata)
        self._places: dict[str, _Place] = {}
        for file in self._plan:
            offset = len(file.header)
            for spec in file.specs:
                self._places[spec.name] = _Place(self._directory / file.name, offset, spec)
                offset += spec.nbytes
        self._files: dict[Path, int] = {}
        # Of what this process wrote without a gap from the beginning; `finish` reads the rest.
        self._hashed = {
            self._directory / file.name: (hashlib.sha256(file.header), len(file.header)) for file in self._plan
        }
        self._dirty: set[Path] = set()
        self._left = {name: place.spec.nbytes for name, place in self._places.items()}

    def create(self) -> None:
        """Make the files, with their headers, and reserve the space of all tensors.

        Raises:
            Hif4Error: a file exists, or the disk is too full; nothing stays then.
        """
        check_free_space(self._directory, sum(file.nbytes for file in self._plan))
        made: list[Path] = []
        path = self._directory
        try:
            for file in self._plan:
                path = self._directory / file.name
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                made.append(path)
                _reserve(self._files[path], file.nbytes)
                _write_at(self._files[path], memoryview(file.header), 0)
                os.fsync(self._files[path])
        except OSError as error:
            self.close()
            for item in made:
                item.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise Hif4Error(f"{path}: already exists; choose another output directory or remove it.") from error
            raise write_error(path, sum(self._left.values()), error) from error

    def open(self) -> None:
        """Open files that `create` made.

        Raises:
            Hif4Error: a file is missing, or has another header or size.
        """
        for file in self._plan:
            path = self._directory / file.name
            try:
                self._files[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                size, header = os.fstat(self._files[path]).st_size, os.pread(self._files[path], len(file.header), 0)
            except OSError as error:
                self.close()
                raise Hif4Error(f"{path}: cannot be opened ({error.strerror}); remove it and begin again.") from error
            if size != file.nbytes or header != file.header:
                self.close()
                raise Hif4Error(f"{path}: was begun for other tensors than these; remove it and begin again.")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor at its place.

        Raises:
            ValueError: the files have no such tensor, or it is of another dtype or shape.
            Hif4Error: writing failed.
        """
        place = self._places.get(name)
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        if place is None or place.spec != found:
            raise ValueError(f"expected {'no such tensor' if place is None else place.spec}, got {found}")
        data = tensor_bytes(tensor)
        digest, end = self._hashed[place.path]
        if data and place.offset < end:
            digest, end = hashlib.sha256(), 0  # written again: all of it is read at the end
        try:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                _write_at(self._files[place.path], piece, place.offset + start)
                if place.offset + start == end:
                    digest.update(piece)
                    end += len(piece)
        except OSError as error:
            self._hashed[place.path] = hashlib.sha256(), 0
            raise write_error(place.path, sum(self._left.values()), error) from error
        self._hashed[place.path] = digest, end
        self._left[name] = 0
        self._dirty.add(place.path)

    def sync(self) -> None:
        """Wait until what was written is on the disk, and let the system forget it.

        Raises:
            Hif4Error: writing failed.
        """
        for path in sorted(self._dirty):
            try:
                os.fdatasync(self._files[path])
            except OSError as error:
                raise write_error(path, sum(self._left.values()), error) from error
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty.clear()

    def finish(self) -> dict[str, tuple[int, str]]:
        """File name -> (bytes, sha256), in order; where there are several shards their index is written as well.

        Raises:
            Hif4Error: writing failed.
        """
        self.sync()
        if len(self._plan) > 1:
            path = self._directory / index_name(self._base_name)
            try:
                path.write_text(index_text(self._plan), encoding="utf-8")
            except OSError as error:
                raise write_error(path, 0, error) from error
            self._hashed[path] = hashlib.sha256(), 0
        return {path.name: entry for path, entry in hash_files(self._hashed).items()}

    def close(self) -> None:
        """Close the files, as they are."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._dirty.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and where the system can, its space on the disk."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
