"""The same program with float32 in place of bf16 and fp16: what a runtime without 16-bit arithmetic computes.

Quantizers, planes and integers stay what they are, so that the two differ by roundings alone: what is rounded to 16
bits between operators here is not rounded there. Every value keeps its number and every node its place.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import DTYPES, Graph, InputType, Node, TensorType, refs
from hif4c.runtime.stored_weights import StoredWeights

__all__ = ["float32_executor", "float32_program"]

_NARROW = (torch.bfloat16, torch.float16)


def float32_program(graph: Graph) -> Graph:
    """The program with float32 for every bf16 and fp16, in types and in arguments; the given one is not changed.

    Its stored tensors are to be given in the dtypes that it states: `float32_executor` widens them as they are read.
    """
    return Graph(
        [_widen_input(item) for item in graph.inputs],
        [_widen_input(item) for item in graph.tensors],
        [_widen_node(node) for node in graph.nodes],
        list(graph.outputs),
    )


def float32_executor(graph: Graph, weights: StoredWeights) -> Executor:
    """`float32_program(graph)` bound to the tensors of `graph`, on the CPU, in little memory.

    A stored tensor of 16 bits is widened before its first use in a call and dropped after its last, and the memory of
    every stored tensor is given back after its last use.

    Args:
        graph: the program as it is stored.
        weights: its tensors, in the dtypes that it states.
    """
    residency = _WidenedTensors(graph, weights)
    return Executor(float32_program(graph), weights, torch.device("cpu"), residency)


class _WidenedTensors:
    """Which stored tensors are in memory, as an executor's `Residency`."""

    def __init__(self, graph: Graph, weights: StoredWeights) -> None:
        self._weights = weights
        self._tensors = dict(enumerate(graph.tensors, len(graph.inputs)))
        self.names: Collection[str] = frozenset(item.name for item in graph.tensors if _is_narrow(item.type))
        first_use: dict[int, int] = {}
        last_use: dict[int, int] = {}
        for number, node in enumerate(graph.nodes):
            for ref in refs(node.args):
                first_use.setdefault(ref.index, number)
                last_use[ref.index] = number
        self._first: dict[int, list[int]] = {}
        self._last: dict[int, list[int]] = {}
        for index in self._tensors.keys() & first_use.keys():
            self._first.setdefault(first_use[index], []).append(index)
            self._last.setdefault(last_use[index], []).append(index)

    def call(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def before(self, number: int, values: list[Any]) -> None:
        """Widen what node `number` is the first to read."""
        for index in self._first.get(number, ()):
            name = self._tensors[index].name
            if name in self.names:
                values[index] = self._weights[name].float()

    def after(self, number: int, values: list[Any]) -> None:
        """Drop what no later node reads."""
        for index in self._last.get(number, ()):
            name = self._tensors[index].name
            if name in self.names:
                values[index] = None
            self._weights.release([name])


def _widen_input(item: InputType) -> InputType:
    return InputType(item.name, _widen_type(item.type))


def _widen_node(node: Node) -> Node:
    kind = node.type
    if isinstance(kind, tuple):
        kind = tuple(_widen_type(item) for item in kind)
    elif isinstance(kind, TensorType):
        kind = _widen_type(kind)
    keywords = {name: _widen_argument(value) for name, value in node.kwargs.items()}
    return replace(node, args=tuple(_widen_argument(value) for value in node.args), kwargs=keywords, type=kind)


def _is_narrow(kind: TensorType) -> bool:
    return DTYPES[kind.dtype] in _NARROW


def _widen_type(kind: TensorType) -> TensorType:
    return replace(kind, dtype="float32") if _is_narrow(kind) else kind


def _widen_argument(value: Any) -> Any:
    if isinstance(value, list):
        return [_widen_argument(item) for item in value]
    return torch.float32 if isinstance(value, torch.dtype) and value in _NARROW else value
