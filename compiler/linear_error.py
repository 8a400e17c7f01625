"""Output SQNR of one compiled linear on calibration rows: what the report and the ladder show for every layer."""

from __future__ import annotations

import math

import torch

from hif4c.compiler.planes import Planes, PreparedWeight
from hif4c.passes.program import Decision, Precision

__all__ = ["linear_sqnr"]

BLOCK_ELEMENTS = 1 << 22
"""Elements of a weight that are multiplied at once: its float32 form is not in memory as a whole."""


def linear_sqnr(
    decision: Decision,
    rows: torch.Tensor,
    weight: torch.Tensor | PreparedWeight,
    planes: Planes,
    mask: torch.Tensor | None,
    shift: torch.Tensor | None = None,
) -> float:
    """10 log10 of signal over noise of the linear's output, in dB, as the shipped kernels compute it.

    Args:
        decision: the linear's.
        rows: what reaches it in the unquantized program, [R, K] float32.
        weight: [N, K] float32 as the unquantized program has it.
        planes: its stored form.
        mask: of its input, None without one.
        shift: what its input arrives without, given back by the bias.
    """
    folded = mask is not None and decision.mask_folded
    x = rows if shift is None else rows - shift
    x = (x * mask if folded and mask is not None else x).to(torch.bfloat16)
    own_mask = None if folded else mask
    side = None
    if "up" in planes:
        parts = []
        if "down" in planes:
            parts.append(torch.nn.functional.linear(x, planes["down"]))
        if mask is not None and bool((mask == 0).any()):
            parts.append(x[:, mask == 0])
        side = torch.cat(parts, -1)
    quantized = torch.ops.hif4.quantize(x, own_mask, decision.hadamard)
    signal = noise = 0.0
    weight = PreparedWeight(weight, weight.dtype) if isinstance(weight, torch.Tensor) else weight
    for some in weight.blocks(BLOCK_ELEMENTS):
        part, packed = weight[some], (planes["codes"][some], planes["scales"][some])
        side_weight = planes["up"][:, some] if "up" in planes else None
        if decision.precision == Precision.W4A4:
            found = torch.ops.hif4.linear(*quantized, *packed, None, None, torch.float32, side, side_weight)
        else:
            found = torch.ops.hif4.linear_w4(
                x, *packed, None, own_mask, decision.hadamard, None, torch.float32, side, side_weight
            )
        if shift is not None:
            found = found + shift @ part.T
        expected = (rows @ part.T).double()
        signal += float(expected.square().sum())
        noise += float((found.double() - expected).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
