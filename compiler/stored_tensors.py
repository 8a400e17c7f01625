"""What an expert's weight files hold: tensors by name, from the files' headers alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DTYPE_NAMES
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["StoredTensors"]


class StoredTensors:
    """The tensors of an expert, over all shards, in the order of the files.

    Attributes:
        files: the open files by the path that the manifest gives them.

    Raises:
        Hif4Error: a file is damaged, two of them hold the same tensor, or a tensor that was asked for is in none.
    """

    def __init__(self, artifact: Artifact, expert: str) -> None:
        artifact.expert(expert)
        self._where = artifact.root / expert
        self.files = {
            relative: TensorFile(artifact.path(relative))
            for relative in artifact.files
            if relative.startswith(f"{expert}/") and relative.endswith(".safetensors")
        }
        self._places: dict[str, TensorFile] = {}
        for file in self.files.values():
            for name in file.names:
                if name in self._places:
                    raise Hif4Error(f"{file.path}: holds {name}, as {self._places[name].path} does; compile it again.")
                self._places[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def place(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        if name not in self._places:
            raise Hif4Error(f"{self._where}: no file holds {name!r}, which the program reads; copy the artifact again.")
        return self._places[name]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, as stored."""
        return self.place(name).info(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data."""
        return self.place(name).nbytes(name)

    def describe(self, name: str) -> str:
        """A tensor for people, what is short first, as in "bfloat16[32], 64 bytes, proj_out.bias"."""
        dtype, shape = self.info(name)
        return f"{DTYPE_NAMES.get(dtype, dtype)}[{', '.join(map(str, shape))}], {self.nbytes(name):,} bytes, {name}"
