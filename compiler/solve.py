"""GPTQ while the compiled program runs: each weight is rounded when the first node needs it, from what reaches it then.

The samples go through the very program that will be shipped, so that a layer's Hessian is that of its quantized input
behind layers that are quantized already, and what comes after a weight sees its rounded form. One layer is in memory;
finished planes wait on the disk until the artifact's weight file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.interpret import interpret
from hif4c.compiler.masks import rotated
from hif4c.compiler.planes import InputStatistics, Planes, make_planes, whole_tensor
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.format import dequantize
from hif4c.runtime.graph import Graph, Node, Ref
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec

__all__ = ["SolvedPlanes", "solve"]

ROWS = 4096
"""Tokens that a Hessian is summed over at once: what they take in float32 beside it is bounded."""


class SolvedPlanes:
    """Planes on the disk, by the name of the checkpoint's tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: set[str] = set()

    def put(self, source: str, planes: Planes) -> None:
        """Keep the planes of a weight."""
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in planes.items()]
        with StreamingWriter(self._folder, specs, base_name=source, shard_bytes=1 << 62) as writer:
            for name, value in planes.items():
                writer.write(name, value)
        self._kept.add(source)

    def get(self, source: str) -> Planes | None:
        """The planes of a weight, None where it was not solved."""
        if source not in self._kept:
            return None
        # Opened for each weight: hundreds of maps would stay, with the pages that were read.
        with TensorFile(self._folder / f"{source}.safetensors") as file:
            return {name: file.read(name) for name in file.names}


def solve(
    program: Program,
    graph: Graph,
    checkpoint: Checkpoint,
    calls: Sequence[Call],
    folder: Path,
    progress: Callable[[int], None] = lambda size: None,
    device: torch.device | str = "cpu",
) -> SolvedPlanes:
    """Round every weight whose rounding is "gptq".

    Args:
        program: lowered, with masks.
        graph: the same as a graph.
        checkpoint: the weights, read once.
        calls: inputs of the expert.
        folder: existing, for the planes.
        progress: called with the bytes of every weight that was packed.
        device: where the program runs.
    """
    store = _Store(program, graph, checkpoint, folder, progress)
    interpret(graph, [call.inputs for call in calls], store, watch=store, device=device)
    return store.solved


class _Store:
    """The stored tensors of a lowered program, made from the checkpoint when they are first needed."""

    def __init__(
        self, program: Program, graph: Graph, checkpoint: Checkpoint, folder: Path, progress: Callable[[int], None]
    ) -> None:
        self.solved = SolvedPlanes(folder)
        self._program = program
        self._graph = graph
        self._checkpoint = checkpoint
        self._progress = progress
        self._specs = {spec.name: spec for spec in program.tensors.values()}
        self._planes: dict[str, Planes] = {}
        self._statistics: dict[str, InputStatistics] = {}
        meetings = _meetings(graph, {name: spec.source for name, spec in self._specs.items()})
        self._weights, self._relaxed = meetings.weights, meetings.relaxed

    def load(self, name: str) -> torch.Tensor:
        """A stored tensor in the dtype of the graph."""
        spec = self._specs[name]
        if spec.source is None:
            assert spec.value is not None
            return spec.value
        if spec.plane == "whole":
            return whole_tensor(spec, self._program, self._checkpoint).to(spec.dtype)
        return self._packed(spec)[spec.plane]

    def release(self, name: str) -> None:
        """Forget a tensor that nothing will read."""
        spec = self._specs[name]
        if spec.source is None:
            return
        planes = self._planes.get(spec.source)
        if planes is not None:
            planes.pop(spec.plane, None)
            if not planes:
                del self._planes[spec.source]
        self._checkpoint.release(spec.source)

    @property
    def barriers(self) -> Collection[int]:
        """Where weights meet their inputs."""
        return self._weights.keys()

    def on_input(self, number: int, node: Node, sample: int, value: Any) -> None:
        """Nothing yet: the inputs are read when all are there."""

    def on_ready(self, number: int, inputs: Sequence[Any]) -> None:
        """Sum the Hessian of an input, for all the weights that will meet it."""
        node = self._graph.nodes[number]
        names = [name for name in self._weights[number] if self._specs[name].rounding == "gptq"]
        if node.target == "getitem" and names:
            channels = self._checkpoint.shape(str(self._specs[names[0]].source))[1]
            rows = (dequantize(codes, scales, channels, torch.float32).view(-1, channels) for codes, scales in inputs)
            self._share(names, _second_moments(rows, channels))
            return
        for name in names:
            self._share([name], self._unrounded_moments(self._relaxed[name], inputs))

    def _unrounded_moments(self, linear: Node, inputs: Sequence[torch.Tensor]) -> InputStatistics:
        """Of the input of a W4A16 linear."""
        mask, width = self._mask(linear.args[4]), int(linear.args[5] or 0)
        channels = inputs[0].shape[-1]
        flat = (x.reshape(-1, channels) for x in inputs)
        return _second_moments((rotated(x, mask if mask is None else mask.to(x.device), width) for x in flat), channels)

    def _mask(self, argument: object) -> torch.Tensor | None:
        if not isinstance(argument, Ref):
            return None
        return self.load(self._graph.tensors[argument.index - len(self._graph.inputs)].name)

    def _share(self, names: Sequence[str], statistics: InputStatistics) -> None:
        for name in names:
            self._statistics[str(self._specs[name].source)] = statistics

    def _packed(self, spec: TensorSource) -> Planes:
        source = str(spec.source)
        if source not in self._planes:
            tensor = self._checkpoint.read(source, validate=True)
            planes = make_planes(spec, tensor, self._program, self._statistics.pop(source, None))
            self.solved.put(source, planes)
            self._planes[source] = dict(planes)
            self._progress(tensor.nbytes)
        return self._planes[source]


@dataclass(frozen=True)
class _Meetings:
    """Where weights meet their inputs.

    Attributes:
        weights: number of the node that sees an input before any plane of these weights is needed -> the names of
            their codes. A W4A4 input is seen where the first of its planes is taken from its quantizer's result, a
            W4A16 one by its linear or its low-rank branch.
        relaxed: name of the codes -> W4A16 linear.
    """

    weights: dict[int, list[str]]
    relaxed: dict[str, Node]


def _meetings(graph: Graph, sources: Mapping[str, str | None]) -> _Meetings:
    first = graph.first_node
    found = _Meetings({}, {})
    branches: dict[str | None, int] = {}

    def name(ref: Ref) -> str:
        return graph.tensors[ref.index - len(graph.inputs)].name

    for number, node in enumerate(graph.nodes):
        if node.target == "aten.linear.default" and len(graph.inputs) <= node.args[1].index < first:
            branches[sources[name(node.args[1])]] = number
        elif node.target == "hif4.linear":
            found.weights.setdefault(node.args[0].index - first, []).append(name(node.args[2]))
        elif node.target == "hif4.linear_w4":
            codes = name(node.args[1])
            found.weights.setdefault(branches.get(sources[codes], number), []).append(codes)
            found.relaxed[codes] = node
    return found


def _second_moments(rows: Iterable[torch.Tensor], channels: int) -> InputStatistics:
    """Of the tokens [T, K] float32, summed."""
    total, tokens = torch.zeros(channels, channels), 0
    for block in rows:
        total = total.to(block.device)
        for part in block.split(ROWS):
            total.addmm_(part.T, part)
            tokens += len(part)
    total = total.cpu()
    return InputStatistics(total.diagonal(), tokens, total)
