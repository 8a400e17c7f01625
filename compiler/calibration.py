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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec, tensor_bytes

__all__ = ["MAX_ROWS", "Calibration", "ExpertCalibration", "Group", "merge_calibrations", "write_calibration"]

KEY = "hif4c_calibration"
VERSION = 1
MAX_ROWS = 256
"""Tokens that are kept of every group."""


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
        call_count: recorded calls.
    """

    name: str
    fingerprint: str
    edges: tuple[float, ...]
    groups: Mapping[str, Group]
    call_count: int
    _file: TensorFile

    def sketch(self, group: str) -> ChannelSketch:
        """The group's histograms."""
        prefix = f"{self.name}/groups/{group}/sketch."
        tensors = {key.removeprefix(prefix): self._file.read(key) for key in self._file.names if key.startswith(prefix)}
        sketch = ChannelSketch.from_tensors(tensors, f"{self._file.path}: {self.name}, {group}")
        if sketch.channels != self.groups[group].channels or not int(sketch.count().sum()):
            raise Hif4Error(
                f"{self._file.path}: {group} has a sketch of another width or of no token; calibrate again."
            )
        return sketch

    def rows(self, group: str) -> torch.Tensor:
        """Tokens [R, K] bf16 of the group's input."""
        rows = self._file.read(f"{self.name}/groups/{group}/rows")
        if rows.dim() != 2 or rows.shape[1] != self.groups[group].channels or rows.dtype != torch.bfloat16:
            raise Hif4Error(f"{self._file.path}: {group} has rows {list(rows.shape)}; calibrate again.")
        return rows

    def calls(self) -> Iterator[tuple[Call, torch.Tensor]]:
        """The recorded calls with the unquantized program's output."""
        for index in range(self.call_count):
            prefix = f"{self.name}/calls/{index}/"
            text = int(self._file.read(prefix + "text"))
            parts = [self._file.read(prefix + key) for key in ("hidden_states", "timestep")]
            yield (
                Call(parts[0], parts[1], self._file.read(f"{self.name}/texts/{text}")),
                self._file.read(prefix + "sample"),
            )

    def bins_in(self, low: float, high: float) -> list[int]:
        """The timestep bins that overlap [low, high].

        Raises:
            Hif4Error: none does.
        """
        found = [
            index for index in range(len(self.edges) - 1) if self.edges[index] < high and low < self.edges[index + 1]
        ]
        if not found:
            raise Hif4Error(
                f"{self._file.path}: {self.name} was calibrated on timesteps {self.edges}, not {low}-{high}."
            )
        return found


class Calibration:
    """An open calibration file.

    Raises:
        Hif4Error: not a calibration file, or a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = TensorFile(self.path)
        text = self._file.metadata.get(KEY)
        if text is None:
            raise Hif4Error(f"{self.path}: is not a calibration file; make one with `hif4c calibrate`.")
        try:
            self.header: dict[str, Any] = json.loads(text)
            if self.header["version"] != VERSION:
                found = self.header["version"]
                raise Hif4Error(f"{self.path}: has version {found!r}, this hif4c reads {VERSION}; calibrate again.")
            self.model = str(self.header["model"])
            self.runs: list[dict[str, Any]] = list(self.header["runs"])
            self.experts = {name: self._expert(name, entry) for name, entry in self.header["experts"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Hif4Error(f"{self.path}: its header is damaged ({error}); calibrate again.") from None

    def _expert(self, name: str, entry: Mapping[str, Any]) -> ExpertCalibration:
        groups = [Group(tuple(map(str, item["readers"])), int(item["channels"])) for item in entry["groups"]]
        edges = tuple(float(edge) for edge in entry["edges"])
        if len(edges) < 2 or list(edges) != sorted(set(edges)) or any(not group.readers for group in groups):
            raise ValueError("bins or groups are not in order")
        known = set(self._file.names)
        for group in groups:
            if f"{name}/groups/{group.name}/rows" not in known:
                raise ValueError(f"{group.name} has no tensors")
        return ExpertCalibration(
            name,
            str(entry["fingerprint"]),
            edges,
            {group.name: group for group in groups},
            int(entry["calls"]),
            self._file,
        )

    def expert(self, name: str) -> ExpertCalibration:
        """One expert's part; raises Hif4Error when it was not calibrated."""
        if name not in self.experts:
            raise Hif4Error(f"{self.path}: {name} was not calibrated; it has {', '.join(self.experts)}.")
        return self.experts[name]

    def check(self, name: str, fingerprint: str) -> None:
        """Refuse (Hif4Error) a file that was made from other weights."""
        expert = self.expert(name)
        if expert.fingerprint != fingerprint:
            raise Hif4Error(
                f"{self.path}: was made from other weights than this {name} (of {self.model}); calibrate this model."
            )

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


def write_calibration(
    path: Path,
    model: str,
    runs: list[dict[str, Any]],
    experts: Mapping[str, dict[str, Any]],
    parts: Sequence[TensorFile],
) -> None:
    """Assemble a calibration file from files that hold its tensors under their final names.

    Args:
        path: the file; its folder must exist. A half-written file never has this name.
        model: name of the model.
        runs: where the samples came from.
        experts: name -> {"fingerprint", "edges", "groups", "calls"}.
        parts: their tensors, in the order of the file.
    """
    specs = [TensorSpec(name, *part.info(name)) for part in parts for name in part.names]
    header = {"version": VERSION, "model": model, "runs": runs, "experts": dict(experts)}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    temporary = f".{path.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    file = path.parent / f"{temporary}.safetensors"
    file.unlink(missing_ok=True)
    with StreamingWriter(
        path.parent, specs, base_name=temporary, shard_bytes=1 << 62, metadata={KEY: text}, fsync=True
    ) as writer:
        for part in parts:
            for name in part.names:
                writer.write(name, part.read(name))
                part.release(name)
    file.replace(path)


def merge_calibrations(paths: Sequence[Path], output: Path) -> None:
    """Merge calibrations of one model: histograms are added, rows and calls put one after the other.

    Rows above `MAX_ROWS` are thinned out evenly.

    Raises:
        Hif4Error: files of different weights, bins or groups.
    """
    from tempfile import TemporaryDirectory

    files = [Calibration(path) for path in paths]
    first = files[0]
    for other in files[1:]:
        if other.experts.keys() != first.experts.keys():
            raise Hif4Error(f"{other.path}: has other experts than {first.path}; merge calibrations of one model.")
        for name, expert in other.experts.items():
            mine = first.experts[name]
            if expert.fingerprint != mine.fingerprint:
                raise Hif4Error(f"{other.path}: was made from other weights than {first.path}.")
            if (expert.edges, expert.groups) != (mine.edges, mine.groups):
                raise Hif4Error(f"{other.path}: has other timestep bins or groups than {first.path}.")
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        parts, experts = [], {}
        for name, mine in first.experts.items():
            for index, group in enumerate(mine.groups):
                sketch = files[0].experts[name].sketch(group)
                for file in files[1:]:
                    try:
                        sketch.merge(file.experts[name].sketch(group))
                    except ValueError as error:
                        raise Hif4Error(f"{file.path}: {name}, {group} cannot be merged: {error}") from None
                rows = torch.cat([file.experts[name].rows(group) for file in files])
                parts.append(
                    write_group(Path(folder), f"{name}-{index}", f"{name}/groups/{group}/", sketch, thin(rows))
                )
            calls = [item for file in files for item in file.experts[name].calls()]
            parts.append(write_calls(Path(folder), name, calls))
            experts[name] = expert_entry(mine.fingerprint, mine.edges, list(mine.groups.values()), len(calls))
        write_calibration(output, first.model, [run for file in files for run in file.runs], experts, parts)


def thin(rows: torch.Tensor) -> torch.Tensor:
    """At most MAX_ROWS of the rows, evenly spaced."""
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[torch.arange(MAX_ROWS) * len(rows) // MAX_ROWS]


def expert_entry(fingerprint: str, edges: Sequence[float], groups: Sequence[Group], calls: int) -> dict[str, Any]:
    """What the header says of one expert."""
    entries = [{"readers": list(group.readers), "channels": group.channels} for group in groups]
    return {"fingerprint": fingerprint, "edges": list(edges), "groups": entries, "calls": calls}


def write_group(folder: Path, base: str, prefix: str, sketch: ChannelSketch, rows: torch.Tensor) -> TensorFile:
    """A part with one group's tensors, so that they need not stay in memory."""
    tensors = {f"{prefix}sketch.{key}": value for key, value in sketch.to_tensors().items()}
    return _write_part(folder, base, {**tensors, f"{prefix}rows": rows})


def write_calls(folder: Path, expert: str, calls: Sequence[tuple[Call, torch.Tensor]]) -> TensorFile:
    """A part with the calls; text embeddings that several calls share are stored once."""
    texts: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for index, (call, sample) in enumerate(calls):
        text = call.encoder_hidden_states
        number = texts.setdefault(hashlib.sha256(tensor_bytes(text)).hexdigest(), len(texts))
        tensors[f"{expert}/texts/{number}"] = text
        prefix = f"{expert}/calls/{index}/"
        tensors |= {
            f"{prefix}hidden_states": call.hidden_states,
            f"{prefix}timestep": call.timestep.float(),
            f"{prefix}text": torch.tensor(number),
            f"{prefix}sample": sample,
        }
    return _write_part(folder, f"{expert}-calls", tensors)


def _write_part(folder: Path, base: str, tensors: Mapping[str, torch.Tensor]) -> TensorFile:
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    with StreamingWriter(folder, specs, base_name=base, shard_bytes=1 << 62) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    return TensorFile(folder / f"{base}.safetensors")
