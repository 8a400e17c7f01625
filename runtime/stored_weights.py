"""An expert's stored tensors: views of its memory-mapped files, whose memory can be given back at any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DTYPES, InputType
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["StoredWeights"]

# A stored dtype that is narrower than the program's but converts to it exactly.
_EXACT = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)}


class StoredWeights(Mapping[str, torch.Tensor]):
    """Tensors by name. They are read from the disk when they are touched, and are not to be written to.

    Those that the program computes with in a wider dtype than they are stored in are converted at once and held (of an
    expert of A14B 117 MB of 8.4 GB).

    Args:
        paths: safetensors files.
        wanted: what the program reads.
        where: what to call the expert in errors.

    Raises:
        Hif4Error: a tensor is missing, left over, or of another shape or dtype than the program states.
    """

    def __init__(self, paths: Iterable[Path], wanted: list[InputType], where: Path) -> None:
        files = [TensorFile(path) for path in paths]
        self._places = {name: file for file in files for name in file.names}
        names = {item.name for item in wanted}
        if names != self._places.keys():
            odd = sorted(names ^ self._places.keys())
            raise Hif4Error(f"{where}: program and weights disagree about {', '.join(odd[:3])}.")
        self._tensors: dict[str, torch.Tensor] = {}
        for item in wanted:
            self._tensors[item.name] = self._read(item)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeights:
        """Itself: nobody writes to the files' maps."""
        return self

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give back the memory of these tensors, or of all; views of them stay valid and read the file again."""
        for name in self if names is None else names:
            self._places[name].release(name)

    def _read(self, item: InputType) -> torch.Tensor:
        file = self._places[item.name]
        stored, shape = file.info(item.name)
        dtype = DTYPES[item.type.dtype]
        if shape != item.type.shape or (stored != dtype and (stored, dtype) not in _EXACT):
            raise Hif4Error(f"{file.path}: {item.name} is {stored} {list(shape)}, but the program reads {item.type}.")
        tensor = file.read(item.name)
        if stored == dtype:
            return tensor
        converted = tensor.to(dtype)
        file.release(item.name)
        return converted
