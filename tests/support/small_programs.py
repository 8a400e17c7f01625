"""Small programs of named values, as tracing would have typed them: for tests of what is done with programs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, TARGETS, Graph, InputType, Node, Ref, TensorType

__all__ = ["SIZES", "SmallProgram", "Spec"]

SIZES = ({"b": 2, "t": 3, "h": 4}, {"b": 5, "t": 7, "h": 6})
"""Two sets of values for the dynamic sizes: a size of a value that differs between them is dynamic."""


@dataclass(frozen=True)
class Spec:
    """An input or stored tensor: sizes by number or by name, and a dtype; its numbers are random."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    def make(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        """Normal floats, integers from 0 to 3, bytes that are codes, or scales of 2^-3 to 1 with any exponents."""
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        if self.dtype != torch.uint8:
            return torch.randint(0, 4, shape, generator=generator).to(self.dtype)
        values = torch.randint(0, 256, shape, generator=generator)
        if shape[-1] == 4:
            values[..., 0] = 180 + values[..., 0] % 13
        return values.to(torch.uint8)


@dataclass
class SmallProgram:
    """Calls in order, name of the result -> (target, *arguments); "%x" stands for the value x.

    A last argument that is a dict holds keyword arguments. Without `outputs` the last value is returned.
    """

    inputs: dict[str, Spec]
    calls: dict[str, tuple[Any, ...]]
    tensors: dict[str, Spec] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [*self.inputs, *self.tensors, *self.calls]
        assert len(set(names)) == len(names), names

    def values(self, sizes: Mapping[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs and stored tensors; the latter are the same for all sizes."""
        made = []
        for specs, seed in ((self.inputs, 1), (self.tensors, 2)):
            generator = torch.Generator().manual_seed(seed)
            made.append({name: spec.make(sizes, generator) for name, spec in specs.items()})
        return made[0], made[1]

    def graph(self, module: str = "blocks.0.part") -> Graph:
        """The program with a type for every value."""
        names = [*self.inputs, *self.tensors, *self.calls]
        number = {name: index for index, name in enumerate(names)}
        runs = [self._run(sizes) for sizes in SIZES]
        kinds = {name: _type(runs[0][name], runs[1][name]) for name in names}
        nodes = []
        for name, call in self.calls.items():
            target, arguments, keywords = _parts(call)
            args = tuple(_replace(item, {key: Ref(index) for key, index in number.items()}) for item in arguments)
            nodes.append(Node(target, args, keywords, module, kinds[name]))
        return Graph(
            [InputType(name, kinds[name]) for name in self.inputs],
            [InputType(name, kinds[name]) for name in self.tensors],
            nodes,
            [Ref(number[name]) for name in self.outputs or names[-1:]],
        )

    def _run(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        inputs, tensors = self.values(sizes)
        values: dict[str, Any] = {**inputs, **tensors}
        for name, call in self.calls.items():
            target, arguments, keywords = _parts(call)
            keywords = {key: "cpu" if item is DEVICE else item for key, item in keywords.items()}
            values[name] = TARGETS[target](*(_replace(item, values) for item in arguments), **keywords)
        return values


def _parts(call: tuple[Any, ...]) -> tuple[str, list[Any], dict[str, Any]]:
    target, *arguments = call
    keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    return target, arguments, keywords


def _replace(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, list):
        return [_replace(item, values) for item in argument]
    return values[argument[1:]] if isinstance(argument, str) and argument.startswith("%") else argument


def _type(first: Any, second: Any) -> Any:
    if isinstance(first, torch.Tensor):
        return TensorType(DTYPE_NAMES[first.dtype], tuple(_sizes(first.shape, second.shape)))
    if isinstance(first, (list, tuple)):
        return tuple(_type(*pair) for pair in zip(first, second, strict=True))
    return str(next(_sizes([first], [second])))


def _sizes(first: Any, second: Any) -> Iterator[int | str]:
    names = {(SIZES[0][name], SIZES[1][name]): name for name in SIZES[0]}
    for pair in zip(first, second, strict=True):
        yield pair[0] if pair[0] == pair[1] else names.get(pair, f"n{pair[0]}_{pair[1]}")
