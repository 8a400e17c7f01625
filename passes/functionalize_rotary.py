"""Rewrite the rotary embedding's writes into an empty buffer as a stack, so that the whole program is functional."""

from __future__ import annotations

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program

__all__ = ["functionalize_rotary"]

aten = torch.ops.aten


def functionalize_rotary(program: Program) -> PassResult:
    """Replace `out = empty_like(x); out[..., 0::2] = a; out[..., 1::2] = b` by `stack([a, b], -1).flatten(-2)`.

    The writes cast to x's dtype, and so does the rewrite: the result is bit for bit the same. An empty buffer that is
    written in another way is left alone, with a note; the verifier then refuses the program.
    """
    rewritten, notes = 0, []
    for buffer in list(program.graph.nodes):
        if buffer.op != "call_function" or buffer.target is not aten.empty_like.default:
            continue
        halves = _interleaved_writes(buffer)
        if halves is None:
            notes.append(f"{buffer.name}: written in a way that is not a rotary embedding")
            continue
        writes, (even, odd) = halves
        dtype = buffer.meta["val"].dtype
        with program.graph.inserting_before(writes[-1]):
            parts = [
                part if part.meta["val"].dtype == dtype else program.call(aten.to.dtype, (part, dtype), like=buffer)
                for part in (even, odd)
            ]
            stacked = program.call(aten.stack.default, (parts, -1), like=buffer)
            result = program.call(aten.flatten.using_ints, (stacked, -2), like=buffer)
        views = [view for write in writes for view in write.all_input_nodes[:1]]
        for write in writes:
            program.graph.erase_node(write)
        for view in views:
            program.graph.erase_node(view)
        buffer.replace_all_uses_with(result)
        program.graph.erase_node(buffer)
        rewritten += 1
    program.clean()
    return PassResult(rewritten > 0, [f"rewrote {rewritten} rotary embeddings", *notes])


def _interleaved_writes(buffer: fx.Node) -> tuple[list[fx.Node], tuple[fx.Node, fx.Node]] | None:
    """The two copies into the even and the odd elements of the last dimension, and what they write."""
    last = buffer.meta["val"].dim() - 1
    found: dict[int, fx.Node] = {}
    for view in buffer.users:
        if view.target is not aten.slice.Tensor or view.args[0] is not buffer:
            continue
        _, dim, start, _, step = (*view.args, 1)[:5]
        copies = [user for user in view.users if user.target is aten.copy_.default and user.args[0] is view]
        if (
            dim != last
            or step != 2
            or not isinstance(start, int)
            or len(copies) != 1
            or len(view.users) != 1
            or copies[0].users
        ):
            return None
        found[start] = copies[0]
    if set(found) != {0, 1}:
        return None
    writes = sorted(found.values())
    return writes, (found[0].args[1], found[1].args[1])  # type: ignore[return-value]
