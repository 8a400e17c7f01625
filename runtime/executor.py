"""Run a program: one call a node, in order; a value is dropped right after its last use.

On the CPU, what depends on nothing but stored tensors and the sizes of the inputs (the tables of the rotary embedding,
arithmetic on sizes) is computed once for each combination of sizes and kept for the last few of them. On a GPU it is
computed in every call: what is kept would belong to the stream on which it was computed.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hif4c.runtime.graph import DEVICE, TARGETS, Graph, Node, Ref, refs

__all__ = ["Executor"]

MAX_SIZES = 4
"""Combinations of input sizes whose values are kept. For 720p the tables of one take some 40 MB."""

Step = tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]], dict[str, Any], int, tuple[int, ...]]


class Executor:
    """A program bound to its tensors.

    Args:
        graph: the program.
        tensors: name -> tensor, one for each of `graph.tensors`, of the dtype and shape that the graph states.
        device: where the tensors are; constants that the program makes are made there.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.graph = graph
        self.device = device
        self.tensors = [tensors[item.name] for item in graph.tensors]
        self._steps = _schedule(graph, device)
        self._outputs = [ref.index for ref in graph.outputs]
        of_sizes = _depends_on_sizes(graph) if device.type == "cpu" else set()
        self._size_steps = [step for step in self._steps if step[3] in of_sizes]
        self._value_steps = [step for step in self._steps if step[3] not in of_sizes]
        self._kept = _read_from(graph, of_sizes)
        self._size_reads = [
            (node.args[0].index, node.args[1])
            for number, node in enumerate(graph.nodes)
            if node.target == _SIZE and graph.first_node + number in of_sizes
        ]
        self._of_sizes: OrderedDict[tuple[int, ...], list[tuple[int, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        """The program on copied tensors. What is kept is not copied, and its lock cannot be."""
        tensors = copy.deepcopy(self.tensors, memo)
        names = (item.name for item in self.graph.tensors)
        return Executor(self.graph, dict(zip(names, tensors, strict=True)), self.device)

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        """Run on the inputs in the program's order; returns its outputs."""
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        for index, value in self._values_of_sizes(inputs):
            values[index] = value
        _run(self._value_steps, values)
        return [values[index] for index in self._outputs]

    def _values_of_sizes(self, inputs: Sequence[torch.Tensor]) -> list[tuple[int, Any]]:
        """(index, value) of what depends on the sizes of these inputs alone and is read by the rest of the program."""
        if not self._size_steps:
            return []
        sizes = tuple([inputs[index].shape[axis] for index, axis in self._size_reads])
        with self._lock:
            if sizes in self._of_sizes:
                self._of_sizes.move_to_end(sizes)
                return self._of_sizes[sizes]
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        _run([(*step[:4], ()) for step in self._size_steps], values)
        found = [(index, values[index]) for index in self._kept]
        with self._lock:
            self._of_sizes[sizes] = found
            if len(self._of_sizes) > MAX_SIZES:
                self._of_sizes.popitem(last=False)
        return found

    def trace(self, *inputs: torch.Tensor) -> list[Any]:
        """Run and return the value of every node, in node order (for tests and calibration of small models)."""
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        with torch.no_grad():
            for function, arguments, keywords, result, _ in self._steps:
                values[result] = function(*arguments(values), **keywords)
        return values[self.graph.first_node :]


_SIZE = "aten.sym_size.int"


def _run(steps: Sequence[Step], values: list[Any]) -> None:
    for function, arguments, keywords, result, dead in steps:
        values[result] = function(*arguments(values), **keywords)
        for index in dead:
            values[index] = None


def _depends_on_sizes(graph: Graph) -> set[int]:
    """The values that depend on sizes of inputs, and on stored tensors, but not on what the inputs hold.

    What depends on stored tensors alone is left out, unless such a value is made from it: a program that decodes its
    weights must not keep them.
    """
    first_tensor, first = len(graph.inputs), graph.first_node
    fixed, sized = set(range(first_tensor, first)), set()
    for number, node in enumerate(graph.nodes):
        read = {ref.index for argument in (node.args, tuple(node.kwargs.values())) for ref in refs(argument)}
        index = first + number
        if node.target == _SIZE and read and max(read) < first_tensor:
            sized.add(index)
        elif read and read <= fixed | sized:
            (sized if read & sized else fixed).add(index)
    wanted = set(sized)
    for number, node in reversed(list(enumerate(graph.nodes))):
        if first + number in wanted:
            wanted |= {ref.index for ref in refs(node.args) if ref.index >= first}
    return wanted


def _read_from(graph: Graph, of_sizes: set[int]) -> list[int]:
    """Which of the values of sizes the other nodes and the outputs read."""
    others = [node for number, node in enumerate(graph.nodes) if graph.first_node + number not in of_sizes]
    read = {ref.index for node in others for ref in refs(node.args)} | {ref.index for ref in graph.outputs}
    return sorted(of_sizes & read)


def _schedule(graph: Graph, device: torch.device) -> list[Step]:
    first = graph.first_node
    last_use: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        for argument in (node.args, tuple(node.kwargs.values())):
            for ref in refs(argument):
                last_use[ref.index] = number
    kept = {ref.index for ref in graph.outputs}
    dead: list[list[int]] = [[] for _ in graph.nodes]
    for index, number in last_use.items():
        if index >= first and index not in kept:
            dead[number].append(index)
    return [
        (
            TARGETS[node.target],
            _arguments(node, device),
            {name: device if value is DEVICE else value for name, value in node.kwargs.items()},
            first + number,
            tuple(dead[number]),
        )
        for number, node in enumerate(graph.nodes)
    ]


def _arguments(node: Node, device: torch.device) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Compile the argument template of a node into a function of the value table."""
    args = [device if argument is DEVICE else argument for argument in node.args]
    if any(isinstance(value, Ref) for value in node.kwargs.values()):
        raise ValueError(f"{node.target}: values are passed by position")
    if args and all(isinstance(argument, Ref) for argument in args):
        if len(args) == 1:
            only = args[0].index
            return lambda values: (values[only],)
        return operator.itemgetter(*(argument.index for argument in args))
    if not any(True for argument in args for _ in refs(argument)):
        constant: tuple[Any, ...] = tuple(args)
        return lambda values: constant
    return lambda values: tuple([_resolve(argument, values) for argument in args])


def _resolve(argument: Any, values: Sequence[Any]) -> Any:
    if type(argument) is Ref:
        return values[argument.index]
    if type(argument) is list:
        return [_resolve(item, values) for item in argument]
    return argument
