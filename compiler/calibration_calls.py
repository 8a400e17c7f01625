"""Recorded calls of the experts: which of them are kept, and the files that they wait in until they are calibrated on.

What is kept depends on a call's own place and on the seed alone, not on the order in which calls come or on the rank
that meets them: each call has a priority, and the lowest are kept (bottom-k sampling; Cohen and Kaplan, PODC 2007).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec

__all__ = ["ARGUMENTS", "Call", "LowestCalls", "Place", "StoredCalls", "derive_seed", "write_tensors"]

ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")
"""What a transformer is called with, in the order of its parameters and of the captured program."""

Place = tuple[int, ...]
"""Where a call lies in the order of all calls of its expert: number of the batch, number within it."""

_ONE_FILE = 1 << 62


@dataclass(frozen=True)
class Call:
    """One call of an expert.

    Attributes:
        hidden_states: latents [B, C, F, H, W].
        timestep: [B], or [B, tokens] for a model with expanded timesteps; one noise level for the whole batch.
        encoder_hidden_states: text embeddings [B, text, D].
    """

    hidden_states: torch.Tensor
    timestep: torch.Tensor
    encoder_hidden_states: torch.Tensor

    @property
    def noise_level(self) -> float:
        """The timestep, 0 to 1000; of expanded timesteps the largest, as first-frame tokens have 0."""
        return float(self.timestep.max())

    def first(self, count: int) -> Call:
        """The first clips of the batch."""
        return Call(self.hidden_states[:count], self.timestep[:count], self.encoder_hidden_states[:count])

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order of the captured program."""
        return self.hidden_states, self.timestep.float(), self.encoder_hidden_states


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^63 for one random choice, independent of those for other parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file, `path` with the suffix .safetensors; raises Hif4Error for a full disk."""
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    with StreamingWriter(path.parent, specs, base_name=path.stem, shard_bytes=_ONE_FILE) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


class StoredCalls(Sequence[Call]):
    """The calls of an expert in their order; each is a file that is mapped when the call is asked for."""

    def __init__(self, folder: Path, expert: str, places: Sequence[Place] = ()) -> None:
        self._folder, self._expert = folder, expert
        self._places = sorted(places)
        self._open: dict[int, TensorFile] = {}

    @property
    def places(self) -> list[Place]:
        """Of all calls, ascending."""
        return list(self._places)

    def write(self, place: Place, call: Call) -> None:
        """Keep a call in a file, whether or not its place is among the places here."""
        # The pipeline expands one timestep over the batch, with strides of 0.
        tensors = {name: getattr(call, name).clone(memory_format=torch.contiguous_format) for name in ARGUMENTS}
        write_tensors(self._path(place), tensors)

    def remove(self, place: Place) -> None:
        """Give up the file of a call."""
        self._path(place).unlink()

    def _path(self, place: Place) -> Path:
        return self._folder / f"{self._expert}-{'-'.join(map(str, place))}.safetensors"

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        if number not in self._open:
            self._open[number] = TensorFile(self._path(self._places[number]))
        file = self._open[number]
        return Call(*(file.read(name) for name in ARGUMENTS))

    def release(self, index: int) -> None:
        """Give the memory of a call back to the system; its tensors stay valid and are read again if they are used."""
        for name in ARGUMENTS:
            self._open[index].release(name)

    def __iter__(self) -> Iterator[Call]:
        return (self[number] for number in range(len(self)))


class LowestCalls:
    """Some of the calls of a module: each has the same chance to be kept, however many there will be and wherever.

    Args:
        folder: the calls' files; every rank must see it.
        expert: name of the module.
        limit: calls to keep.
        seed: of the choice.
    """

    def __init__(self, folder: Path, expert: str, limit: int, seed: int) -> None:
        self._folder, self._expert, self._limit, self._seed = folder, expert, limit, seed
        self._files = StoredCalls(folder, expert)
        self._kept: list[tuple[int, Place]] = []  # a heap whose first entry has the highest priority number, negated
        self._batch = self._number = 0

    def begin(self, batch: int) -> None:
        """The calls that follow are those of a batch of prompts."""
        self._batch, self._number = batch, 0

    def hook(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before the module is."""
        place = (self._batch, self._number)
        self._number += 1
        entry = (-derive_seed(self._seed, self._expert, *place), place)
        if len(self._kept) == self._limit:
            if entry < self._kept[0]:
                return
            given_up = heapq.heapreplace(self._kept, entry)
            self._files.remove(given_up[1])
        else:
            heapq.heappush(self._kept, entry)
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        self._files.write(place, Call(*(given[key] for key in ARGUMENTS)))

    def chosen(self, ranks: Ranks = ALONE) -> StoredCalls:
        """Those with the lowest priorities over all ranks; the files of the others are removed."""
        everywhere = sorted((entry for kept in ranks.all_gather(self._kept) for entry in kept), reverse=True)
        places = {place for _, place in everywhere[: self._limit]}
        for _, place in self._kept:
            if place not in places:
                self._files.remove(place)
        return StoredCalls(self._folder, self._expert, list(places))
