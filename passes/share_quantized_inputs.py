"""Quantize an input once for all the linears that read it: q, k and v; the text tokens for every block's k and v."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program

__all__ = ["share_equal_nodes", "share_quantized_inputs"]

SHARED = (torch.ops.hif4.quantize.default, torch.ops.hif4.dequantize.default, operator.getitem)


def share_quantized_inputs(program: Program) -> PassResult:
    """Merge quantize nodes with the same input, mask and rotation, and what is read from them."""
    before = sum(node.target is SHARED[0] for node in program.graph.nodes)
    merged = share_equal_nodes(program, SHARED)
    after = sum(node.target is SHARED[0] for node in program.graph.nodes)
    return PassResult(merged > 0, [f"{before} quantize nodes became {after}"])


def share_equal_nodes(program: Program, targets: tuple[Any, ...] | None = None) -> int:
    """Merge calls of the same target with the same arguments (all targets if None); returns how many were dropped.

    Correct because the program is functional (`functionalize_rotary`).
    """
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function" or (targets is not None and node.target not in targets):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
            merged += 1
    return merged


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    # 1, 1.0 and True are equal as dictionary keys but not as arguments.
    return value if isinstance(value, fx.Node) else (type(value), value)
