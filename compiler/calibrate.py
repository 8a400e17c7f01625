"""Calibration as an interpretation of the captured program: one pass over the checkpoint, one layer of it in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hif4c.compiler.calibration import Group
from hif4c.compiler.calibration_calls import Call, StoredCalls, derive_seed, write_tensors
from hif4c.compiler.calibration_writer import MAX_ROWS, CalibrationWriter
from hif4c.compiler.capture import capture
from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.interpret import interpret
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.lora import fuse_loras
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.sketch import ChannelSketch
from hif4c.passes.program import Program
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph, Node, Ref
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["BINS", "CheckpointStore", "calibrate", "find_groups", "plan_program", "timestep_edges"]

LINEAR = "aten.linear.default"
STAGE = "choose_precision"
"""The last pass before calibration: linears are planned, and nothing of their inputs has changed."""
BINS = 4
"""Timestep bins of an expert."""
WAITING = 1 << 30
"""Bytes of intermediate values that wait in memory; what is more waits in files."""


class CheckpointStore:
    """The tensors of an unpacked program, read from the checkpoint when they are needed.

    Args:
        program: at a stage before its weights are packed.
        checkpoint: where they are.
        on_bytes: called with the bytes of every tensor that was read.
    """

    def __init__(self, program: Program, checkpoint: Checkpoint, on_bytes: Callable[[int], None] | None = None) -> None:
        self._specs = {spec.name: spec for spec in program.tensors.values()}
        self._checkpoint = checkpoint
        self._on_bytes = on_bytes
        self.fingerprint = Fingerprint()

    def load(self, name: str) -> torch.Tensor:
        """The tensor in the program's dtype, without a copy where the file has that dtype."""
        spec = self._specs[name]
        if spec.source is None:
            assert spec.value is not None
            return spec.value
        tensor = self._checkpoint.read(spec.source, validate=True)
        self.fingerprint.add(spec.source, tensor)
        if self._on_bytes is not None:
            self._on_bytes(tensor.nbytes)
        return tensor.to(spec.dtype)

    def release(self, name: str) -> None:
        """Let the system take its pages back."""
        source = self._specs[name].source
        if source is not None:
            self._checkpoint.release(source)


def plan_program(program: Program, config: WanConfig) -> Program:
    """Plan a captured program, in place, so that every linear of the blocks is quantized; returns it."""
    recipe = Recipe("calibration")
    run_passes(program, Choices(make_plan(config, recipe)), recipe, stop_after=STAGE)
    return program


def find_groups(program: Program) -> list[Group]:
    """The quantized inputs of a planned program with the linears that read them, in the program's order."""
    readers: dict[Any, list[str]] = {}
    channels: dict[Any, int] = {}
    for node in program.linears():
        path = program.linear_path(node)
        if program.decisions[path].quantized:
            source = node.args[0]
            readers.setdefault(source, []).append(path)
            channels[source] = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
    return [Group(tuple(paths), channels[source]) for source, paths in readers.items()]


def timestep_edges(location: ModelLocation, expert: str, bins: int = BINS) -> tuple[float, ...]:
    """Edges of equal bins over the timesteps that an expert serves."""
    ratio = location.pipeline.boundary_ratio
    low, high = 0.0, 1000.0
    if ratio is not None and len(location.configs) == 2:
        low, high = (1000 * ratio, high) if expert == "transformer" else (low, 1000 * ratio)
    return tuple(low + (high - low) * index / bins for index in range(bins + 1))


def calibrate(
    location: ModelLocation,
    calls: Mapping[str, Sequence[Call]],
    output: Path,
    runs: list[dict[str, Any]],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    loras: Mapping[str, Sequence[tuple[Path, float]]] = MappingProxyType({}),
    ranks: Ranks = ALONE,
    events: Callable[[str, Any], None] = lambda event, value: None,
) -> None:
    """Run every expert's calls through its captured program and write the calibration file.

    Memory: the weights of one transformer block with the histograms of its inputs, what one call needs within it, and
    up to `WAITING` of what the others hold between two blocks; the rest, and what is finished, lies on the disk beside
    `output`.

    Args:
        location: the model.
        calls: expert -> its calls, the same on every rank.
        output: the file to write; its folder must exist.
        runs: where the calls came from, for the file's header.
        seed: of the choice of rows.
        device: where the program runs.
        loras: expert -> files with their scales, added to its weights.
        ranks: share the calls; rank 0 writes the file, which does not depend on how many ranks there are.
        events: called with ("step", sentence), ("total", bytes), ("unit", "bytes") and ("bytes", count).

    Raises:
        Hif4Error: an expert without calls, weights or activations that are not finite, a full disk.
    """
    for name in location.experts:
        if not calls.get(name):
            raise Hif4Error(f"{name}: no calibration call reached it; use more steps.")
    planned: dict[WanConfig, Program] = {}
    with CalibrationWriter(output, ranks) as writer:
        for name, path in location.experts.items():
            config = location.configs[name]
            if config not in planned:  # experts of one config have one program
                events("step", f"capturing {name}")
                captured = capture(config, torch.bfloat16, location.pipeline.expand_timesteps)
                planned[config] = plan_program(captured, config)
            program = planned[config]
            events("step", f"calibrating {name} on {len(calls[name])} calls")
            stored = Checkpoint(path, config, location.layout)
            with fuse_loras(stored, loras.get(name, ()), name) as checkpoint:
                shapes = {spec.source: spec.shape for spec in program.tensors.values() if spec.source is not None}
                checkpoint.check(shapes)
                events("total", checkpoint.total_bytes)
                events("unit", "bytes")
                store = CheckpointStore(program, checkpoint, lambda size: events("bytes", size))
                edges = timestep_edges(location, name)
                pass_over = _Pass(name, program, calls[name], edges, writer, ranks, seed)
                with ranks.together():
                    pass_over.run(store, device)
            if ranks.first:
                writer.add_expert(name, store.fingerprint.hexdigest(), edges, pass_over.recorded())
            ranks.all_agree(None)
        if ranks.first:
            writer.finish(location.source, runs)


class _Pass:
    """One expert's calls on their way through its program; watches the inputs of the quantized linears.

    A segment of the program runs for one call after the other, so a group is complete when the last call of this rank
    has come to it: in the order of the program, which is the same on every rank.
    """

    barriers: frozenset[int] = frozenset()

    def __init__(
        self,
        expert: str,
        program: Program,
        calls: Sequence[Call],
        edges: Sequence[float],
        writer: CalibrationWriter,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self._expert, self._calls, self._writer, self._ranks, self._seed = expert, calls, writer, ranks, seed
        self._graph = to_graph(program)
        self._left = {group.name: group for group in find_groups(program)}
        self._mine = ranks.share(range(len(calls)))
        self._bins = [_bin(calls[index].noise_level, edges) for index in self._mine]
        self._bin_count = len(edges) - 1
        self._open: dict[str, _OpenGroup] = {}
        self._sample = 0

    def run(self, store: CheckpointStore, device: torch.device | str) -> None:
        """Run this rank's calls; their outputs are in files afterwards."""
        scratch = self._writer.folder / f"values-{self._ranks.rank}"
        scratch.mkdir(exist_ok=True)
        samples = [self._calls[index].inputs for index in self._mine]
        (outputs,) = interpret(self._graph, samples, store, watch=self, device=device, scratch=scratch, memory=WAITING)
        if not self._mine:
            for group in list(self._left.values()):
                self._finish(_OpenGroup(group, self._bin_count))
        if self._left:
            raise ValueError(f"{self._expert}: the program never came to the inputs of {', '.join(self._left)}")
        for index in reversed(self._mine):
            sample = outputs.pop().cpu()
            if not bool(torch.isfinite(sample).all()):
                raise Hif4Error(
                    f"{self._expert}: its output on the calibration calls is not finite; check the weights."
                )
            write_tensors(self._sample_path(index), {"sample": sample})

    def recorded(self) -> Iterator[tuple[Call, torch.Tensor]]:
        """All calls with their outputs, one in memory at a time."""
        for index, call in enumerate(self._calls):
            with TensorFile(self._sample_path(index)) as file:
                yield call, file.read("sample")
            _release(self._calls, index)

    def on_input(self, number: int, node: Node, sample: int, value: Any) -> None:
        """Take a call's input of a group's first reader into account."""
        if sample != self._sample:  # the program reads its inputs in the first segment and not again
            _release(self._calls, self._mine[self._sample])
            self._sample = sample
        path = _linear_path(self._graph, node)
        if path is None or path not in self._left:
            return
        if path not in self._open:
            self._open[path] = _OpenGroup(self._left[path], self._bin_count)
        opened, index = self._open[path], self._mine[sample]
        try:
            chosen = torch.Generator().manual_seed(derive_seed(self._seed, self._expert, path, index))
            opened.add(index, value, self._bins[sample], math.ceil(MAX_ROWS / len(self._calls)), chosen)
        except ValueError as error:
            raise Hif4Error(
                f"{self._expert}, input of {path}: {error}; check the weights and the calibration's samples."
            ) from None
        if len(opened.rows) == len(self._mine):
            self._finish(self._open.pop(path))

    def on_ready(self, number: int, inputs: Sequence[Any]) -> None:
        """There are no barriers."""

    def _finish(self, opened: _OpenGroup) -> None:
        """Bring together what the ranks saw of a group; rank 0 keeps it."""
        del self._left[opened.group.name]
        self._ranks.all_agree(None)
        opened.sketch.merge_ranks(self._ranks)
        rows = {index: rows for part in self._ranks.all_gather(opened.rows) for index, rows in part.items()}
        if self._ranks.first:
            ordered = [rows[index] for index in sorted(rows)]
            self._writer.add_group(self._expert, opened.group, opened.sketch, torch.cat(ordered))

    def _sample_path(self, index: int) -> Path:
        return self._writer.folder / f"{self._expert}-sample-{index}.safetensors"


class _OpenGroup:
    """What this rank has seen of a group.

    Attributes:
        rows: number of the call -> some of its tokens [R, K] bf16.
    """

    def __init__(self, group: Group, bins: int) -> None:
        self.group = group
        self.sketch = ChannelSketch(group.channels, bins)
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, index: int, value: torch.Tensor, place: int, wanted: int, generator: torch.Generator) -> None:
        """Count the tokens of a call [..., K] in a timestep bin and keep `wanted` of them (ValueError for NaN)."""
        flat = value.reshape(-1, self.group.channels)
        self.sketch.update(flat, place)
        chosen = torch.randperm(len(flat), generator=generator)[:wanted].sort().values
        self.rows[index] = flat[chosen.to(flat.device)].to(torch.bfloat16).cpu()


def _release(calls: Sequence[Call], index: int) -> None:
    if isinstance(calls, StoredCalls):
        calls.release(index)


def _linear_path(graph: Graph, node: Node) -> str | None:
    """Module path of an `aten.linear` that reads a stored weight."""
    if node.target != LINEAR or not isinstance(node.args[1], Ref):
        return None
    index = node.args[1].index - len(graph.inputs)
    return graph.tensors[index].name.removesuffix(".weight") if 0 <= index < len(graph.tensors) else None


def _bin(timestep: float, edges: Sequence[float]) -> int:
    """The bin of a timestep; what lies outside counts for the nearest bin."""
    inside = sum(timestep >= edge for edge in edges) - 1
    return min(max(inside, 0), len(edges) - 2)
