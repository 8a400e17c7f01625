"""The calibration file: what is known of a model's activations, in one safetensors file that can be merged with others.

Its header holds a JSON object under `hif4c_calibration`: where the samples came from, and for every expert the weights'
fingerprint, the edges of the timestep bins and the groups. A group is one quantized input and the linears that read it;
it is named after the first of them. Tensors, for every expert E, group G and call C:

    E/groups/G/sketch.*   the group's ChannelSketch over all tokens, by timestep bin
    E/groups/G/rows       [R, K] bf16, some of the tokens, drawn evenly over the calls
    E/calls/C/*           inputs of the expert, and the output [B, C, F, H, W] of the unquantized program ("sample")
    E/texts/T             text embeddings [B, text, D] that calls refer to
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from hif4c.compiler.calibration_calls import Call
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.components import EXPERT_NAMES
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["KEY", "VERSION", "Calibration", "ExpertCalibration", "Group"]

KEY = "hif4c_calibration"
VERSION = 1


@dataclass(frozen=True)
class Group:
    """One quantized input.

    Attributes:
        readers: module paths of the linears that read it, in the program's order.
        channels: K.
    """

    readers: tuple[str, ...]
    channels: int

    @property
    def name(self) -> str:
        """The first reader's path."""
        return self.readers[0]


@dataclass(frozen=True)
class ExpertCalibration:
    """What the file holds of one expert; tensors are read when they are asked for.

    Attributes:
        name: "transformer" or "transformer_2".
        fingerprint: of the weights that were calibrated.
        edges: of the timestep bins, ascending; bin i is [edges[i], edges[i + 1]), the last one closed.
        groups: name -> group, in the program's order.
        texts: for every recorded call the number of its text embeddings.
    """

    name: str
    fingerprint: str
    edges: tuple[float, ...]
    groups: Mapping[str, Group]
    texts: tuple[int, ...]
    _file: TensorFile

    @property
    def call_count(self) -> int:
        """Recorded calls."""
        return len(self.texts)

    def group_of(self, path: str) -> str | None:
        """Name of the group that a linear reads, None where it was not calibrated."""
        return next((group.name for group in self.groups.values() if path in group.readers), None)

    def sketch(self, group: str) -> ChannelSketch:
        """The group's histograms.

        Raises:
            Hif4Error: the numbers in the file do not belong together.
        """
        prefix = f"{self.name}/groups/{group}/sketch."
        names = [key for key in self._file.names if key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): self._file.read(key) for key in names}
        sketch = ChannelSketch.from_tensors(tensors, f"{self._file.path}: {self.name}, {group}")
        del tensors
        for key in names:
            self._file.release(key)  # the sketch has its own counts
        if (sketch.channels, sketch.bins) != (self.groups[group].channels, len(self.edges) - 1):
            raise self._damaged(f"{group} has a sketch of {sketch.channels} channels and {sketch.bins} timestep bins")
        if not int(sketch.count().sum()):
            raise self._damaged(f"{group} has a sketch without a token")
        return sketch

    def rows(self, group: str) -> torch.Tensor:
        """Tokens [R, K] bf16 of the group's input, R >= 1.

        Raises:
            Hif4Error: a value that is not finite.
        """
        return self._finite(f"{self.name}/groups/{group}/rows")

    def calls(self) -> Iterator[tuple[Call, torch.Tensor]]:
        """The recorded calls with the unquantized program's output [B, C, F, H, W] bf16.

        Raises:
            Hif4Error: a value that is not finite.
        """
        for index, text in enumerate(self.texts):
            prefix = f"{self.name}/calls/{index}/"
            call = Call(
                self._finite(prefix + "hidden_states"),
                self._finite(prefix + "timestep"),
                self._finite(f"{self.name}/texts/{text}"),
            )
            yield call, self._finite(prefix + "sample")

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._file.read(name)
        if not bool(torch.isfinite(tensor).all()):
            raise self._damaged(f"{name} holds NaN or infinite values")
        return tensor

    def _damaged(self, what: str) -> Hif4Error:
        return Hif4Error(f"{self._file.path}: {what}; the file is damaged, make it again with `hif4c calibrate`.")


class Calibration:
    """An open calibration file; its header and the shapes of its tensors are checked, values when they are read.

    Use it as a context manager, or `close` it. `model` is what it was made of, `runs` what its calls were made from,
    and `experts` maps names to what was recorded of them.

    Args:
        path: file of `hif4c calibrate`.

    Raises:
        Hif4Error: not a calibration file, one of another version, or a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = TensorFile(self.path)
        text = self._file.metadata.get(KEY)
        if text is None:
            raise Hif4Error(f"{self.path}: is not a calibration file; make one with `hif4c calibrate`.")
        try:
            header = json.loads(text)
            if header["version"] != VERSION:
                found = header["version"]
                raise Hif4Error(f"{self.path}: has version {found!r}, this hif4c reads {VERSION}; calibrate again.")
            self.model: str = _typed(header["model"], str)
            self.runs: list[dict[str, Any]] = [_typed(run, dict) for run in _typed(header["runs"], list)]
            self.experts = {
                name: _parse_expert(name, entry, self._file) for name, entry in _typed(header["experts"], dict).items()
            }
            if not self.experts:
                raise ValueError("no expert")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Hif4Error(
                f"{self.path}: its header is damaged ({str(error)[:200]}); make it again with `hif4c calibrate`."
            ) from None

    def expert(self, name: str) -> ExpertCalibration:
        """One expert's part; raises Hif4Error when it was not calibrated."""
        if name not in self.experts:
            raise Hif4Error(
                f"{self.path}: {name} was not calibrated, only {', '.join(self.experts)}; calibrate this model."
            )
        return self.experts[name]

    def check(self, name: str, fingerprint: str) -> None:
        """Refuse (Hif4Error) a file that was made from other weights."""
        if self.expert(name).fingerprint != fingerprint:
            raise Hif4Error(
                f"{self.path}: was made from other weights than this {name} (of {self.model}); calibrate this model, "
                "with the same LoRAs."
            )

    @property
    def timesteps(self) -> list[float]:
        """The timesteps of all steps of the schedule that was sampled, of the first run that tells."""
        for run in self.runs:
            found = run.get("timesteps")
            if isinstance(found, list) and all(type(item) in (int, float) for item in found):
                return [float(item) for item in found]
        return []

    def digest(self) -> str:
        """sha256 of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Give up the map of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _parse_expert(name: str, entry: Any, file: TensorFile) -> ExpertCalibration:
    """Check what the header says of an expert against itself and against the tensors that there are (ValueError)."""
    if name not in EXPERT_NAMES:  # names of experts become names of files
        raise ValueError(f"{name!r} is not one of {', '.join(EXPERT_NAMES)}")
    edges = tuple(float(_typed(edge, int, float)) for edge in _typed(entry["edges"], list))
    if len(edges) < 2 or not all(map(math.isfinite, edges)) or list(edges) != sorted(set(edges)):
        raise ValueError(f"{name}: the edges of the timestep bins are not ascending")
    groups = [
        Group(tuple(_typed(path, str) for path in _typed(item["readers"], list)), _typed(item["channels"], int))
        for item in _typed(entry["groups"], list)
    ]
    paths = [path for group in groups for path in group.readers]
    if not groups or not all(group.readers for group in groups) or len(set(paths)) < len(paths):
        raise ValueError(f"{name}: the groups are not disjoint sets of linears")
    known = {key: file.info(key) for key in file.names if key.startswith(f"{name}/")}
    for group in groups:
        _check_tensor(known, f"{name}/groups/{group.name}/rows", torch.bfloat16, (None, group.channels))
    count = _typed(entry["calls"], int)
    if count < 1:
        raise ValueError(f"{name}: {count} calls")
    texts = tuple(_check_call(name, index, known, file) for index in range(count))
    named = {group.name: group for group in groups}
    return ExpertCalibration(name, _typed(entry["fingerprint"], str), edges, named, texts, file)


_Known = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _check_call(expert: str, index: int, known: _Known, file: TensorFile) -> int:
    """Check the tensors of a recorded call against each other; returns the number of its text embeddings."""
    prefix = f"{expert}/calls/{index}/"
    batch, _, *size = _check_tensor(known, f"{prefix}hidden_states", torch.bfloat16, (None,) * 5)
    _check_tensor(known, f"{prefix}sample", torch.bfloat16, (batch, None, *size))
    _check_tensor(known, f"{prefix}text", torch.int64, ())
    steps = known.get(f"{prefix}timestep", (None, ()))[1]
    _check_tensor(known, f"{prefix}timestep", torch.float32, (batch,) if len(steps) == 1 else (batch, None))
    text = int(file.read(f"{prefix}text"))
    _check_tensor(known, f"{expert}/texts/{text}", torch.bfloat16, (batch, None, None))
    return text


def _check_tensor(known: _Known, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The tensor's shape, which must be `shape` (None: any size from 1); raises ValueError."""
    if name not in known:
        raise ValueError(f"tensor {name} is missing")
    found, sizes = known[name]
    fits = len(sizes) == len(shape) and all(
        size > 0 and wanted in (None, size) for size, wanted in zip(sizes, shape, strict=True)
    )
    if found != dtype or not fits:
        raise ValueError(f"tensor {name} is {found} {list(sizes)}")
    return sizes


def _typed(value: Any, *kinds: type) -> Any:
    """A value of the JSON header, of exactly one of the given types (a bool is no int); raises TypeError."""
    if type(value) not in kinds:
        raise TypeError(f"{str(value)[:40]!r} is not of type {' or '.join(kind.__name__ for kind in kinds)}")
    return value
