"""From the passes' program to the runtime's graph.json."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from hif4c.passes.program import Program, module_path
from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, Graph, InputType, Node, Ref, TensorType

__all__ = ["to_graph"]

SIZE_TARGETS = {
    operator.getitem: "getitem",
    operator.mul: "size.mul",
    operator.floordiv: "size.floordiv",
}


def to_graph(program: Program) -> Graph:
    """Number the values of a program, inputs first, then tensors, then nodes; works at every stage."""
    sizes = _Sizes(program.symbols)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    order = [*program.inputs, *program.tensors]
    number: dict[fx.Node, int] = {placeholders[name]: index for index, name in enumerate(order)}
    inputs = [InputType(name, _tensor_type(placeholders[name].meta["val"], sizes)) for name in program.inputs]
    tensors = [
        InputType(spec.name, _tensor_type(placeholders[name].meta["val"], sizes))
        for name, spec in program.tensors.items()
    ]
    nodes, outputs = [], []
    for node in program.graph.nodes:
        if node.op == "output":
            outputs = [Ref(number[item]) for item in node.args[0]]
        elif node.op == "call_function":
            number[node] = len(number)
            kwargs = {
                key: _argument(value, number)
                for key, value in node.kwargs.items()
                if key != "pin_memory" and value is not None
            }
            args = tuple(_argument(item, number) for item in node.args)
            kind = _type(node.meta["val"], sizes)
            nodes.append(Node(_target_name(node.target), args, kwargs, module_path(node), kind))
    return Graph(inputs, tensors, nodes, outputs)


def _target_name(target: Any) -> str:
    name = SIZE_TARGETS.get(target, str(target))
    return name.removesuffix(".default") if name.startswith("hif4.") else name


def _argument(value: Any, number: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(number[value])
    if isinstance(value, (list, tuple)):
        return [_argument(item, number) for item in value]
    if isinstance(value, torch.device):
        return DEVICE
    return value


def _type(value: Any, sizes: _Sizes) -> TensorType | tuple[TensorType, ...] | str | None:
    if isinstance(value, torch.Tensor):
        return _tensor_type(value, sizes)
    if isinstance(value, (list, tuple)):
        return tuple(_tensor_type(item, sizes) for item in value)
    return None if value is None else str(sizes(value))


def _tensor_type(value: torch.Tensor, sizes: _Sizes) -> TensorType:
    return TensorType(DTYPE_NAMES[value.dtype], tuple(sizes(size) for size in value.shape))


class _Sizes:
    """Sizes as numbers, or as expressions in the names that people read; each is printed once, which is slow."""

    def __init__(self, symbols: Mapping[str, str]) -> None:
        self._names = symbols
        self._printed: dict[sympy.Expr, int | str] = {}

    def __call__(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._printed:
            self._printed[expression] = self._print(expression)
        return self._printed[expression]

    def _print(self, expression: sympy.Expr) -> int | str:
        if expression.is_number:
            return int(expression)
        names = {symbol: sympy.Symbol(self._names.get(str(symbol), str(symbol))) for symbol in expression.free_symbols}
        return str(expression.xreplace(names))
