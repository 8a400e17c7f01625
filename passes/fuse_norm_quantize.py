"""Fuse a norm and the quantizer of its result, so that the normalized values are never written."""

from __future__ import annotations

import torch

from hif4c.passes.matching import padded, reasons
from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["fuse_norm_quantize"]

hif4 = torch.ops.hif4


def fuse_norm_quantize(program: Program) -> PassResult:
    """Replace hif4::quantize(hif4::norm(...), mask, hadamard) by hif4::norm_quantize where nothing else reads the norm.

    The norm's result is rounded to its dtype in the fused node too, so the codes stay the same.
    """
    fused = 0
    kept: dict[str, list[str]] = {}
    for norm in list(program.graph.nodes):
        if norm.target is not hif4.norm.default:
            continue
        quantizers = [user for user in norm.users if user.target is hif4.quantize.default]
        if len(quantizers) != 1 or len(norm.users) != 1:
            others = f"{len(norm.users)} nodes read its result, not one quantizer"
            reason = others if quantizers else "what reads it does not quantize"
            kept.setdefault(reason, []).append(module_path(norm))
            continue
        (quantizer,) = quantizers
        _, mask, hadamard = padded(quantizer.args, 3)
        with program.graph.inserting_before(quantizer):
            values = (*norm.args, mask, hadamard or 0)
            replacement = program.call(hif4.norm_quantize.default, values, like=quantizer)
        quantizer.replace_all_uses_with(replacement)
        fused += 1
    program.clean()
    return PassResult(fused > 0, [f"fused {fused} norms with the quantizer of their result", *reasons(kept)])
