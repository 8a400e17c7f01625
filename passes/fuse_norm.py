"""Fuse a layer norm in float32, the modulation of AdaLN behind it and the casts around them into `hif4::norm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hif4c.passes.matching import arguments, before_widening, fits_tokens, only_reader, other_operand, reasons
from hif4c.passes.producers import LAYER_NORM
from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["fuse_norm"]

aten, hif4 = torch.ops.aten, torch.ops.hif4
ADD, MUL, CAST = aten.add.Tensor, aten.mul.Tensor, aten.to.dtype
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _Modulation:
    """norm * (scale + 1) + shift, and the node that computes it."""

    scale: fx.Node
    shift: fx.Node
    result: fx.Node


def fuse_norm(program: Program) -> PassResult:
    """Fuse to(layer_norm(to(x, float32)) * (scale + 1) + shift), with or without modulation, affine weights and casts.

    The input is read before its cast to float32. Portable results stay bit for bit the same; scale + 1 is computed in
    the fused node.
    """
    modulated = plain = 0
    kept: dict[str, list[str]] = {}
    for norm in list(program.graph.nodes):
        if norm.target is not LAYER_NORM:
            continue
        given = arguments(norm)
        modulation = _find_modulation(norm)
        if norm.meta["val"].dtype != torch.float32:
            modulation = "it is not in float32"
        elif len(given["normalized_shape"]) != 1 or norm.meta["val"].dim() < 2:
            modulation = "it normalizes more than the last axis"
        if isinstance(modulation, str):
            kept.setdefault(modulation, []).append(module_path(norm))
            continue
        scale = shift = None
        result = norm
        if modulation is not None:
            scale, shift, result = modulation.scale, modulation.shift, modulation.result
        cast = only_reader(result, CAST)
        if cast is not None and cast.meta["val"].dtype in FLOATS:
            result = cast
        x, affine = before_widening(given["input"]), (given["weight"], given["bias"])
        with program.graph.inserting_before(result):
            values = (x, *affine, scale, shift, given["eps"], result.meta["val"].dtype)
            fused = program.call(hif4.norm.default, values, like=norm)
        result.replace_all_uses_with(fused)
        modulated += modulation is not None
        plain += modulation is None
    program.clean()
    notes = [f"fused {modulated} norms with modulation and {plain} without", *reasons(kept)]
    return PassResult(bool(modulated or plain), notes)


def _find_modulation(norm: fx.Node) -> _Modulation | str | None:
    """What follows a norm as norm * (scale + 1) + shift; None where no product does, a reason for any other one."""
    product = only_reader(norm, MUL)
    if product is None:
        return None if len(norm.users) < 2 else f"{len(norm.users)} nodes read its result"
    factor = other_operand(product, norm)
    total = only_reader(product, ADD)
    shift = None if total is None else other_operand(total, product)
    if factor is None or total is None or shift is None:
        return "what follows is not norm * (scale + 1) + shift"
    scale = factor.args[0]
    if factor.target is not ADD or factor.kwargs or factor.args[1] != 1 or not isinstance(scale, fx.Node):
        return "what follows is not norm * (scale + 1) + shift"
    if not (fits_tokens(scale, norm) and fits_tokens(shift, norm)):
        return "scale and shift are not float32 [B, 1 or T, C]"
    return _Modulation(scale, shift, total)
