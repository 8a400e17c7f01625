"""GPTQ while the compiled program runs: each weight is rounded when the first node needs it, from what reaches it then.

The samples go through the very program that will be shipped, so that a layer's Hessian is that of its quantized input
behind layers that are quantized already, and what comes after a weight sees its rounded form. One layer is in memory;
finished planes wait on the disk until the artifact's weight file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.interpret import MEMORY, interpret
from hif4c.compiler.journal import Journal
from hif4c.compiler.masks import rotated
from hif4c.compiler.planes import InputStatistics, Planes, make_planes, whole_tensor
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.second_moments import second_moments
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize
from hif4c.runtime.graph import Graph, Node, Ref

__all__ = ["SolvedPlanes", "solve"]


class SolvedPlanes:
    """Planes that GPTQ has finished, by the name of the checkpoint's tensor.

    Args:
        journal: keeps them; of several ranks, in a folder that all of them see.
        key: begins their keys there.
    """

    def __init__(self, journal: Journal, key: str) -> None:
        self._journal, self._key = journal, key

    def get(self, source: str) -> Planes | None:
        """The planes of a weight, None where it is not solved."""
        entry = self._journal.done(f"{self._key}/{source}")
        return None if entry is None else entry.tensors

    def put(self, source: str, planes: Planes) -> None:
        """Keep the planes of a weight."""
        self._journal.record(f"{self._key}/{source}", None, planes)


def solve(
    program: Program,
    graph: Graph,
    checkpoint: Checkpoint,
    calls: Sequence[Call],
    solved: SolvedPlanes,
    events: Callable[[str, Any], None] = lambda event, value: None,
    *,
    scratch: Path | None = None,
    memory: int = MEMORY,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> None:
    """Round every weight whose rounding is "gptq" and that is not in `solved` yet; they are there afterwards.

    Nothing depends on how many ranks there are or on what an earlier run has finished: as long as every process has the
    same number of threads on a processor of the same kind, the planes are the same to the bit.

    Args:
        program: lowered, with masks.
        graph: the same as a graph.
        checkpoint: the weights, read once.
        calls: inputs of the expert, at least one; the same on every rank.
        solved: what is finished.
        events: "total" and "unit", "skipped" for weights that are finished already, "bytes" for every other.
        scratch: existing, for what calls wait with at a weight; see `interpret`.
        memory: bytes of that that stay in memory.
        device: where the program runs and Hessians are summed; rounding itself is done on the CPU.
        ranks: share the calls, and then the rows of each weight.

    Raises:
        Hif4Error: an input or a Hessian that GPTQ cannot use, a weight that is not finite, a full disk.
    """
    if not calls:
        raise ValueError("GPTQ needs calls to sum Hessians over")
    with ranks.together():
        work = _Work(program, graph, checkpoint, solved, events, ranks)
        mine = [call.inputs for call in ranks.share(calls)]
        interpret(graph, mine, work, watch=work, device=device, scratch=scratch, memory=memory)


class _Work:
    """The stored tensors of a lowered program, made from the checkpoint when they are first needed."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        checkpoint: Checkpoint,
        solved: SolvedPlanes,
        events: Callable[[str, Any], None],
        ranks: Ranks,
    ) -> None:
        self._program, self._graph, self._checkpoint = program, graph, checkpoint
        self._solved, self._events, self._ranks = solved, events, ranks
        self._specs = {spec.name: spec for spec in program.tensors.values()}
        self._planes: dict[str, Planes] = {}
        meetings = _meetings(graph, {name: spec.source for name, spec in self._specs.items()})
        self._relaxed = meetings.relaxed
        self._left = self._unsolved(meetings.weights)

    @property
    def barriers(self) -> Collection[int]:
        """Where weights that are not solved meet their inputs."""
        return self._left.keys()

    def on_input(self, number: int, node: Node, sample: int, value: Any) -> None:
        """Nothing: inputs are read when all are there, so that what they are rounded to can be chosen for all."""

    def on_ready(self, number: int, inputs: Sequence[Any]) -> None:
        """Round the weights that meet an input here."""
        node, names = self._graph.nodes[number], self._left[number]
        channels = self._checkpoint.shape(self._source(names[0]))[1]
        if node.target == "getitem":

            def quantized() -> Iterator[torch.Tensor]:
                for codes, scales in inputs:
                    yield dequantize(codes, scales, channels, torch.float32).view(-1, channels)

            statistics = second_moments(quantized, channels, ranks=self._ranks, name=self._source(names[0]))
            for name in names:
                self._round(name, statistics)
            return
        for name in names:
            linear = self._relaxed[name]
            mask, width = self._mask(linear.args[4]), int(linear.args[5] or 0)

            def unquantized(mask: torch.Tensor | None = mask, width: int = width) -> Iterator[torch.Tensor]:
                for x in inputs:
                    yield rotated(x.reshape(-1, channels), None if mask is None else mask.to(x.device), width)

            self._round(name, second_moments(unquantized, channels, ranks=self._ranks, name=self._source(name)))

    def load(self, name: str) -> torch.Tensor:
        """A stored tensor in the dtype of the graph."""
        spec = self._specs[name]
        if spec.source is None:
            assert spec.value is not None
            return spec.value
        if spec.plane == "whole":
            return whole_tensor(spec, self._program, self._checkpoint).to(spec.dtype)
        if spec.source not in self._planes:
            self._planes[spec.source] = dict(self._packed(spec, spec.source))
        return self._planes[spec.source][spec.plane]

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

    def _unsolved(self, weights: Mapping[int, list[str]]) -> dict[int, list[str]]:
        """Number of a node -> the names of codes that are to be solved there, as rank 0 sees it."""
        names = [name for group in weights.values() for name in group if self._specs[name].rounding == "gptq"]
        left = [name for name in names if self._ranks.first and self._solved.get(self._source(name)) is None]
        self._ranks.all_agree(None)
        left = self._ranks.all_gather(left)[0]
        sizes = {name: self._bytes(self._source(name)) for name in names}
        self._events("total", sum(sizes.values()))
        self._events("unit", "bytes")
        if done := sum(size for name, size in sizes.items() if name not in left):
            self._events("skipped", done)
        found = {number: [name for name in group if name in left] for number, group in weights.items()}
        return {number: group for number, group in found.items() if group}

    def _round(self, name: str, statistics: InputStatistics) -> None:
        source = self._source(name)
        tensor = self._checkpoint.read(source, validate=True)
        release = partial(self._checkpoint.release, source)
        planes = make_planes(self._specs[name], tensor, self._program, statistics, release, ranks=self._ranks)
        with self._ranks.together():
            if self._ranks.first:
                self._solved.put(source, planes)
        self._checkpoint.release(source)
        self._events("bytes", self._bytes(source))

    def _packed(self, spec: TensorSource, source: str) -> Planes:
        if spec.rounding != "gptq":
            return make_planes(spec, self._checkpoint.read(source, validate=True), self._program)
        planes = self._solved.get(source)
        if planes is None:
            raise Hif4Error(
                f"{source}: rank {self._ranks.rank} does not see the planes that rank 0 has written; "
                "write to a folder that all ranks share."
            )
        return planes

    def _mask(self, argument: object) -> torch.Tensor | None:
        if not isinstance(argument, Ref):
            return None
        return self.load(self._graph.tensors[argument.index - len(self._graph.inputs)].name)

    def _source(self, name: str) -> str:
        return str(self._specs[name].source)

    def _bytes(self, source: str) -> int:
        return self._checkpoint.shape(source).numel() * self._checkpoint.dtype(source).itemsize


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
