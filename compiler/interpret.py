"""Run a program over many samples in step: node after node, every node for all samples, weights loaded when needed.

The values of a node are a list with one entry a sample, or a single one where no sample is involved (weights, tables,
timestep frequencies). A weight is loaded when the first node reads it and given back after the last one did, so that
one pass over a checkpoint, with one layer of it in memory, serves any number of samples and any size of model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hif4c.runtime.graph import DEVICE, TARGETS, Graph, Node, Ref, refs

__all__ = ["OnNode", "Samples", "TensorStore", "interpret"]

Samples = Sequence[tuple[torch.Tensor, ...]]
"""The inputs of the program, in its order, for every sample."""

OnNode = Callable[[int, Node, list[Any]], None]
"""Called with a node's number, the node, and its first argument for every sample."""


class TensorStore(Protocol):
    """Where the stored tensors of a program come from."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name` of the program, in the dtype and shape that the graph states."""

    def release(self, name: str) -> None:
        """No node reads it any more."""


class _PerSample(list[Any]):
    """Values that differ from sample to sample."""


@torch.no_grad()
def interpret(
    graph: Graph,
    samples: Samples,
    store: TensorStore,
    on_node: OnNode | None = None,
    device: torch.device | str = "cpu",
) -> list[list[Any]]:
    """Run the program; returns for every output its value for every sample.

    Before a node whose first argument depends on the samples is run, and before its weights are loaded, `on_node` sees
    that argument of every sample.

    Args:
        graph: any program whose targets are in `hif4c.runtime.graph.TARGETS`.
        samples: inputs, at least one sample; sizes may differ from sample to sample.
        store: the stored tensors.
        on_node: see above.
        device: where nodes run; samples and tensors are moved there when they are used.
    """
    device = torch.device(device)
    values: dict[int, Any] = {
        index: _PerSample(sample[index] for sample in samples) for index in range(len(graph.inputs))
    }
    first_tensor, first_node = len(graph.inputs), graph.first_node

    def load(arguments: Any) -> None:
        for ref in refs(arguments):
            if first_tensor <= ref.index < first_node and ref.index not in values:
                values[ref.index] = store.load(graph.tensors[ref.index - first_tensor].name).to(device)

    dead = _last_uses(graph)
    for number, node in enumerate(graph.nodes):
        if on_node is not None:
            _show(number, node, values, on_node, device)
        load(node.args)
        values[first_node + number] = _run(node, values, len(samples), device)
        for index in dead[number]:
            if values.pop(index, None) is not None and first_tensor <= index < first_node:
                store.release(graph.tensors[index - first_tensor].name)
    load(graph.outputs)
    return [
        list(value) if isinstance(value, _PerSample) else [value] * len(samples)
        for value in (values[ref.index] for ref in graph.outputs)
    ]


def _show(number: int, node: Node, values: dict[int, Any], on_node: OnNode, device: torch.device) -> None:
    """Call `on_node` where the first argument depends on the samples."""
    first = node.args[0] if node.args else None
    if isinstance(first, Ref) and isinstance(values.get(first.index), _PerSample):
        count = len(values[first.index])
        on_node(number, node, [_resolve(first, values, sample, device) for sample in range(count)])


def _run(node: Node, values: dict[int, Any], count: int, device: torch.device) -> Any:
    function = TARGETS[node.target]
    keywords = {name: device if value is DEVICE else value for name, value in node.kwargs.items()}

    def call(sample: int) -> Any:
        return function(*_resolve(list(node.args), values, sample, device), **keywords)

    if any(isinstance(values[ref.index], _PerSample) for ref in refs(node.args)):
        return _PerSample(call(sample) for sample in range(count))
    return call(0)


def _resolve(argument: Any, values: dict[int, Any], sample: int, device: torch.device) -> Any:
    if isinstance(argument, Ref):
        value = values[argument.index]
        value = value[sample] if isinstance(value, _PerSample) else value
        return value.to(device) if isinstance(value, torch.Tensor) else value
    if isinstance(argument, list):
        return [_resolve(item, values, sample, device) for item in argument]
    return device if argument is DEVICE else argument


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
