"""Run a program over many samples in bounded memory, with one pass over its weights.

The program is cut into segments. Within a segment one sample goes after the other, so that only what is alive at its
end exists once a sample, and that waits in files beyond a budget (`WaitingValues`). The weights of a segment, at most
about those of one transformer block, are loaded once for all samples and given back after the last one that reads them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from hif4c.compiler.spill import WaitingValues, addresses
from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.runtime.graph import DEVICE, DTYPES, TARGETS, Graph, Node, Ref, TensorType, refs

__all__ = ["MEMORY", "Samples", "TensorStore", "Watch", "interpret"]

MEMORY = 2 << 30
"""Bytes of values that stay in memory between two segments, unless told otherwise."""

_TYPICAL_SIZE = 1000  # stands for a size that differs from sample to sample

Samples = Sequence[tuple[torch.Tensor, ...]]
"""The inputs of the program, in its order, for every sample."""


class TensorStore(Protocol):
    """Where the stored tensors of a program come from."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name` of the program, in the dtype and shape that the graph states."""

    def release(self, name: str) -> None:
        """No node reads it any more."""


class Watch(Protocol):
    """Looks at values while a program runs."""

    @property
    def barriers(self) -> Collection[int]:
        """Numbers of nodes that no sample comes to before all samples' `on_input` and then `on_ready` were called."""

    def on_input(self, number: int, node: Node, sample: int, value: Any) -> None:
        """The first argument of a node, which depends on the sample; before the node is run and its weights are loaded.

        Called once for every such node and sample: for a node in the order of the samples; between two barriers for
        all nodes of a sample before those of the next, as far as no segment ends. The value must not be changed.
        """

    def on_ready(self, number: int, inputs: Sequence[Any]) -> None:
        """All samples have arrived at the barrier before a node.

        `inputs[sample]` is what `on_input` saw, read back when it is asked for: hold one at a time. Empty where the
        first argument does not depend on samples, and where there are none.
        """


@torch.no_grad()
def interpret(
    graph: Graph,
    samples: Samples,
    store: TensorStore,
    *,
    watch: Watch | None = None,
    device: torch.device | str = "cpu",
    scratch: Path | None = None,
    memory: int = MEMORY,
) -> list[list[Any]]:
    """Run the program; returns for every output its value for every sample.

    What depends on no sample (weights, tables, timestep frequencies) is computed once. Besides weights and `memory`,
    what one sample needs within a segment is in memory.

    Args:
        graph: any program whose targets are in `hif4c.runtime.graph.TARGETS`.
        samples: inputs; sizes may differ from sample to sample. Without any, nothing is loaded or run, but `on_ready`
            is called all the same.
        store: the stored tensors.
        watch: see there.
        device: where nodes run; samples and tensors are moved there when they are used.
        scratch: an existing folder for values that wait in files; empty again at the end. None: all stay in memory.
        memory: bytes of waiting values that stay in memory.

    Raises:
        Hif4Error: the scratch folder cannot be written.
    """
    barriers = frozenset(() if watch is None else watch.barriers)
    device = torch.device(device)
    with WaitingValues(len(samples), scratch, memory, device) as waiting:
        run = _Run(graph, samples, store, device, watch, barriers)
        for number, inputs in enumerate(samples):
            waiting.keep(number, dict(enumerate(inputs)), run.elsewhere())
        start = 0
        for end in _segment_ends(graph, run.dependent, barriers):
            for number in range(len(samples)):
                values = waiting.take(number)
                run.segment(start, end, number, values)
                waiting.keep(number, values, run.elsewhere())
                del values
            if watch is not None and end in barriers:
                watch.on_ready(end, _Inputs(graph.nodes[end], waiting, run.dependent, len(samples), device))
            start = end
        return [[run.output(ref, waiting, number) for number in range(len(samples))] for ref in graph.outputs]


class _Run:
    """A program with what its samples share.

    Attributes:
        dependent: the values that depend on samples.
    """

    def __init__(
        self,
        graph: Graph,
        samples: Samples,
        store: TensorStore,
        device: torch.device,
        watch: Watch | None,
        barriers: Collection[int],
    ) -> None:
        self.dependent = _dependent(graph)
        self._graph, self._store, self._device, self._watch, self._barriers = graph, store, device, watch, barriers
        self._last = len(samples) - 1
        self._shared: dict[int, Any] = {}
        self._dead = _last_uses(graph)
        self._given = addresses(samples)

    def segment(self, start: int, end: int, sample: int, values: dict[int, Any]) -> None:
        """Run the nodes from `start` to before `end` for one sample, whose values are changed in place."""
        first = self._graph.first_node
        for number in range(start, end):
            node = self._graph.nodes[number]
            if number not in self._barriers:
                self._show(number, sample, values)
            if first + number in self.dependent:
                values[first + number] = self._call(node, values)
            elif sample == 0:
                self._shared[first + number] = self._call(node, values)
            for index in self._dead[number]:
                if index in self.dependent:
                    values.pop(index, None)
                elif sample == self._last:
                    self._forget(index)
        if end in self._barriers:
            self._show(end, sample, values)

    def elsewhere(self) -> set[int]:
        """Addresses of storages that are in memory whether values of samples share them or not."""
        return self._given | addresses(self._shared.values())

    def output(self, ref: Ref, waiting: WaitingValues, sample: int) -> Any:
        """The value of an output for a sample."""
        return waiting.look(sample, ref.index) if ref.index in self.dependent else self._read(ref, {})

    def _call(self, node: Node, values: dict[int, Any]) -> Any:
        keywords = {name: self._device if value is DEVICE else value for name, value in node.kwargs.items()}
        return TARGETS[node.target](*self._read(list(node.args), values), **keywords)

    def _show(self, number: int, sample: int, values: dict[int, Any]) -> None:
        node = self._graph.nodes[number]
        index = _first_argument(node, self.dependent)
        if self._watch is not None and index is not None:
            self._watch.on_input(number, node, sample, _on(values[index], self._device))

    def _read(self, argument: Any, values: dict[int, Any]) -> Any:
        """The argument with values for references; loads the stored tensors that it names."""
        if isinstance(argument, Ref):
            if argument.index in self.dependent:
                return _on(values[argument.index], self._device)
            if argument.index not in self._shared:
                tensor = self._graph.tensors[argument.index - len(self._graph.inputs)]
                self._shared[argument.index] = self._store.load(tensor.name).to(self._device)
            return self._shared[argument.index]
        if isinstance(argument, list):
            return [self._read(item, values) for item in argument]
        return self._device if argument is DEVICE else argument

    def _forget(self, index: int) -> None:
        """Drop a value that samples share; a stored tensor is given back."""
        if self._shared.pop(index, None) is not None and index < self._graph.first_node:
            self._store.release(self._graph.tensors[index - len(self._graph.inputs)].name)


class _Inputs(Sequence[Any]):
    """The first argument of a node for every sample, read when it is asked for."""

    def __init__(
        self, node: Node, waiting: WaitingValues, dependent: Collection[int], count: int, device: torch.device
    ) -> None:
        self._index = _first_argument(node, dependent)
        self._waiting, self._device = waiting, device
        self._count = 0 if self._index is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, sample: Any) -> Any:
        if not 0 <= sample < self._count or self._index is None:
            raise IndexError(f"sample {sample} of {self._count}")
        return _on(self._waiting.look(sample, self._index), self._device)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _first_argument(node: Node, dependent: Collection[int]) -> int | None:
    """Number of the value that is a node's first argument, where it depends on samples."""
    first = node.args[0] if node.args else None
    return first.index if isinstance(first, Ref) and first.index in dependent else None


def _dependent(graph: Graph) -> set[int]:
    """The values that depend on samples, the inputs among them."""
    found = set(range(len(graph.inputs)))
    for number, node in enumerate(graph.nodes):
        if any(ref.index in found for ref in refs(node.args)):
            found.add(graph.first_node + number)
    return found


def _segment_ends(graph: Graph, dependent: Collection[int], barriers: Collection[int]) -> list[int]:
    """Numbers of the nodes before which a segment ends, ascending; the last one is behind all nodes."""
    if wrong := [number for number in barriers if not 0 <= number < len(graph.nodes)]:
        raise ValueError(f"no node has the number of the barrier {wrong[0]}")
    return sorted({*barriers, *_block_starts(graph, dependent), len(graph.nodes)})


def _block_starts(graph: Graph, dependent: Collection[int]) -> Iterator[int]:
    """Where to stop before the weights of another transformer block are loaded.

    Between the last node that reads a stored tensor and the first that loads one of another block, the place where the
    fewest bytes of a sample are alive, the latest of such.
    """
    alive = _alive(graph, dependent)
    loaded: set[int] = set()
    block, behind = None, 0  # of the newest tensor; the node after the last that read any
    for number, node in enumerate(graph.nodes):
        read = {ref.index for ref in refs(node.args) if len(graph.inputs) <= ref.index < graph.first_node}
        names = [graph.tensors[index - len(graph.inputs)].name for index in sorted(read - loaded)]
        found = [match[1] for match in map(BLOCK_PATTERN.match, names) if match]
        if found and found[0] != block:
            if loaded:
                yield min(range(number, behind - 1, -1), key=lambda place: alive[place])
            block = found[0]
        if read:
            behind = number + 1
            loaded |= read


def _alive(graph: Graph, dependent: Collection[int]) -> list[int]:
    """For every node about how many bytes of a sample exist before it that it or a later one reads."""
    types = [*(item.type for item in (*graph.inputs, *graph.tensors)), *(node.type for node in graph.nodes)]
    changes = [0] * (len(graph.nodes) + 2)
    for number, dead in enumerate(_last_uses(graph)):
        for index in dead:
            if index in dependent:
                changes[max(index - graph.first_node + 1, 0)] += _typical_bytes(types[index])
                changes[number + 1] -= _typical_bytes(types[index])
    return list(accumulate(changes))


def _typical_bytes(kind: TensorType | tuple[TensorType, ...] | str | None) -> int:
    if isinstance(kind, TensorType):
        sizes = (size if isinstance(size, int) else _TYPICAL_SIZE for size in kind.shape)
        return DTYPES[kind.dtype].itemsize * math.prod(sizes)
    return sum(map(_typical_bytes, kind)) if isinstance(kind, tuple) else 0


def _last_uses(graph: Graph) -> list[list[int]]:
    """For every node the values that nothing after it reads; what nothing reads at all dies with the node itself."""
    last: dict[int, int] = {graph.first_node + number: number for number in range(len(graph.nodes))}
    for number, node in enumerate(graph.nodes):
        for ref in refs(node.args):
            last[ref.index] = number
    kept = {ref.index for ref in graph.outputs}
    dead: list[list[int]] = [[] for _ in graph.nodes]
    for index, number in last.items():
        if index not in kept:
            dead[number].append(index)
    return dead
