"""A program as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, Graph, Node, Ref

__all__ = ["count_targets", "program_lines"]


def program_lines(graph: Graph, module: str | None = None) -> Iterator[str]:
    """Yield the program a line a node: `%12 = target(arguments) : type`, under a heading for each module.

    Args:
        graph: the program.
        module: only nodes of this module and those inside it, None for all.
    """
    names = [item.name for item in (*graph.inputs, *graph.tensors)]
    first = graph.first_node
    heading = None
    for number, node in enumerate(graph.nodes):
        if module is not None and node.module != module and not node.module.startswith(module + "."):
            continue
        if node.module != heading:
            heading = node.module
            yield f"# {heading or '(model)'}"
        yield f"  %{first + number} = {_call(node, names)}{_type(node)}"


def count_targets(graph: Graph) -> Counter[str]:
    """How often each operator is called."""
    return Counter(node.target for node in graph.nodes)


def _call(node: Node, names: list[str]) -> str:
    arguments = [_argument(value, names) for value in node.args]
    arguments += [f"{name}={_argument(value, names)}" for name, value in node.kwargs.items()]
    return f"{node.target}({', '.join(arguments)})"


def _argument(value: Any, names: list[str]) -> str:
    if isinstance(value, Ref):
        return names[value.index] if value.index < len(names) else f"%{value.index}"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if value is DEVICE:
        return "device"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(item, names) for item in value) + "]"
    return repr(value)


def _type(node: Node) -> str:
    if node.type is None:
        return ""
    if isinstance(node.type, tuple):
        return " : (" + ", ".join(map(str, node.type)) + ")"
    return f" : {node.type}"
