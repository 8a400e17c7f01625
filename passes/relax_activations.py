"""The same program with activations in bf16, for timesteps that need them: W4A4 linears become W4A16 ones.

The packed weights, masks and rotations stay what they are, so one weight file serves both programs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from hif4c.passes.matching import QUANTIZERS, input_quantizer, padded
from hif4c.passes.program import PassResult, Precision, Program

__all__ = ["relax_activations"]

hif4 = torch.ops.hif4


def relax_activations(program: Program) -> PassResult:
    """Replace hif4::linear(hif4::quantize(x, mask, hadamard), ...) by hif4::linear_w4(x, ..., mask, hadamard, ...).

    The input is still masked and rotated, as the weight was when it was packed, but no longer rounded to 4 bits; where
    a norm was fused with the quantizer, it becomes `hif4::norm` again. Bias, activation, side branch, gate, residual
    and output dtype are kept.

    Args:
        program: a lowered program; its decisions become W4A16, with their masks and rotations.

    Raises:
        ValueError: a linear's planes do not come from a quantizer, or the weights would no longer be those of the
            program that was given.
    """
    tensors = dict(program.tensors)
    inputs: dict[fx.Node, fx.Node] = {}
    relaxed = 0
    for linear in list(program.graph.nodes):
        if linear.target is not hif4.linear.default:
            continue
        quantizer = input_quantizer(linear)
        if quantizer not in inputs:
            inputs[quantizer] = _unquantized(program, quantizer)
        x = inputs[quantizer]
        mask_at, _ = QUANTIZERS[quantizer.target]
        mask, hadamard = padded(quantizer.args, mask_at + 2)[mask_at:]
        _, _, codes, scales, bias, activation, _, *epilogue = padded(linear.args, 7)
        # Given even where the linear leaves it out: the two operators have different defaults.
        dtype = linear.meta["val"].dtype
        with program.graph.inserting_before(linear):
            arguments = (x, codes, scales, bias, mask, hadamard or 0, activation, dtype, *epilogue)
            fused = program.call(hif4.linear_w4.default, arguments, like=linear)
        linear.replace_all_uses_with(fused)
        program.graph.erase_node(linear)
        path = str(program.tensors[codes.name].source).removesuffix(".weight")
        program.decisions[path] = replace(program.decisions[path], precision=Precision.W4A16)
        relaxed += 1
    program.clean()
    if program.tensors != tensors:
        lost = sorted(tensors.keys() - program.tensors.keys())
        raise ValueError(f"the relaxed program no longer reads {lost}, so it cannot share the weight file")
    return PassResult(relaxed > 0, [f"{relaxed} hif4::linear to hif4::linear_w4, {len(inputs)} quantizers dropped"])


def _unquantized(program: Program, quantizer: fx.Node) -> fx.Node:
    """What is quantized."""
    if quantizer.target is hif4.quantize.default:
        x = quantizer.args[0]
        assert isinstance(x, fx.Node)
        return x
    mask_at, _ = QUANTIZERS[quantizer.target]
    with program.graph.inserting_before(quantizer):
        return program.call(hif4.norm.default, quantizer.args[:mask_at], like=quantizer)
