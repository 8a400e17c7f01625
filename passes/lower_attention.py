"""Replace attention of every query to every key by `hif4::attention`, for which backends have a kernel of their own."""

from __future__ import annotations

import torch
from torch import fx

from hif4c.passes.matching import arguments, reasons
from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["lower_attention"]

aten, hif4 = torch.ops.aten, torch.ops.hif4
OPTIONS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
"""What it must not have, by the value that stands for not having it."""


def lower_attention(program: Program) -> PassResult:
    """Replace scaled_dot_product_attention without mask, dropout, causality, scale of its own or grouped heads."""
    lowered = 0
    kept: dict[str, list[str]] = {}
    for attention in list(program.graph.nodes):
        if attention.target is not aten.scaled_dot_product_attention.default:
            continue
        given = arguments(attention)
        tensors = [given[name] for name in ("query", "key", "value")]
        used = [name for name, absent in OPTIONS.items() if given[name] != absent]
        if used:
            kept.setdefault(f"it has {', '.join(used)}", []).append(module_path(attention))
        elif not _fits(*tensors):
            kept.setdefault("it is not of [B, H, T, D] to [B, H, S, D]", []).append(module_path(attention))
        else:
            with program.graph.inserting_before(attention):
                replacement = program.call(hif4.attention.default, tensors, like=attention)
            attention.replace_all_uses_with(replacement)
            program.graph.erase_node(attention)
            lowered += 1
    program.clean()
    return PassResult(lowered > 0, [f"lowered {lowered} attentions", *reasons(kept)])


def _fits(query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    """Whether batch and heads are the same and not broadcast, and values are as wide as keys."""
    q, k, v = (node.meta["val"] for node in (query, key, value))
    return (
        q.dim() == k.dim() == v.dim() == 4
        and all(bool(a == b) for a, b in zip(k.shape, v.shape, strict=True))
        and all(bool(q.shape[axis] == k.shape[axis]) for axis in (0, 1, 3))
    )
