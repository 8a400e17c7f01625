"""Move the gate and the residual addition behind a linear into it, where they work on the float32 accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hif4c.passes.matching import LINEARS, before_widening, fits_tokens, only_reader, other_operand, padded, reasons
from hif4c.passes.program import LINEAR, PassResult, Program, module_path

__all__ = ["fuse_gated_residual"]

aten, hif4 = torch.ops.aten, torch.ops.hif4
ADD, MUL, CAST = aten.add.Tensor, aten.mul.Tensor, aten.to.dtype
# Positions of `dtype` and `gate` among the arguments; `residual` is the last.
POSITIONS: dict[Any, tuple[int, int]] = {hif4.linear.default: (6, 9), hif4.linear_w4.default: (7, 10)}


@dataclass(frozen=True)
class _Site:
    """What a linear takes over, and the node whose result the fused linear gives."""

    gate: fx.Node | None
    residual: fx.Node
    result: fx.Node


def fuse_gated_residual(program: Program) -> PassResult:
    """Fuse to(residual + linear(...) * gate), with or without gate and casts, where the linear is quantized.

    The gate is float32 [B, 1 or T, N]; the residual has the shape of the result and is read before its cast to float32.
    The contract of the fused node is product and sum in float32 and one rounding at the end: closer to exact arithmetic
    than the unfused program, which rounds the linear's output to bf16 first.
    """
    gated = plain = 0
    kept: dict[str, list[str]] = {}
    for add in list(program.graph.nodes):
        if add.target is not ADD:
            continue
        linear = next((found for found in map(_linear_behind, add.args) if found is not None), None)
        if linear is None:
            continue
        site = _find_site(linear, add)
        if isinstance(site, str):
            kept.setdefault(site, []).append(module_path(linear))
            continue
        dtype_at, gate_at = POSITIONS[linear.target]
        arguments = padded(linear.args, gate_at + 2)
        arguments[dtype_at] = site.result.meta["val"].dtype
        arguments[gate_at:] = [site.gate, site.residual]
        with program.graph.inserting_before(site.result):
            fused = program.call(linear.target, arguments, like=linear)
        site.result.replace_all_uses_with(fused)
        gated += site.gate is not None
        plain += site.gate is None
    program.clean()
    notes = [f"fused {gated} gated residuals and {plain} residuals without a gate", *reasons(kept)]
    return PassResult(bool(gated or plain), notes)


def _linear_behind(value: object) -> fx.Node | None:
    """The linear whose output, cast or multiplied by something, is an operand of a sum."""
    factors = [value]
    while factors:
        node = factors.pop()
        if not isinstance(node, fx.Node):
            continue
        if node.target in (*LINEARS, LINEAR):
            return None if _has_residual(node) else node
        if node.target is CAST:
            factors.append(node.args[0])
        elif node.target is MUL:
            factors += node.args
    return None


def _has_residual(linear: fx.Node) -> bool:
    """Whether a linear's output is the sum of a residual already, so that it is what others are added to."""
    return linear.target in POSITIONS and len(linear.args) > POSITIONS[linear.target][1]


def _find_site(linear: fx.Node, add: fx.Node) -> _Site | str:
    """What follows a linear up to a sum that its output takes part in, or why it stays."""
    if linear.target is LINEAR:
        return "the linear before it is in high precision"
    gate = None
    value: fx.Node | None = linear
    while value is not None and (reader := only_reader(value)) is not add:
        if reader is None:
            return f"{len(value.users)} nodes read what is added"
        if reader.target is MUL and gate is None:
            gate = other_operand(reader, value)
            if gate is None or not fits_tokens(gate, linear):
                return "the factor is not a gate of float32 [B, 1 or T, N]"
        elif reader.target is not CAST or reader.meta["val"].dtype != torch.float32:
            return "its output is computed with in other ways"
        value = reader
    assert value is not None
    residual = other_operand(add, value)
    if residual is None or not _fits(residual, linear) or not _fits(add, linear):
        return "what it is added to is not a tensor of its shape in 16 or 32 bits"
    cast = only_reader(add, CAST)
    if cast is None or add.meta["val"].dtype != torch.float32 or not _fits(cast, linear):
        return _Site(gate, before_widening(residual), add)
    return _Site(gate, before_widening(residual), cast)


def _fits(value: fx.Node, result: fx.Node) -> bool:
    given, wanted = value.meta["val"], result.meta["val"]
    return (
        given.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and given.dim() == wanted.dim()
        and all(bool(a == b) for a, b in zip(given.shape, wanted.shape, strict=True))
    )
