"""Fuse dequantize, dequantize, linear, bias and side branch into `hif4::linear`; weight-only into `hif4::linear_w4`."""

from __future__ import annotations

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program

__all__ = ["lower_linears"]

aten, hif4 = torch.ops.aten, torch.ops.hif4


def lower_linears(program: Program) -> PassResult:
    """Replace every linear whose weight is dequantized. The result keeps the dtype that the linear had.

    add(linear, matmul(side, up)), as `add_side_branches` leaves it, becomes one node too: the fused operator adds the
    branch to its float32 accumulator, where the unfused program rounds both terms first.
    """
    counts = {"hif4::linear": 0, "hif4::linear_w4": 0}
    for linear in list(program.linears()):
        source, weight, bias = (*linear.args, None)[:3]
        if not _is_dequantize(weight):
            continue
        dtype = linear.meta["val"].dtype
        stored_bias = program.unrounded(bias) if isinstance(bias, fx.Node) else None
        result, side = _side_branch(program, linear)
        with program.graph.inserting_before(result):
            if _is_dequantize(source):
                planes = (*source.args[:2], *weight.args[:2])  # type: ignore[union-attr]
                arguments = (*planes, stored_bias, None, dtype, *side)
                fused = program.call(hif4.linear.default, arguments, like=linear)
                counts["hif4::linear"] += 1
            else:
                planes = (source, *weight.args[:2])  # type: ignore[union-attr]
                arguments = (*planes, stored_bias, None, 0, None, dtype, *side)
                fused = program.call(hif4.linear_w4.default, arguments, like=linear)
                counts["hif4::linear_w4"] += 1
        result.replace_all_uses_with(fused)
        program.graph.erase_node(result)
        if result is not linear:
            program.graph.erase_node(linear)
    program.clean()
    return PassResult(any(counts.values()), [f"{count} {name}" for name, count in counts.items()])


def _is_dequantize(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is hif4.dequantize.default


def _side_branch(program: Program, linear: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node to replace, and (side, up) if it is the sum of the linear and its branch."""
    for user in linear.users:
        if user.target is not aten.add.Tensor or len(linear.users) > 1 or user.args[0] is not linear:
            continue
        product = user.args[1]
        if isinstance(product, fx.Node) and product.target is aten.matmul.default:
            side, up = product.args
            assert isinstance(side, fx.Node)
            assert isinstance(up, fx.Node)
            if up.name in program.tensors and program.tensors[up.name].plane == "up":
                return user, (side, up)
    return linear, ()
