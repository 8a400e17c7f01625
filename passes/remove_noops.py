"""Drop what a trace records but inference does not need: metadata asserts, dropout, casts that change nothing."""

from __future__ import annotations

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program

__all__ = ["remove_noops"]

aten = torch.ops.aten
ASSERT = aten._assert_tensor_metadata.default
DROPOUT = aten.dropout.default
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)


def remove_noops(program: Program) -> PassResult:
    """Remove no-ops and write every remaining cast as `aten.to.dtype`; results stay bit for bit the same.

    `type_as(x, y)` would keep y alive only for its dtype, and the asserts bake in the device of the trace.
    """
    removed = rewritten = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is ASSERT:
            program.graph.erase_node(node)
            removed += 1
        elif node.target is DROPOUT and not node.args[2]:
            removed += _replace(program, node)
        elif node.target in CASTS:
            if node.meta["val"].dtype == node.args[0].meta["val"].dtype:
                removed += _replace(program, node)
            elif node.target is not aten.to.dtype:
                with program.graph.inserting_before(node):
                    cast = program.call(aten.to.dtype, (node.args[0], node.meta["val"].dtype), like=node)
                node.replace_all_uses_with(cast)
                program.graph.erase_node(node)
                rewritten += 1
    program.clean()
    return PassResult(bool(removed or rewritten), [f"removed {removed} no-ops, rewrote {rewritten} casts"])


def _replace(program: Program, node: fx.Node) -> int:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.graph.erase_node(node)
    return 1
