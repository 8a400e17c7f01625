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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from hif4c.runtime.graph import DEVICE, TARGETS, Graph, Node, Ref, refs
from hif4c.runtime.stored_weights import StoredWeights

__all__ = ["Executor", "ReleaseAfterUse", "Residency"]

MAX_SIZES = 4
"""Combinations of input sizes whose values are kept. For 720p the tables of one take some 40 MB."""

Step = tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]], dict[str, Any], int, tuple[int, ...]]


class Residency(Protocol):
    """Which stored tensors are in memory while a program runs."""

    @property
    def names(self) -> Collection[str]:
        """The tensors that it brings into the value table itself; nobody else may count on them."""
        ...

    def call(self) -> AbstractContextManager[None]:
        """Entered for the time of one call of the program."""
        ...

    def before(self, number: int, values: list[Any]) -> None:
        """Node `number` is next."""
        ...

    def after(self, number: int, values: list[Any]) -> None:
        """Node `number` has run."""
        ...


class ReleaseAfterUse:
    """Gives a stored tensor's memory back after its last use in a call: memory does not grow with the layers.

    On the CPU, for weights that are views of their files. A later call reads them again, from the page cache where the
    system has kept them.
    """

    names: Collection[str] = ()

    def __init__(self, graph: Graph, weights: StoredWeights) -> None:
        self._weights = weights
        self._last: dict[int, list[str]] = {}
        first = len(graph.inputs)
        for index, number in _last_uses(graph).items():
            if first <= index < graph.first_node:
                self._last.setdefault(number, []).append(graph.tensors[index - first].name)

    def call(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def before(self, number: int, values: list[Any]) -> None:
        """Nothing to do: what is read comes by itself."""

    def after(self, number: int, values: list[Any]) -> None:
        """Give back what no later node reads."""
        if names := self._last.get(number):
            self._weights.release(names)


class Executor:
    """A program bound to its tensors.

    Args:
        graph: the program.
        tensors: name -> tensor, one for each of `graph.tensors`, of the dtype and shape that the graph states.
        device: where the tensors are; constants that the program makes are made there.
        residency: for tensors that are not to be in memory all the time.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        residency: Residency | None = None,
    ) -> None:
        self.graph = graph
        self.device = device
        self.residency = residency
        brought: Collection[str] = () if residency is None else residency.names
        self.tensors = [None if item.name in brought else tensors[item.name] for item in graph.tensors]
        self._steps = _schedule(graph, device)
        self._outputs = [ref.index for ref in graph.outputs]
        of_sizes = _depends_on_sizes(graph) if device.type == "cpu" and not brought else set()
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
        if self.residency is not None:
            raise TypeError("an executor whose tensors are not all in memory cannot be copied")
        held = zip(self.graph.tensors, copy.deepcopy(self.tensors, memo), strict=True)
        return Executor(self.graph, {item.name: tensor for item, tensor in held if tensor is not None}, self.device)

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        """Run on the inputs in the program's order; returns its outputs."""
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        for index, value in self._values_of_sizes(inputs):
            values[index] = value
        if self.residency is None:
            _run(self._value_steps, values)
        else:
            self._run_watched(self._value_steps, values)
        return [values[index] for index in self._outputs]

    @torch.no_grad()
    def visit(self, inputs: Sequence[torch.Tensor], see: Callable[[int, tuple[Any, ...], Any], None]) -> list[Any]:
        """Run every node and show it: `see(number, positional arguments, result)`. Returns the program's outputs.

        Stored tensors that a node reads for the last time are still there when it is shown.
        """
        values: list[Any] = [*inputs, *self.tensors, *([None] * len(self._steps))]
        self._run_watched(self._steps, values, see)
        return [values[index] for index in self._outputs]

    def _run_watched(
        self,
        steps: Sequence[Step],
        values: list[Any],
        see: Callable[[int, tuple[Any, ...], Any], None] = lambda number, arguments, result: None,
    ) -> None:
        """Run with what happens around nodes."""
        residency, first = self.residency, self.graph.first_node
        with nullcontext() if residency is None else residency.call():
            for function, arguments, keywords, result, dead in steps:
                number = result - first
                if residency is not None:
                    residency.before(number, values)
                given = arguments(values)
                values[result] = function(*given, **keywords)
                see(number, given, values[result])
                for index in dead:
                    values[index] = None
                del given
                if residency is not None:
                    residency.after(number, values)

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
        """Run and return the value of every node, in node order (for tests)."""
        values: list[Any] = []
        self.visit(inputs, lambda number, arguments, result: values.append(result))
        return values


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


def _last_uses(graph: Graph) -> dict[int, int]:
    """Value -> the last node that reads it."""
    last_use: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        for argument in (node.args, tuple(node.kwargs.values())):
            for ref in refs(argument):
                last_use[ref.index] = number
    return last_use


def _schedule(graph: Graph, device: torch.device) -> list[Step]:
    first = graph.first_node
    last_use = _last_uses(graph)
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
