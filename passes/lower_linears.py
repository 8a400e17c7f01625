"""Fuse dequantize, dequantize, linear and bias into one `hif4::linear`; weight-only into `hif4::linear_w4`."""

from __future__ import annotations

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program

__all__ = ["lower_linears"]

hif4 = torch.ops.hif4


def lower_linears(program: Program) -> PassResult:
    """Replace every linear whose weight is dequantized. The result keeps the dtype that the linear had."""
    counts = {"hif4::linear": 0, "hif4::linear_w4": 0}
    for linear in list(program.linears()):
        source, weight, bias = (*linear.args, None)[:3]
        if not _is_dequantize(weight):
            continue
        dtype = linear.meta["val"].dtype
        with program.graph.inserting_before(linear):
            if _is_dequantize(source):
                planes = (*source.args[:2], *weight.args[:2])  # type: ignore[union-attr]
                fused = program.call(hif4.linear.default, (*planes, bias, None, dtype), like=linear)
                counts["hif4::linear"] += 1
            else:
                planes = (source, *weight.args[:2])  # type: ignore[union-attr]
                fused = program.call(hif4.linear_w4.default, (*planes, bias, None, 0, None, dtype), like=linear)
                counts["hif4::linear_w4"] += 1
        linear.replace_all_uses_with(fused)
        program.graph.erase_node(linear)
    program.clean()
    return PassResult(any(counts.values()), [f"{count} {name}" for name, count in counts.items()])


def _is_dequantize(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is hif4.dequantize.default
