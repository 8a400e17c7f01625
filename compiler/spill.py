"""Values that wait between two segments of a program: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_layout import tensor_bytes

__all__ = ["WaitingValues", "addresses"]


@dataclass(eq=False)
class _File:
    """One storage on the disk."""

    path: Path
    nbytes: int

    def map(self) -> torch.Tensor:
        """Its bytes, mapped privately: they are read as they are used, and leave memory with the tensor."""
        return torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)


@dataclass(frozen=True)
class _View:
    """A tensor whose storage is in a file."""

    file: _File
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Sample:
    """What waits of one sample.

    Attributes:
        values: number of the value -> tensor, `_View`, size, or lists of these.
        resident: bytes that count against the budget.
        mapped: the files that values were read from while the sample is taken, with their storages there. The
            references are weak: what is no longer used leaves memory, and no other storage is taken for it.
    """

    values: dict[int, Any] = field(default_factory=dict)
    resident: int = 0
    mapped: list[tuple[StorageWeakRef, _File]] = field(default_factory=list)


class WaitingValues:
    """The values of every sample while another sample is run; a context manager that leaves no file behind.

    Whole storages are kept, so that values which share one still do, with the strides that they had: what is computed
    from them is the same to the bit. A value that was written once stays in its file until nothing needs it.

    Args:
        count: of samples.
        folder: existing, for the files; None: everything stays in memory.
        memory: bytes of values that stay in memory.
        device: where values are put when they are taken from a file.
    """

    def __init__(self, count: int, folder: Path | None, memory: int, device: torch.device) -> None:
        self._samples = [_Sample() for _ in range(count)]
        self._parent, self._memory, self._device = folder, memory, device
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._resident = 0
        self._written = 0

    def keep(self, number: int, values: Mapping[int, Any], elsewhere: Collection[int] = ()) -> None:
        """Let the values of a sample wait; those that it had before and has no more are forgotten.

        Args:
            number: of the sample.
            values: number of the value -> tensor, size, or (nested) list or tuple of these.
            elsewhere: addresses of storages that stay in memory anyway, which costs nothing here.
        """
        sample = self._samples[number]
        places = {found.cdata: file for found, file in sample.mapped}
        known = set(places)
        for tensor in _tensors(values.values()):
            storage = tensor.untyped_storage()
            if storage._cdata in known or storage.data_ptr() in elsewhere:
                continue
            known.add(storage._cdata)
            if self._parent is None or self._resident + storage.nbytes() <= self._memory:
                sample.resident += storage.nbytes()
                self._resident += storage.nbytes()
            else:
                places[storage._cdata] = self._write(storage)
        sample.values = {index: _replaced(value, places) for index, value in values.items()}
        needed = {view.file for view in _views(sample.values.values())}
        for _, file in sample.mapped:
            if file not in needed:
                file.path.unlink()
        sample.mapped = []

    def take(self, number: int) -> dict[int, Any]:
        """The values of a sample, which wait no more: `keep` those that are still needed."""
        sample = self._samples[number]
        self._resident -= sample.resident
        sample.resident = 0
        values, opened = self._restored(sample.values)
        sample.values = {}
        sample.mapped = [(StorageWeakRef(tensor.untyped_storage()), file) for file, tensor in opened.items()]
        return values

    def look(self, number: int, index: int) -> Any:
        """One value of a sample, which goes on waiting."""
        found, _ = self._restored({0: self._samples[number].values[index]})
        return found[0]

    def _restored(self, values: Mapping[int, Any]) -> tuple[dict[int, Any], dict[_File, torch.Tensor]]:
        opened: dict[_File, torch.Tensor] = {}
        return {index: self._restore(value, opened) for index, value in values.items()}, opened

    def _restore(self, value: Any, opened: dict[_File, torch.Tensor]) -> Any:
        if isinstance(value, _View):
            if value.file not in opened:
                opened[value.file] = value.file.map().to(self._device)
            storage = opened[value.file].untyped_storage()
            empty = torch.empty(0, dtype=value.dtype, device=self._device)
            return empty.set_(storage, value.offset, value.size, value.stride)
        if isinstance(value, (list, tuple)):
            return type(value)(self._restore(item, opened) for item in value)
        return value

    def _write(self, storage: torch.UntypedStorage) -> _File:
        assert self._parent is not None
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="values-", dir=self._parent)
            file = _File(Path(self._folder.name) / str(self._written), storage.nbytes())
            self._written += 1
            data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
            # Left in the page cache, from which the system takes it back when it needs to: it is soon read again.
            file.path.write_bytes(tensor_bytes(data))
        except OSError as error:
            raise Hif4Error(
                f"{self._parent}: writing {storage.nbytes()} bytes of intermediate values failed ({error.strerror}); "
                "free some space there or use fewer samples."
            ) from error
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._samples.clear()
        if self._folder is not None:
            self._folder.cleanup()


def addresses(values: Iterable[Any]) -> set[int]:
    """Where the storages of the tensors among the values, or in lists among them, begin."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(values)}


def _replaced(value: Any, places: Mapping[int, _File]) -> Any:
    """The value with a `_View` for every tensor whose storage has a file."""
    if isinstance(value, torch.Tensor):
        file = places.get(value.untyped_storage()._cdata)
        if file is None:
            return value
        return _View(file, value.dtype, tuple(value.shape), value.stride(), int(value.storage_offset()))
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, places) for item in value)
    return value


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _views(values: Iterable[Any]) -> Iterator[_View]:
    for value in values:
        if isinstance(value, _View):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _views(value)
