"""Run a program: one call a node, in order; a value is dropped right after its last use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hif4c.runtime.graph import DEVICE, TARGETS, Graph, Node, Ref, refs

__all__ = ["Executor"]

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
        self.tensors = [tensors[item.name] for item in graph.tensors]
        self._steps = _schedule(graph, device)
        self._outputs = [ref.index for ref in graph.outputs]

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        """Run on the inputs in the program's order; returns its outputs."""
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        for function, arguments, keywords, result, dead in self._steps:
            values[result] = function(*arguments(values), **keywords)
            for index in dead:
                values[index] = None
        return [values[index] for index in self._outputs]

    def trace(self, *inputs: torch.Tensor) -> list[Any]:
        """Run and return the value of every node, in node order (for tests and calibration of small models)."""
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        with torch.no_grad():
            for function, arguments, keywords, result, _ in self._steps:
                values[result] = function(*arguments(values), **keywords)
        return values[self.graph.first_node :]


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
