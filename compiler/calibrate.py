"""Calibration as an interpretation of the captured program: one pass over the checkpoint, one layer of it in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration import Group
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.calibration_writer import MAX_ROWS, CalibrationWriter
from hif4c.compiler.capture import capture
from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.interpret import interpret
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.sketch import ChannelSketch
from hif4c.passes.program import Program
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph, Node, Ref

__all__ = ["BINS", "CheckpointStore", "calibrate", "find_groups", "plan_program", "timestep_edges"]

LINEAR = "aten.linear.default"
STAGE = "choose_precision"
"""The last pass before calibration: linears are planned, and nothing of their inputs has changed."""
BINS = 4
"""Timestep bins of an expert."""


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
    events: Callable[[str, Any], None] = lambda event, value: None,
) -> None:
    """Run every expert's calls through its captured program and write the calibration file.

    Memory: one layer's weights, what the samples hold between two nodes, and one group's histograms; what is finished
    lies on the disk beside `output`.

    Args:
        location: the model.
        calls: expert -> its calls.
        output: the file to write; its folder must exist.
        runs: where the calls came from, for the file's header.
        seed: of the choice of rows.
        device: where the program runs.
        events: called with ("step", sentence), ("total", bytes) and ("bytes", count).

    Raises:
        Hif4Error: an expert without calls, weights or activations that are not finite, a full disk.
    """
    for name in location.experts:
        if not calls.get(name):
            raise Hif4Error(f"{name}: no calibration call reached it; use more steps.")
    planned: dict[WanConfig, Program] = {}
    with CalibrationWriter(output) as writer:
        for name, path in location.experts.items():
            config = location.configs[name]
            if config not in planned:  # experts of one config have one program
                events("step", f"capturing {name}")
                captured = capture(config, torch.bfloat16, location.pipeline.expand_timesteps)
                planned[config] = plan_program(captured, config)
            program = planned[config]
            edges = timestep_edges(location, name)
            events("step", f"calibrating {name} on {len(calls[name])} calls")
            with Checkpoint(path, config, location.layout) as checkpoint:
                shapes = {spec.source: spec.shape for spec in program.tensors.values() if spec.source is not None}
                checkpoint.check(shapes)
                events("total", checkpoint.total_bytes)
                store = CheckpointStore(program, checkpoint, lambda size: events("bytes", size))
                watch = _Watch(program, calls[name], edges, writer, name, seed)
                inputs = [call.inputs for call in calls[name]]
                (outputs,) = interpret(watch.graph, inputs, store, watch=watch, device=device)
            if watch.left:
                raise ValueError(f"{name}: the program never came to the inputs of {', '.join(watch.left)}")
            samples = [value.cpu() for value in outputs]
            if not all(bool(torch.isfinite(value).all()) for value in samples):
                raise Hif4Error(f"{name}: its output on the calibration calls is not finite; check the weights.")
            recorded = list(zip(calls[name], samples, strict=True))
            writer.add_expert(name, store.fingerprint.hexdigest(), edges, recorded)
        writer.finish(location.source, runs)


class _Watch:
    """Looks at the inputs of the quantized linears as they are computed; `left` are the groups still to come."""

    def __init__(
        self,
        program: Program,
        calls: Sequence[Call],
        edges: Sequence[float],
        writer: CalibrationWriter,
        expert: str,
        seed: int,
    ) -> None:
        self.graph = to_graph(program)
        self.left = {group.name: group for group in find_groups(program)}
        paths = {number: _linear_path(self.graph, node) for number, node in enumerate(self.graph.nodes)}
        self._groups = {number: self.left[path] for number, path in paths.items() if path in self.left}
        self._bins = [_bin(call.noise_level, edges) for call in calls]
        self._bin_count = len(edges) - 1
        self._writer, self._expert = writer, expert
        self._generator = torch.Generator().manual_seed(seed)
        self._sketch: ChannelSketch | None = None
        self._rows: list[torch.Tensor] = []

    @property
    def barriers(self) -> Collection[int]:
        """The groups' first readers: one group's sketch is in memory."""
        return self._groups.keys()

    def on_input(self, number: int, node: Node, sample: int, value: Any) -> None:
        """Take the input of a group's first reader into account."""
        group = self._groups.get(number)
        if group is None:
            return
        if self._sketch is None:
            self._sketch = ChannelSketch(group.channels, self._bin_count)
        flat = value.reshape(-1, group.channels)
        try:
            self._sketch.update(flat, self._bins[sample])
        except ValueError as error:
            raise Hif4Error(
                f"{self._expert}, input of {group.name}: {error}; check the weights and the calibration's samples."
            ) from None
        wanted = math.ceil(MAX_ROWS / len(self._bins))
        chosen = torch.randperm(len(flat), generator=self._generator)[:wanted].sort().values
        self._rows.append(flat[chosen.to(flat.device)].to(torch.bfloat16).cpu())

    def on_ready(self, number: int, inputs: Sequence[Any]) -> None:
        """Write what was seen of a group."""
        assert self._sketch is not None
        group = self.left.pop(self._groups[number].name)
        self._writer.add_group(self._expert, group, self._sketch, torch.cat(self._rows))
        self._sketch, self._rows = None, []


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
